"""Intervals: of success, of paired differences, of means over units, and of correlations over points in groups."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata

RESAMPLES = 1000
TABLE_RESAMPLES = 10_000  # of success and its differences, where the last digit printed should not be the draw's
LEVELS = (2.5, 97.5)  # percent: 95 % intervals


def wilson(successes: float, episodes: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a success rate (Newcombe 1998, method 3); successes need not be whole."""
    rate, z = successes / episodes, ndtri(0.975)
    scale = 2 * (episodes + z**2)
    centre = (2 * episodes * rate + z**2) / scale
    margin = z / scale * np.sqrt(4 * episodes * rate * (1 - rate) + z**2)
    return float(centre - margin if successes > 0 else 0.0), float(centre + margin if successes < episodes else 1.0)


def of_success(
    successes: np.ndarray, episodes: np.ndarray, outcomes: Sequence[np.ndarray] = (), *, seed: int = 0
) -> tuple[float, float, float]:
    """Success averaged over tasks and training seeds, and its 95 % interval.

    One seed: over its episodes, Wilson's; of several tasks their Wilson intervals by square-and-add (Zou and Donner
    2008). Several seeds: `of_starts`; never narrower than one seed's would be at their mean success, since more seeds
    are no more starts, and a draw of nothing but successes has no width.

    Args:
      successes: int [S, T], of each seed and task.
      episodes: int [T], of each seed.
      outcomes: for each task bool [S, N], success of each seed from each start; where they are not known, the episodes
        of several seeds are drawn as if each had its own starts, which is too narrow where seeds fail at the same ones.
      seed: of the draws.

    Returns:
      mean, low and high.
    """
    successes, episodes = np.asarray(successes), np.asarray(episodes)
    num_seeds, num_tasks = successes.shape
    solved = successes.mean(axis=0)
    rates = solved / episodes
    limits = np.array([wilson(float(k), int(n)) for k, n in zip(solved, episodes, strict=True)])
    margins = np.sqrt(np.square(limits - rates[:, None]).sum(axis=0)) / num_tasks
    mean = float(rates.mean())
    low, high = mean - margins[0], mean + margins[1]
    if num_seeds > 1:
        if len(outcomes):
            _, lows, highs = of_starts([np.asarray(of_task, np.float64) for of_task in outcomes], seed=seed)
            drawn_low, drawn_high = lows[-1], highs[-1]
        else:
            rng = np.random.default_rng(seed)
            chosen = rng.integers(num_seeds, size=(TABLE_RESAMPLES, num_seeds))
            drawn = rng.binomial(episodes, successes[chosen] / episodes) / episodes
            drawn_low, drawn_high = np.percentile(drawn.mean(axis=(1, 2)), LEVELS)
        low, high = min(low, drawn_low), max(high, drawn_high)
    return mean, float(low), float(high)


def of_starts(values: Sequence[np.ndarray], *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Success, or paired differences in it, averaged over starts and training seeds, and 95 % bootstrap intervals.

    Each task's starts are drawn anew, and stay the same for all seeds, which met the same ones; several seeds are drawn
    anew as well, for all tasks together.

    Args:
      values: for each of T tasks [S, N_t], of each seed at each start.
      seed: of the draws.

    Returns:
      mean, low and high, [T + 1] each: of every task, then of their mean.
    """
    rng = np.random.default_rng(seed)
    num_seeds = len(values[0])
    weights = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), TABLE_RESAMPLES) / num_seeds
    means, drawn = [], []
    for of_task in values:
        kinds, counts = np.unique(of_task, axis=1, return_counts=True)  # starts that turned out alike are drawn as one
        size = of_task.shape[1]
        starts = rng.multinomial(size, counts / size, TABLE_RESAMPLES) / size
        means.append(float(of_task.mean()))
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
