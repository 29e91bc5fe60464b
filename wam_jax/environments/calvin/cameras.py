"""The two cameras, drawn by pybullet's software renderer (TinyRenderer), as the original draws them without a GPU."""

import atexit
import functools
import os
import shutil
import struct
import tempfile
import zlib
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


@functools.cache
def floor_folder(directory: str) -> str:
    """A folder with the floor: the assets, or a copy with the original's checkerboard where they lack its texture.

    The copy lasts as long as the process. pybullet reads a texture that a file names once; every one that is loaded by
    itself stays in memory.
    """
    if assets.exists(directory, scene.FLOOR_TEXTURE):
        return directory
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    plane = os.path.dirname(scene.PLANE_URDF)
    os.mkdir(os.path.join(folder, plane))
    for entry in os.scandir(assets.path(directory, plane)):
        if entry.is_file():
            shutil.copyfile(entry.path, os.path.join(folder, plane, entry.name))
    cells = np.arange(scene.FLOOR_PIXELS) // (scene.FLOOR_PIXELS // scene.FLOOR_CELLS)
    gray = np.array(scene.FLOOR_GRAYS, np.uint8)[np.add.outer(cells, cells) % 2]
    with open(assets.path(folder, scene.FLOOR_TEXTURE), "wb") as file:
        file.write(_png(gray))
    return folder


def _png(gray: np.ndarray) -> bytes:
    """A PNG of gray pixels, uint8 [height, width]."""
    height, width = gray.shape
    rows = np.pad(gray, ((0, 0), (1, 0)))  # each row begins with its filter, 0: none

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits of gray
    data = zlib.compress(rows.tobytes())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
