"""How well success in imagination tells success outside, over a set of policies."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from wam_jax import intervals
from wam_jax.diffusion_policy import PolicyParams
from wam_jax.types import Params

STARTS = ("demonstrations", "real")  # where imagination began: where PPO's does; at the real episodes' own starts
BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # edges of the calibration table, by imagined success


@dataclasses.dataclass(frozen=True)
class Point:
    """One policy on one task: as many episodes outside as imagined ones of either kind."""

    task: str
    policy: str  # "bc", "ppo 50", "ppo 50 x 0.5", "ppo 50, noise 0.4"
    episodes: int
    real: int  # episodes solved, by the environment's oracle
    demonstrations: int | None  # solved in imagination, by the reward rule, from PPO's starts; None: it has none
    imagined_real: int  # the same, from the starts of the real episodes


def along_path(base: Params, finetuned: Params, share: float) -> PolicyParams:
    """The policy a share of the way from the cloned parameters (0) to the fine-tuned ones (1); more goes beyond."""
    between = jax.tree.map(lambda x, y: x + share * (y - x), base, finetuned)
    return PolicyParams(base=base, finetuned=between)


def summarise(points: Sequence[Point]) -> dict[str, Any]:
    """Correlations and calibration of each kind of start that some point has.

    Args:
      points: of any tasks and policies.

    Returns:
      by kind of start: `all` (every point; the interval draws tasks, then policies), `within_tasks` (differences from
      the task's mean), `tasks` (each task over its policies), `table`, mean signed and absolute error, and `ceiling`:
      the Pearson correlation that a perfect imagination would show with so few episodes (see `ceiling`).
    """
    known = {starts: [point for point in points if rates(point, starts)] for starts in STARTS}
    return {starts: _summarise(of, starts) for starts, of in known.items() if of}


def _summarise(points: Sequence[Point], starts: str) -> dict[str, Any]:
    tasks = list(dict.fromkeys(point.task for point in points))
    groups = [np.array([rates(p, starts) for p in points if p.task == task]) for task in tasks]
    joined = np.concatenate(groups)
    episodes = np.array([p.episodes for task in tasks for p in points if p.task == task])
    difference = joined[:, 0] - joined[:, 1]
    return {
        "all": _correlations(groups, centred=False),
        "within_tasks": _correlations(groups, centred=True),
        "tasks": {task: _correlations([group], centred=False) for task, group in zip(tasks, groups, strict=True)},
        "ceiling": {
            "all": ceiling([joined[:, 1]], episodes),
            "within_tasks": ceiling([group[:, 1] for group in groups], episodes),
        },
        "mean_error": float(difference.mean()),
        "mean_absolute_error": float(np.abs(difference).mean()),
        "table": table(joined),
    }


def rates(point: Point, starts: str) -> tuple[float, float] | None:
    """Success imagined, from one kind of start, and success outside; None where there are no such starts."""
    imagined = point.demonstrations if starts == "demonstrations" else point.imagined_real
    return None if imagined is None else (imagined / point.episodes, point.real / point.episodes)


def corrected(imagined: float, recall: float, false_alarms: float) -> float:
    """The success that a judge's share of positive verdicts stands for, if it errs as it is known to err.

    Rogan and Gladen 1978, kept within 0 and 1. How imagination errs is known from recorded attempts under their own
    actions (see trust.py): no step of the environment. It supposes that imagination errs on the policy's episodes as
    often as on those, which a policy that was optimised in imagination breaks.

    Args (shares, 0 to 1):
      imagined: share of a policy's episodes that end with success in imagination.
      recall: share of recorded successes that do.
      false_alarms: share of recorded failures that do.

    Returns:
      NaN where failures end with success as often as successes do, so that a verdict says nothing.
    """
    if not recall > false_alarms:
        return float("nan")
    return min(1.0, max(0.0, (imagined - false_alarms) / (recall - false_alarms)))


def table(rates: np.ndarray) -> list[dict[str, float]]:
    """Points [N, 2] (imagined, real) by imagined success: their number and both means; without empty bins."""
    bins = np.clip(np.digitize(rates[:, 0], BINS) - 1, 0, len(BINS) - 2)
    return [
        {
            "from": BINS[i],
            "to": BINS[i + 1],
            "points": int((bins == i).sum()),
            "imagined": float(rates[bins == i, 0].mean()),
            "real": float(rates[bins == i, 1].mean()),
        }
        for i in range(len(BINS) - 1)
        if (bins == i).any()
    ]


def _correlations(groups: Sequence[np.ndarray], *, centred: bool) -> dict[str, Any]:
    return {
        "points": sum(len(group) for group in groups),
        "pearson": intervals.of_groups(intervals.pearson, groups, centred=centred),
        "spearman": intervals.of_groups(intervals.spearman, groups, centred=centred),
    }


def ceiling(groups: Sequence[np.ndarray], episodes: np.ndarray) -> float:
    """The reliability of rates seen in so few episodes: what two independent measurements of them correlate at.

    The rates' variance within groups, less the binomial one, over the whole (Spearman 1904). The binomial variance is
    estimated without bias, and what it leaves is no less than 0, which a few points of equal rates exceed by chance.

    Args:
      groups: rates of the N points, whose means do not count.
      episodes: [N] behind each rate, 2 or more.

    Returns:
      0 to 1; NaN where no rate differs.
    """
    rates, freedom = np.concatenate(groups), len(episodes) - len(groups)
    squares = sum(float(np.square(group - group.mean()).sum()) for group in groups)
    if freedom < 1 or squares < 1e-12:
        return float("nan")
    noise = float((rates * (1 - rates) / (episodes - 1)).mean())
    return max(0.0, 1 - noise / (squares / freedom))
