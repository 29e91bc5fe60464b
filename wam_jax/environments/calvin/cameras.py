"""The two cameras, drawn by pybullet's software renderer (TinyRenderer), as the original draws them without a GPU."""

import os
import struct
import tempfile
from typing import Any

import numpy as np

from wam_jax.environments.calvin import assets, scene

RENDERER = "TinyRenderer"


def static_view(bullet: Any) -> tuple[float, ...]:
    """The view matrix of the fixed camera."""
    return bullet.computeViewMatrix(scene.STATIC_EYE, scene.STATIC_TARGET, scene.STATIC_UP)


def gripper_view(bullet: Any, robot: int) -> tuple[float, ...]:
    """The view matrix of the camera on the hand: it looks along its link's y axis, -z is up."""
    position, orientation = bullet.getLinkState(robot, scene.CAMERA_LINK)[:2]
    rotation = _rotation(bullet, orientation)
    return bullet.computeViewMatrix(position, np.array(position) + rotation[:, 1], -rotation[:, 2])


def render(bullet: Any, view: tuple[float, ...], lens: scene.Lens, size: int) -> np.ndarray:
    """A picture, uint8 [size, size, 3]."""
    pixels = bullet.getCameraImage(size, size, view, _projection(bullet, lens), renderer=bullet.ER_TINY_RENDERER)[2]
    return np.asarray(pixels, np.uint8).reshape(size, size, 4)[..., :3]


def hulls(bullet: Any, robot: int) -> dict[int, np.ndarray]:
    """Vertices of the heavy links' collision shapes, the hulls of what is drawn, in the frames of their masses."""
    shapes = {link: bullet.getCollisionShapeData(robot, link) for link in scene.HEAVY_LINKS}
    return {link: np.concatenate([_hull(bullet, shape) for shape in of_link]) for link, of_link in shapes.items()}


def _hull(bullet: Any, shape: tuple) -> np.ndarray:
    name, position, orientation = shape[4].decode(), shape[5], shape[6]
    return assets.mesh_vertices(name) @ _rotation(bullet, orientation).T + position


def out_of_view(
    bullet: Any, robot: int, hulls: dict[int, np.ndarray], view: tuple[float, ...], lens: scene.Lens
) -> frozenset[int]:
    """Those of the robot's heavy links that a camera cannot show, since they lie beside its picture or behind it.

    Args:
      bullet, robot: the world and the body.
      hulls: of `hulls`.
      view, lens: the camera.
    """
    to_clip = np.reshape(_projection(bullet, lens), (4, 4)).T @ np.reshape(view, (4, 4)).T
    x, y, _, w = to_clip
    planes = np.stack([w + x, w - x, w + y, w - y, w])  # what is shown lies on the positive side of each
    planes /= np.linalg.norm(planes[:, :3], axis=1, keepdims=True)
    links = [link for link in hulls if link >= 0]
    poses = dict(zip(links, bullet.getLinkStates(robot, links), strict=True))
    poses[-1] = bullet.getBasePositionAndOrientation(robot)
    unseen = set()
    for link, vertices in hulls.items():
        position, orientation = poses[link][:2]
        normals = planes[:, :3] @ _rotation(bullet, orientation)
        farthest = (vertices @ normals.T).max(axis=0) + planes[:, :3] @ position + planes[:, 3]
        if farthest.min() < -scene.HULL_MARGIN:
            unseen.add(link)
    return frozenset(unseen)


def _rotation(bullet: Any, orientation: tuple[float, ...]) -> np.ndarray:
    return np.array(bullet.getMatrixFromQuaternion(orientation)).reshape(3, 3)


def _projection(bullet: Any, lens: scene.Lens) -> tuple[float, ...]:
    return bullet.computeProjectionMatrixFOV(fov=lens.fov, aspect=1, nearVal=lens.near, farVal=lens.far)


def paint_floor(bullet: Any, floor: int) -> None:
    """Gives the floor the original's checkerboard where the assets lack its texture: the same pixels."""
    cells = np.arange(scene.FLOOR_PIXELS) // (scene.FLOOR_PIXELS // scene.FLOOR_CELLS)
    gray = np.array(scene.FLOOR_GRAYS, np.uint8)[np.add.outer(cells, cells) % 2]
    with tempfile.TemporaryDirectory() as folder:  # pybullet reads textures from files only
        path = os.path.join(folder, "floor.bmp")
        with open(path, "wb") as file:
            file.write(_bmp(np.repeat(gray[..., None], 3, axis=-1)))
        bullet.changeVisualShape(floor, -1, textureUniqueId=bullet.loadTexture(path))


def _bmp(pixels: np.ndarray) -> bytes:
    """An uncompressed 24-bit bitmap of gray pixels [height, width, 3], width a multiple of 4."""
    height, width = pixels.shape[:2]
    data = pixels.tobytes()
    header = struct.pack("<2sIII", b"BM", 54 + len(data), 0, 54)
    return header + struct.pack("<IiiHHIIiiII", 40, width, -height, 1, 24, 0, len(data), 0, 0, 0, 0) + data
