"""The two cameras, drawn by pybullet's software renderer (TinyRenderer), as the original draws them without a GPU."""

import os
import struct
import tempfile
from typing import Any

import numpy as np

from wam_jax.environments.calvin import scene

RENDERER = "TinyRenderer"


def static_view(bullet: Any) -> tuple[float, ...]:
    """The view matrix of the fixed camera."""
    return bullet.computeViewMatrix(scene.STATIC_EYE, scene.STATIC_TARGET, scene.STATIC_UP)


def gripper_view(bullet: Any, robot: int) -> tuple[float, ...]:
    """The view matrix of the camera on the hand: it looks along its link's y axis, -z is up."""
    position, orientation = bullet.getLinkState(robot, scene.CAMERA_LINK)[:2]
    rotation = np.array(bullet.getMatrixFromQuaternion(orientation)).reshape(3, 3)
    return bullet.computeViewMatrix(position, np.array(position) + rotation[:, 1], -rotation[:, 2])


def render(bullet: Any, view: tuple[float, ...], lens: scene.Lens, size: int) -> np.ndarray:
    """A picture, uint8 [size, size, 3]."""
    projection = bullet.computeProjectionMatrixFOV(fov=lens.fov, aspect=1, nearVal=lens.near, farVal=lens.far)
    pixels = bullet.getCameraImage(size, size, view, projection, renderer=bullet.ER_TINY_RENDERER)[2]
    return np.asarray(pixels, np.uint8).reshape(size, size, 4)[..., :3]


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
