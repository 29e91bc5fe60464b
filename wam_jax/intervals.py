"""Intervals: of success, of paired differences, of means over units, and of correlations over points in groups."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import binomtest, rankdata

RESAMPLES = 1000
TABLE_RESAMPLES = 10_000  # of success and its differences, where the last digit printed should not be the draw's
LEVELS = (2.5, 97.5)  # percent: 95 % intervals


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a success rate."""
    interval = binomtest(successes, episodes).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def of_success(successes: np.ndarray, episodes: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Success averaged over tasks and training seeds, and its 95 % interval.

    One seed: over its episodes, Wilson's; of several tasks their Wilson intervals by square-and-add (Zou and Donner
    2008). Several seeds: seeds drawn anew, for all tasks together, then the episodes of each; never narrower than one
    seed's with all these episodes would be, since a draw of nothing but successes has no width.

    Args:
      successes: int [S, T], of each seed and task.
      episodes: int [T], of each seed.
      seed: of the draws.

    Returns:
      mean, low and high.
    """
    successes, episodes = np.asarray(successes), np.asarray(episodes)
    num_seeds, num_tasks = successes.shape
    total, number = successes.sum(axis=0), num_seeds * episodes
    rates = total / number
    limits = np.array([wilson(int(k), int(n)) for k, n in zip(total, number, strict=True)])
    margins = np.sqrt(np.square(limits - rates[:, None]).sum(axis=0)) / num_tasks
    mean = float(rates.mean())
    low, high = mean - margins[0], mean + margins[1]
    if num_seeds > 1:
        rng = np.random.default_rng(seed)
        chosen = rng.integers(num_seeds, size=(TABLE_RESAMPLES, num_seeds))
        drawn = rng.binomial(episodes, successes[chosen] / episodes) / episodes
        drawn_low, drawn_high = np.percentile(drawn.mean(axis=(1, 2)), LEVELS)
        low, high = min(low, drawn_low), max(high, drawn_high)
    return mean, float(low), float(high)


def of_pairs(differences: Sequence[np.ndarray], *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paired differences averaged over starts and training seeds, and their 95 % bootstrap intervals.

    Each task's starts are drawn anew, and stay the same for all seeds, which met the same ones; several seeds are drawn
    anew as well, for all tasks together.

    Args:
      differences: for each of T tasks [S, N_t], of each seed at each start.
      seed: of the draws.

    Returns:
      mean, low and high, [T + 1] each: of every task, then of their mean.
    """
    rng = np.random.default_rng(seed)
    num_seeds = len(differences[0])
    weights = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), TABLE_RESAMPLES) / num_seeds
    means, drawn = [], []
    for values in differences:
        kinds, counts = np.unique(values, axis=1, return_counts=True)  # starts that turned out alike are drawn as one
        size = values.shape[1]
        starts = rng.multinomial(size, counts / size, TABLE_RESAMPLES) / size
        means.append(float(values.mean()))
        drawn.append(((starts @ kinds.T) * weights).sum(axis=1))
    means, drawn = [*means, float(np.mean(means))], [*drawn, np.mean(drawn, axis=0)]
    low, high = np.percentile(drawn, LEVELS, axis=1)
    return np.array(means), low, high


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
