"""Real episodes of a policy seen again: by the reward rule, and by imagination under the same actions."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from wam_jax import evaluation, intervals, probes, reward_rules, specs
from wam_jax.environments.interface import Environment
from wam_jax.probes import Probe, Quantity
from wam_jax.reward_rules import Verdict
from wam_jax.types import Array, Params, StepBatch

PARTING = 3.0  # cm between the hand as decoded from imagination and from the filter, which see with the same probe
_NEVER = np.iinfo(np.int32).max


def record(
    environment: Environment,
    policy: evaluation.Policy,
    task: str,
    rng: Array,
    *,
    batches: Sequence[Sequence[int]],
    max_steps: int,
) -> Iterator[StepBatch]:
    """Runs the episodes of an evaluation and keeps all their frames, to the limit, after success too.

    Args:
      environment, policy, task, rng, max_steps: as of `evaluation.rollout`.
      batches: numbers of the episodes that run at once.

    Yields:
      for each batch its steps [B, max_steps + 1, ...]; the last action leads nowhere, `reward` is the oracle's verdict.
    """
    for numbers in batches:
        films = len(numbers)
        result = evaluation.rollout(environment, policy, task, rng, numbers=numbers, max_steps=max_steps, films=films)
        video, action = result.video, np.asarray(result.actions)
        shape = action.shape[0], action.shape[1] + 1
        index = np.full(shape, specs.task_index(task), np.int32)
        solved = specs.task_success(index, video.scene_obs[:, :1], video.scene_obs)
        position = np.broadcast_to(np.arange(shape[1]), shape)
        last = np.broadcast_to(specs.NEUTRAL_ACTION, (shape[0], 1, specs.ACTION_DIM))
        yield StepBatch(
            observation=video,
            action=np.concatenate([action, last], axis=1),
            is_first=position == 0,
            is_last=position == shape[1] - 1,
            task=index,
            reward=np.asarray(solved, np.float32),
        )


def fires(params: Params, features: Array, *, verdict: Verdict, consecutive: int) -> np.ndarray:
    """The reward rule over whole episodes: features [B, T + 1, state_dim], from the first frame on, to bool [B, T]."""
    frames = jnp.swapaxes(features, 0, 1)
    count = jnp.zeros(len(features), jnp.int32)
    fired, _ = reward_rules.in_a_row(params, frames[1:], frames[0], count, verdict=verdict, consecutive=consecutive)
    return np.asarray(fired).T


def first_true(flags: np.ndarray) -> np.ndarray:
    """The first step, from 1, at which each row of bool [B, T] is true; a huge number where none is."""
    return np.where(flags.any(axis=1), flags.argmax(axis=1) + 1, _NEVER)


def classifier_quality(
    params: Params, features: Array, solved: np.ndarray, *, verdict: Verdict, consecutive: int
) -> dict[str, Any]:
    """How the classifier, or the oracle on decoded states, judges real frames: one by one and as the reward rule.

    Args:
      params: that the verdict reads.
      features: [B, T + 1, state_dim], filtered, from the first frame on.
      solved: bool [B, T], the oracle's verdict after each of T actions.
      verdict, consecutive: of the reward rule, see reward_rules.

    Returns:
      `frames`: precision, recall and share of successes, of all frames; `rule`: what the episodes come to. A false
      alarm is a stretch of frames that the rule calls solved and that begins on one which is not. `delay` is the
      median of the steps from an episode's first success to the rule's first fire from there on.
    """
    frames = jnp.swapaxes(features, 0, 1)
    positive = np.asarray(verdict(params, frames[1:], frames[0])).T
    fired = fires(params, features, verdict=verdict, consecutive=consecutive)
    real, rule = first_true(solved), first_true(fired)
    begins = fired & ~np.concatenate([np.zeros_like(fired[:, :1]), fired[:, :-1]], axis=1)
    alarms = (begins & ~solved).sum(axis=1)
    low, high = intervals.of_mean(alarms[:, None])
    succeeded, has_fired = real != _NEVER, rule != _NEVER
    first_is_true = np.array(
        [has and solved[row, min(rule[row], solved.shape[1]) - 1] for row, has in enumerate(has_fired)]
    )
    after = first_true(fired & (np.arange(1, fired.shape[1] + 1) >= real[:, None]))
    delays = (after - real)[succeeded & (after != _NEVER)]
    return {
        "episodes": len(solved),
        "frames": {
            "precision": _share(solved & positive, positive),
            "recall": _share(solved & positive, solved),
            "success_share": float(solved.mean()),
        },
        "rule": {
            "real_successes": int(succeeded.sum()),
            "fires": int(has_fired.sum()),
            "precision": _counted(first_is_true, has_fired),
            "recall": _counted(has_fired, succeeded),
            "fires_on_failures": _counted(has_fired, ~succeeded),
            "episodes_with_false_alarms": _counted(alarms > 0, np.ones(len(alarms), bool)),
            "false_alarms_per_episode": {"value": float(alarms.mean()), "low": float(low[0]), "high": float(high[0])},
            "delay": float(np.median(delays)) if len(delays) else None,
        },
    }


def _share(hits: np.ndarray, of: np.ndarray) -> float | None:
    return float(hits.sum() / of.sum()) if of.any() else None


def _counted(hits: np.ndarray, of: np.ndarray) -> dict[str, Any]:
    """How many of the chosen episodes, with the share and its Wilson interval."""
    count, total = int((hits & of).sum()), int(of.sum())
    if not total:
        return {"count": 0, "of": 0, "share": None, "low": None, "high": None}
    low, high = intervals.wilson(count, total)
    return {"count": count, "of": total, "share": count / total, "low": low, "high": high}


@dataclasses.dataclass(frozen=True)
class Replay:
    """T steps of B real episodes, and the same actions imagined from their first frame."""

    imagined: np.ndarray  # [B, T, state_dim], features of imagination after each action
    filtered: np.ndarray  # [B, T, state_dim], of the filter that sees the frames
    state: np.ndarray  # float64 [B, T, K], what was true (probes.STATE)
    solved: np.ndarray  # bool [B, T], the oracle's verdict
    imagined_fires: np.ndarray  # bool [B, T], the reward rule on `imagined`
    filtered_fires: np.ndarray  # bool [B, T], on `filtered`
    recorded_robot_fires: np.ndarray | None  # bool [B, T], on imagination whose robot moves as recorded, where it can


def divergence(replay: Replay, probe: Probe, mechanism: Quantity, *, consecutive: int, slack: int) -> dict[str, Any]:
    """Where imagination and the environment part, for the episodes that succeeded and those that failed.

    Args:
      replay: the episodes.
      probe: decodes probes.STATE.
      mechanism: what the task is about.
      consecutive: frames in a row that the reward rule waits for.
      slack: steps that the rule may fire earlier or later than that without disagreeing.

    Returns:
      for "success" and "failure": errors by step while the episode runs, the step at which the hands part for good, the
      first step at which rule and oracle disagree, and how many the rule calls solved: on the real frames, imagined,
      and imagined with the robot moving as recorded (None where there is none). Besides, the successes of all episodes
      by oracle, by the rule on the real frames, and by the rule on imagined ones.
    """
    real, rule = first_true(replay.solved), first_true(replay.imagined_fires)
    succeeded = real != _NEVER
    groups = {"success": np.flatnonzero(succeeded), "failure": np.flatnonzero(~succeeded)}
    kinds, steps = disagreement(real, rule, consecutive=consecutive, slack=slack)
    decoded = {"imagined": probe(replay.imagined), "filtered": probe(replay.filtered)}
    running = np.arange(1, replay.solved.shape[1] + 1) <= np.where(succeeded, real, _NEVER)[:, None]
    hand = probes.quantity("hand")
    errors = {
        name: {
            kind: np.where(running, np.sqrt(probes.squared_error(x, replay.state, [quantity])[..., 0]), np.nan)
            for kind, x in decoded.items()
        }
        for name, quantity in (("hand", hand), ("mechanism", mechanism))
    }
    apart = np.sqrt(probes.squared_error(decoded["imagined"], decoded["filtered"], [hand])[..., 0])
    parted = first_true(_for_good(apart > PARTING, running))
    return {
        "episodes": len(real),
        "real": int(succeeded.sum()),
        "rule_on_real_frames": int(replay.filtered_fires.any(axis=1).sum()),
        "rule_on_imagination": int(replay.imagined_fires.any(axis=1).sum()),
        "mechanism": mechanism.name,
        "unit": mechanism.unit,
        "groups": {
            group: {
                "episodes": len(rows),
                "running": running[rows].sum(axis=0).tolist(),
                "errors": {
                    name: {k: _curve(x[rows]) for k, x in kinds_of.items()} for name, kinds_of in errors.items()
                },
                "parting": _first_steps(parted[rows]),
                "verdicts": {kind: int((kinds[rows] == kind).sum()) for kind in VERDICTS},
                "disagreement": _first_steps(steps[rows]),
                "rule_on_real_frames": _solved(replay.filtered_fires, rows),
                "rule_on_imagination": _solved(replay.imagined_fires, rows),
                "rule_with_recorded_robot": _solved(replay.recorded_robot_fires, rows),
            }
            for group, rows in groups.items()
            if len(rows)
        },
    }


def _solved(fires: np.ndarray | None, rows: np.ndarray) -> int | None:
    return None if fires is None else int(fires[rows].any(axis=1).sum())


# The rule on imagination beside the oracle: made up: it alone fires; missed: it never does; early, late: by more than
# the slack.
VERDICTS = ("agree", "early", "late", "missed", "made up")


def disagreement(real: np.ndarray, rule: np.ndarray, *, consecutive: int, slack: int) -> tuple[np.ndarray, np.ndarray]:
    """The verdict on each episode, and the first step at which rule and oracle disagree.

    Args:
      real: first step of success [B], from `first_true`.
      rule: first step at which the rule fires [B], likewise.
      consecutive: the rule fires so many steps less one after success at best.
      slack: steps that do not count.

    Returns:
      one of VERDICTS for each [B], and int [B], huge where they agree.
    """
    due = np.where(real == _NEVER, _NEVER, np.minimum(real, _NEVER - consecutive) + consecutive - 1)
    apart = rule.astype(np.int64) - due.astype(np.int64)
    conditions = [(real == _NEVER) & (rule == _NEVER), real == _NEVER, rule == _NEVER, apart < -slack, apart > slack]
    kinds = np.select(conditions, ["agree", "made up", "missed", "early", "late"], "agree")
    return kinds, np.where(kinds == "agree", _NEVER, np.minimum(real, rule))


def _for_good(flags: np.ndarray, running: np.ndarray) -> np.ndarray:
    """Where a flag holds from that step on as long as the episode runs; bool [B, T]."""
    kept = np.logical_and.accumulate((flags | ~running)[:, ::-1], axis=1)[:, ::-1]
    return kept & running


def _curve(errors: np.ndarray) -> dict[str, list[float]]:
    low, high = intervals.of_mean(errors)
    number = np.isfinite(errors).sum(axis=0)
    mean = np.where(number > 0, np.nansum(errors, axis=0) / np.maximum(number, 1), np.nan)
    return {"mean": mean.tolist(), "low": low.tolist(), "high": high.tolist()}


def _first_steps(steps: np.ndarray) -> dict[str, Any]:
    """How many episodes have such a step, and the median over those."""
    known = steps[steps != _NEVER]
    return {"episodes": len(known), "of": len(steps), "median_step": float(np.median(known)) if len(known) else None}
