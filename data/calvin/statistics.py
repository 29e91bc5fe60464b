"""Statistics of proprioception and actions, for models that scale their inputs by a dataset's own.

The models here scale by constants. LUMOS takes z-scores of the Euler form, DiWA a range per entry of the 6-D form.
"""

from pathlib import Path

import numpy as np

from wam_jax import datasets, json_files, specs

FILE = "statistics.json"


def write(directory: Path) -> None:
    """Writes the statistics of a finished dataset's train split beside its shards, unless they are there."""
    if not (directory / FILE).exists():
        json_files.write(directory / FILE, {"train": compute(directory, "train")})


def compute(directory: Path, split: str) -> dict:
    """Mean, standard deviation, minimum and maximum over the steps of a split.

    Returns:
      frames, and the four lists of each of robot_obs [15] (Euler angles, rad: roll lies at +-pi and changes its sign,
      so its mean and deviation mean little), robot_obs_rot6d [18] (the three angles replaced by the first two rows of
      the rotation matrix; unscaled), scene_obs [24] and action [7].
    """
    vectors = datasets.read_vectors(directory, split)
    vectors["robot_obs_rot6d"] = _rot6d(vectors["robot_obs"])
    return {"frames": len(vectors["action"])} | {key: _moments(values) for key, values in vectors.items()}


def _rot6d(robot_obs: np.ndarray) -> np.ndarray:
    rows = np.asarray(specs.euler_to_matrix(robot_obs[:, 3:6]))[:, :2].reshape(-1, 6)
    return np.concatenate([robot_obs[:, :3], rows, robot_obs[:, 6:]], axis=1)


def _moments(values: np.ndarray) -> dict[str, list[float]]:
    return {name: getattr(values, name)(axis=0).tolist() for name in ("mean", "std", "min", "max")}
