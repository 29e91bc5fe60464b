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
    rotation = np.array(bullet.getMatrixFromQuaternion(orientation)).reshape(3, 3)
    return bullet.computeViewMatrix(position, np.array(position) + rotation[:, 1], -rotation[:, 2])


def render(bullet: Any, view: tuple[float, ...], lens: scene.Lens, size: int) -> np.ndarray:
    """A picture, uint8 [size, size, 3]."""
    projection = bullet.computeProjectionMatrixFOV(fov=lens.fov, aspect=1, nearVal=lens.near, farVal=lens.far)
    pixels = bullet.getCameraImage(size, size, view, projection, renderer=bullet.ER_TINY_RENDERER)[2]
    return np.asarray(pixels, np.uint8).reshape(size, size, 4)[..., :3]


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
