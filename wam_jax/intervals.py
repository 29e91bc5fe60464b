"""Bootstrap intervals: of means over independent units, and of correlations over points in groups."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import rankdata

RESAMPLES = 1000
LEVELS = (2.5, 97.5)  # percent: 95 % intervals


def of_mean(values: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % percentile interval of the mean over the leading axis, its rows drawn anew with replacement.

    Args:
      values: [N, ...], a row for each independent unit; NaN where a unit has no value.
      seed: of the draws.

    Returns:
      low and high [...]; NaN where no unit has a value.
    """
    values = np.asarray(values, np.float64)
    size = len(values)
    counts = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), RESAMPLES).astype(np.float64)
    flat = values.reshape(size, -1)
    total, number = counts @ np.nan_to_num(flat), counts @ np.isfinite(flat)
    means = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    low, high = (np.full(flat.shape[1], np.nan) for _ in LEVELS)
    known = np.isfinite(flat).any(axis=0)
    if known.any():
        low[known], high[known] = np.nanpercentile(means[:, known], LEVELS, axis=0)
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def pearson(points: np.ndarray) -> float:
    """Pearson's correlation of the two columns of [N, 2]; NaN where one does not vary."""
    if len(points) < 2 or np.ptp(points, axis=0).min() < 1e-12:
        return float("nan")
    return float(np.corrcoef(points.T)[0, 1])


def spearman(points: np.ndarray) -> float:
    """Spearman's correlation, Pearson's of the ranks, ties sharing theirs."""
    return pearson(rankdata(points, axis=0))


def of_groups(
    statistic: Callable[[np.ndarray], float], groups: Sequence[np.ndarray], *, centred: bool, seed: int = 0
) -> dict[str, float]:
    """A statistic of points in groups, and its interval: groups are drawn anew, then the points of each.

    Args:
      statistic: of points [N, 2].
      groups: [N_g, 2] each; a single one stays, and only its points are drawn.
      centred: subtract each group's mean first, so that only differences within groups count.
      seed: of the draws.

    Returns:
      value, low and high; NaN where too few draws have a value.
    """
    rng = np.random.default_rng(seed)

    def joined(parts):
        return np.concatenate([part - part.mean(axis=0) if centred else part for part in parts])

    def draw():
        chosen = rng.integers(len(groups), size=len(groups)) if len(groups) > 1 else [0]
        return joined([groups[g][rng.integers(len(groups[g]), size=len(groups[g]))] for g in chosen])

    drawn = np.array([statistic(draw()) for _ in range(RESAMPLES)])
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, LEVELS) if len(drawn) > RESAMPLES / 2 else (np.nan, np.nan)
    return {"value": statistic(joined(groups)), "low": float(low), "high": float(high)}
