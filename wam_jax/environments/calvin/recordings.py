"""Recordings of the original simulator, and their comparison with ours."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from wam_jax import npz_files
from wam_jax.environments.calvin import pool as pools
from wam_jax.environments.calvin.pool import Pool
from wam_jax.environments.calvin.simulator import check_action
from wam_jax.environments.calvin.worker import Frames


@dataclasses.dataclass(frozen=True)
class Recording:
    """One episode: a reset, T actions, T + 1 states and some pictures."""

    reset_robot_obs: np.ndarray  # float64 [15]
    reset_scene_obs: np.ndarray  # float64 [24]
    actions: np.ndarray  # float64 [T, 7], relative
    robot_obs: np.ndarray  # float64 [T + 1, 15], the first after the reset
    scene_obs: np.ndarray  # float64 [T + 1, 24]
    frame_steps: np.ndarray  # int [n], the states that the pictures show
    rgb_static: np.ndarray  # uint8 [n, S, S, 3]
    rgb_gripper: np.ndarray  # uint8 [n, G, G, 3]


_DTYPES = {"frame_steps": np.int64, "rgb_static": np.uint8, "rgb_gripper": np.uint8}  # others: float64


@dataclasses.dataclass(frozen=True)
class Difference:
    """What a comparison found."""

    robot_obs: float  # largest absolute difference
    scene_obs: float
    frames: int  # pictures compared
    identical_frames: int
    first_step: int | None  # of the first difference in states or pictures; None: everything is equal


def load(path: str) -> Recording:
    """Reads a recording.

    Raises:
      ValueError: the file cannot be read, lacks an array or holds one of another shape or type.
    """
    names = [field.name for field in dataclasses.fields(Recording)]
    recording = Recording(**npz_files.read(path, "the recording", names))
    _check(path, recording)
    return recording


def _check(path: str, recording: Recording) -> None:
    steps, frames = (len(np.atleast_1d(array)) for array in (recording.actions, recording.frame_steps))
    expected: dict[str, tuple[int, ...]] = {
        "reset_robot_obs": (15,),
        "reset_scene_obs": (24,),
        "actions": (steps, 7),
        "robot_obs": (steps + 1, 15),
        "scene_obs": (steps + 1, 24),
        "frame_steps": (frames,),
        "rgb_static": (frames, *(recording.rgb_static.shape[1:2] or (64,)) * 2, 3),
        "rgb_gripper": (frames, *(recording.rgb_gripper.shape[1:2] or (64,)) * 2, 3),
    }
    for name, shape in expected.items():
        array, dtype = getattr(recording, name), np.dtype(_DTYPES.get(name, np.float64))
        if array.shape != shape:
            raise ValueError(f"{path}: {name} has shape {array.shape}; expected {shape}")
        if not np.can_cast(array.dtype, dtype, "same_kind"):
            raise ValueError(f"{path}: {name} is {array.dtype}; expected {dtype}")
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} has entries that are not finite")
    for step, action in enumerate(recording.actions):
        try:
            check_action(action)
        except ValueError as error:
            raise ValueError(f"{path}: actions[{step}]: {error}; CALVIN's relative actions are expected") from error
    if frames and not 0 <= recording.frame_steps.min() <= recording.frame_steps.max() <= steps:
        raise ValueError(f"{path}: frame_steps reach beyond the {steps + 1} states")


def compare(pool: Pool, recording: Recording) -> Difference:
    """Repeats a recording and compares what can be compared.

    Args:
      pool: with the recording's sizes of pictures.
      recording: of the same scene.

    Raises:
      ValueError: the recording holds an action that the simulator refuses.
    """
    moments = list(_replay(pool, recording))
    robot_obs = np.abs(np.stack([m.robot_obs[0] for m in moments]) - recording.robot_obs).max(axis=1)
    scene_obs = np.abs(np.stack([m.scene_obs[0] for m in moments]) - recording.scene_obs).max(axis=1)
    wrong = set(np.flatnonzero((robot_obs != 0) | (scene_obs != 0)).tolist())
    identical = 0
    for index, step in enumerate(recording.frame_steps.tolist()):
        pairs = (
            (moments[step].rgb_static[0], recording.rgb_static[index]),
            (moments[step].rgb_gripper[0], recording.rgb_gripper[index]),
        )
        same = sum(np.array_equal(*pair) for pair in pairs)
        identical += same
        wrong |= {step} if same < len(pairs) else set()
    return Difference(
        robot_obs=float(robot_obs.max()),
        scene_obs=float(scene_obs.max()),
        frames=2 * len(recording.frame_steps),
        identical_frames=identical,
        first_step=min(wrong, default=None),
    )


def _replay(pool: Pool, recording: Recording) -> Iterator[Frames]:
    """Every moment of the recording, as it is here, with pictures where it has them."""
    pictured = set(recording.frame_steps.tolist())
    episodes = [pools.begin(recording.reset_robot_obs, recording.reset_scene_obs)]
    yield pool.look(episodes, [0 in pictured])[0]
    for step, action in enumerate(recording.actions, start=1):
        episodes, frames = pool.step(episodes, action[None, None], [step in pictured])
        yield frames[0]
