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
    frames, moments = 0, dict[str, _Moments]()
    for vectors in datasets.read_vectors(directory, split):  # one episode at a time: a split has millions of frames
        frames += len(vectors["action"])
        vectors["robot_obs_rot6d"] = _rot6d(vectors["robot_obs"])
        for key, values in vectors.items():
            moments.setdefault(key, _Moments(values.shape[1])).add(values)
    return {"frames": frames} | {key: of_key.report() for key, of_key in moments.items()}


def _rot6d(robot_obs: np.ndarray) -> np.ndarray:
    rows = np.asarray(specs.euler_to_matrix(robot_obs[:, 3:6]))[:, :2].reshape(-1, 6)
    return np.concatenate([robot_obs[:, :3], rows, robot_obs[:, 6:]], axis=1)


class _Moments:
    """Of vectors [n], gathered in parts; mean and squared deviations are merged as in Chan et al. 1979."""

    def __init__(self, size: int):
        self._count, self._mean, self._squares = 0, np.zeros(size), np.zeros(size)
        self._min, self._max = np.full(size, np.inf), np.full(size, -np.inf)

    def add(self, values: np.ndarray) -> None:
        """Adds rows [T, n]."""
        count, mean = len(values), values.mean(axis=0)
        total, delta = self._count + count, mean - self._mean
        self._squares += ((values - mean) ** 2).sum(axis=0) + delta**2 * self._count * count / total
        self._mean += delta * count / total
        self._count = total
        self._min, self._max = np.minimum(self._min, values.min(axis=0)), np.maximum(self._max, values.max(axis=0))

    def report(self) -> dict[str, list[float]]:
        """Mean, standard deviation and range of each entry."""
        std = np.sqrt(self._squares / self._count)
        found = {"mean": self._mean, "std": std, "min": self._min, "max": self._max}
        return {name: values.tolist() for name, values in found.items()}
