"""CALVIN's simulator where it is at hand; small folders in CALVIN's layout, and files in them to damage."""

import os
from pathlib import Path

import helpers
import numpy as np
import pytest

from data.calvin import npz_folder
from wam_jax import specs

SHARED = Path(os.environ.get("WAM_JAX_CALVIN", helpers.ROOT.parent / "shared" / "calvin"))
ASSETS = SHARED / "assets"


def _missing() -> str:
    """Why the simulator cannot run here, if it cannot; where it was promised, that is an error."""
    if "WAM_JAX_CALVIN" in os.environ and not ASSETS.is_dir():
        raise FileNotFoundError(f"WAM_JAX_CALVIN={SHARED}, but there is no folder {ASSETS}")
    try:
        import pybullet  # noqa: F401
    except ImportError:
        return "pybullet is not installed: make calvin"
    return "" if ASSETS.is_dir() else f"no assets of CALVIN in {ASSETS}; WAM_JAX_CALVIN names a folder that has them"


needs_simulator = pytest.mark.skipif(bool(_missing()), reason=_missing())


def save_pickled(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.array(value, dtype=object), allow_pickle=True)


def make_folder(
    path, first, ranges=((0, 11), (12, 17)), annotations=((3, 8, "open_drawer"), (13, 18, "lift_red_block_table"))
):
    """A folder in CALVIN's layout, in which the drawer opens by 0.05 m a frame."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(first)
    for number in range(ranges[-1][1] + 1):
        scene_obs = rng.normal(size=24)
        scene_obs[specs.DRAWER] = 0.05 * number
        np.savez(
            npz_folder.frame_path(path, first + number),
            actions=rng.normal(size=7),
            rel_actions=rng.uniform(-1, 1, 7),
            robot_obs=rng.normal(size=15),
            scene_obs=scene_obs,
            rgb_static=rng.integers(0, 256, (200, 200, 3), np.uint8),
            rgb_gripper=rng.integers(0, 256, (84, 84, 3), np.uint8),
            depth_static=np.zeros((200, 200), np.float32),
        )
    np.save(path / "ep_start_end_ids.npy", np.array(ranges) + first)
    language = {
        "ann": [f"please {task}" for _, _, task in annotations],
        "task": [task for _, _, task in annotations],
        "emb": np.zeros((len(annotations), 1, 384), np.float32),
    }
    spans = [(first + start, first + end) for start, end, _ in annotations]
    info = {"language": language, "info": {"episodes": [], "indx": spans}}
    save_pickled(path / "lang_annotations" / "auto_lang_ann.npy", info)


def make_input(path):
    make_folder(path / "training", 100)
    make_folder(path / "validation", 500, ranges=((0, 5),), annotations=())
    save_pickled(path / "training" / "scene_info.npy", {"calvin_scene_D": [100, 505]})
    return path


def rewrite(path, **changes):
    arrays = {key: value for key, value in (dict(np.load(path)) | changes).items() if value is not None}
    np.savez(path, **arrays)
