"""The assets folder: what must be in it and which version it is; and pybullet, imported only when asked for."""

import functools
import hashlib
import os
import re
import sys
from typing import Any

import numpy as np

from wam_jax.environments.calvin import scene
from wam_jax.environments.calvin.scene import Scene

PYTHON = "it takes Python 3.10 or 3.11, where pybullet's wheels end, with numpy and pybullet (--calvin_python)"
MEND = "give calvin_env's data/ or a folder laid out like it"
UNKNOWN = "no version that was compared with the original"
_REFERENCE = re.compile(r'filename="([^"]+)"')  # of a mesh in a URDF
_LISTED = 8  # files named in an error
_POINTER = b"version https://git-lfs"
_HEAD = 4096  # characters of an OBJ file that are read; its materials stand at the top
_KNOWN = {  # digests of the files that recordings were compared with
    "7cd1c7434d4a": "calvin_env's, without the floor's texture",
    "173076df92dc": "calvin_env's",
}


class World:
    """pybullet's functions, bound to a physics world of their own."""

    def __init__(self, pybullet: Any):
        self._pybullet = pybullet
        self._client = pybullet.connect(pybullet.DIRECT)

    def __getattr__(self, name: str) -> Any:
        """A function bound to this world, a constant, or the class of pybullet's errors."""
        attribute = getattr(self._pybullet, name)
        if callable(attribute) and not isinstance(attribute, type):
            attribute = functools.partial(attribute, physicsClientId=self._client)
        setattr(self, name, attribute)
        return attribute


def load_pybullet() -> Any:
    """Imports pybullet.

    Raises:
      ValueError: it is not installed, or broken.
    """
    stderr = os.dup(2)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)  # it greets with its time of build
    try:
        import pybullet
    except ImportError as error:
        is_absent = isinstance(error, ModuleNotFoundError) and error.name == "pybullet"
        what = "does not have" if is_absent else f"cannot import ({error})"
        raise ValueError(
            f"CALVIN's simulator needs pybullet, which {sys.executable} {what}: '{sys.executable} -m pip install "
            f"pybullet', or name another Python; {PYTHON}"
        ) from error
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    return pybullet


def pybullet_version() -> str:
    """Of the installed pybullet."""
    from importlib import metadata

    return metadata.version("pybullet")


def path(directory: str, name: str) -> str:
    """Where a file of the assets is."""
    return os.path.join(directory, name)


def files(directory: str, of: Scene) -> list[str]:
    """Names of all files that a scene loads, relative to the folder; what a missing file would name is unknown.

    Left out where they are absent: materials of the robot, since its meshes name some that the original never shipped,
    and the floor's texture, which `simulator` can draw itself.
    """
    urdfs = [scene.ROBOT_URDF, *of.block_urdfs, of.table_urdf, scene.PLANE_URDF]
    names = {*urdfs, *(mesh for urdf in urdfs for mesh in _meshes(directory, urdf))}
    optional = (os.path.dirname(scene.ROBOT_URDF), scene.FLOOR_TEXTURE)
    materials = {material for name in names if name.endswith(".obj") for material in _materials(directory, name)}
    return sorted(names | {name for name in materials if not name.startswith(optional) or exists(directory, name)})


def _meshes(directory: str, urdf: str) -> list[str]:
    references = _REFERENCE.findall(_read(directory, urdf))
    return [_beside(urdf, reference.removeprefix("package://")) for reference in references]


def _materials(directory: str, mesh: str) -> list[str]:
    """Materials of a mesh and their textures."""
    materials = [_beside(mesh, line) for line in _values(directory, mesh, "mtllib")]
    return materials + [_beside(name, line) for name in materials for line in _values(directory, name, "map_Kd")]


def exists(directory: str, name: str) -> bool:
    """Whether the folder has a file."""
    return os.path.isfile(path(directory, name))


def _beside(name: str, reference: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(name), reference))


def _values(directory: str, name: str, key: str) -> list[str]:
    """What stands behind a key word in the lines of an OBJ or MTL file."""
    lines = [line.strip().split(None, 1) for line in _read(directory, name).splitlines()]
    return [line[1] for line in lines if len(line) == 2 and line[0] == key]


def _read(directory: str, name: str) -> str:
    try:
        with open(path(directory, name), encoding="utf-8", errors="replace") as file:
            return file.read(_HEAD if name.endswith(".obj") else -1)
    except OSError:
        return ""


def check(directory: str, of: Scene) -> None:
    """Checks that everything a scene loads is there.

    Raises:
      ValueError: the folder or files in it are missing, or files are empty of what they should hold; names them.
    """
    if not directory:
        raise ValueError(
            f"no folder of CALVIN's assets given: --calvin_assets=DIR (check_calvin: --assets=DIR); {MEND}"
        )
    if not os.path.isdir(directory):
        raise ValueError(f"CALVIN's assets: {directory} is not a folder; {MEND}")
    names = files(directory, of)
    missing = [name for name in names if not exists(directory, name)]
    if missing:
        raise ValueError(f"CALVIN's assets in {directory} lack {_list(missing)}; {MEND}")
    pointers = [name for name in names if _is_pointer(directory, name)]
    if pointers:
        raise ValueError(
            f"CALVIN's assets in {directory} hold git-lfs pointers in place of {_list(pointers)}; 'git lfs pull' there "
            "fetches the files"
        )
    empty = [name for name in names if name.endswith(".obj") and not _has_vertices(directory, name)]
    if empty:
        raise ValueError(f"CALVIN's assets in {directory} have no vertices in {_list(empty)}; {MEND}")


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _is_pointer(directory: str, name: str) -> bool:
    """Whether a file only names what git-lfs would fetch."""
    with open(path(directory, name), "rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _has_vertices(directory: str, name: str) -> bool:
    with open(path(directory, name), "rb") as file:
        return any(line.startswith(b"v ") for line in file)


@functools.cache
def mesh_vertices(path: str) -> np.ndarray:
    """Vertices of an OBJ file, float64 [n, 3]."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return np.array([line.split()[1:4] for line in file if line.startswith("v ")], np.float64)


def check_links(bullet: Any, body: int, urdf: str, links: dict[int, str]) -> None:
    """Checks that a loaded body has the links that its file should have.

    Raises:
      ValueError: it has others.
    """
    found = {index: bullet.getJointInfo(body, index)[12].decode() for index in range(bullet.getNumJoints(body))}
    wrong = [
        f"link {index} is {found.get(index)!r}, not {name!r}"
        for index, name in links.items()
        if found.get(index) != name
    ]
    if wrong:
        raise ValueError(f"{urdf} is of another version than calvin_env's: {'; '.join(wrong)}; {MEND}")


def version_of(directory: str, of: Scene) -> str:
    """Twelve hexadecimal digits that name the version of the files a scene loads, and whose they are."""
    total = hashlib.sha256()
    for name in files(directory, of):
        with open(path(directory, name), "rb") as file:
            total.update(name.encode() + hashlib.sha256(file.read()).digest())
    digest = total.hexdigest()[:12]
    return f"{digest} ({_KNOWN.get(digest, UNKNOWN)})"
