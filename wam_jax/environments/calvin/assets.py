"""The assets folder: what must be in it and which version it is; and pybullet, imported only when asked for."""

import functools
import hashlib
import os
import re
from typing import Any

import numpy as np

from wam_jax.environments.calvin import scene
from wam_jax.environments.calvin.scene import Scene

INSTALL = "pip install 'wam_jax[calvin]'"
_REFERENCE = re.compile(r'filename="([^"]+)"')  # of a mesh in a URDF
_LISTED = 8  # missing files named in an error
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
        """A function bound to this world, or a constant."""
        attribute = getattr(self._pybullet, name)
        if callable(attribute):
            attribute = functools.partial(attribute, physicsClientId=self._client)
        setattr(self, name, attribute)
        return attribute


def load_pybullet() -> Any:
    """Imports pybullet.

    Raises:
      ValueError: it is not installed.
    """
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it greets with its time of build
    try:
        import pybullet
    except ImportError as error:
        raise ValueError(f"CALVIN's simulator needs pybullet, which is not installed: {INSTALL}") from error
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
      ValueError: the folder or files in it are missing; names them.
    """
    if not directory:
        raise ValueError("no folder of CALVIN's assets given: --calvin_assets=DIR, calvin_env's data/ or one like it")
    if not os.path.isdir(directory):
        raise ValueError(
            f"CALVIN's assets: {directory} is not a folder; give calvin_env's data/ or one laid out like it"
        )
    missing = [name for name in files(directory, of) if not exists(directory, name)]
    if missing:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise ValueError(
            f"CALVIN's assets in {directory} lack {', '.join(missing[:_LISTED])}{more}; give calvin_env's data/ (its "
            "meshes are stored with git-lfs) or a folder laid out like it"
        )


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
        raise ValueError(f"{urdf} is of another version than calvin_env's: {'; '.join(wrong)}")


def version_of(directory: str, of: Scene) -> str:
    """Twelve hexadecimal digits that name the version of the files a scene loads, and whose they are."""
    total = hashlib.sha256()
    for name in files(directory, of):
        with open(path(directory, name), "rb") as file:
            total.update(name.encode() + hashlib.sha256(file.read()).digest())
    digest = total.hexdigest()[:12]
    return f"{digest} ({_KNOWN.get(digest, 'no version that was compared with the original')})"
