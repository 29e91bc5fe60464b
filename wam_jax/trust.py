"""Where imagination can be trusted, judged from recordings alone: no step of the environment.

A recorded attempt is imagined under its own actions. Where it comes to the end that was recorded, success or failure,
the model knows what matters there; elsewhere PPO would be rewarded for what does not happen.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wam_jax import diffusion_policy, latents, specs
from wam_jax.imagination import RewardRule
from wam_jax.types import Array, LatentState, Params, StepBatch
from wam_jax.world_model import WorldModel

_BATCH = 32  # attempts that are judged at once
HOLD = 12  # steps without motion that are imagined after a recording's last: what comes late still comes


class Verdicts(NamedTuple):
    """The ends of M attempts, bool [M] each."""

    recorded: np.ndarray  # whether the oracle found them solved
    imagined: np.ndarray  # whether the reward rule finds imagined latents solved


def judge(
    model: WorldModel,
    params: Params,
    encoded: Sequence[LatentState],
    episodes: Sequence[StepBatch],
    rng: Array,
    *,
    reward_rule: RewardRule,
    reward_params: Params,
    policy_settings: Any,
) -> Verdicts:
    """Imagines attempts under their own actions, from the posterior of their first step, and compares the ends.

    Recordings end soon after success; imagination then holds the hand still for HOLD steps more.

    Args:
      model, params: the frozen world model.
      encoded: posterior states [T, ...] of each attempt, T of 2 or more.
      episodes: the same attempts' steps.
      rng: key for z.
      reward_rule, reward_params: judge imagined latents as PPO's reward does.
      policy_settings: see diffusion_policy; what the reward rule sees of a latent is what the policy sees.
    """
    recorded = [bool((episode.reward[1:] > 0.5).any()) for episode in episodes]
    held_latents, held = zip(*map(_hold_still, encoded, episodes), strict=True)
    imagined, _ = latents.imagine_episodes(model, params, held_latents, held, rng)
    rule = jax.jit(functools.partial(_fires, reward_rule, policy_settings))
    longest = max(len(latent.deterministic) for latent in imagined)
    found = []
    for first in range(0, len(imagined), _BATCH):
        rows = list(range(first, min(first + _BATCH, len(imagined))))
        rows += rows[-1:] * (_BATCH - len(rows))  # a full batch, so that one program serves all
        start, later = (
            jax.tree.map(lambda *x: np.stack(x), *part)
            for part in zip(
                *[(latents.latent_at(encoded[i], 0), latents.pad(imagined[i], longest)) for i in rows], strict=True
            )
        )
        fired = np.asarray(rule(reward_params, start, later))  # [T, B]
        found += [bool(fired[: len(imagined[i].deterministic), row].any()) for row, i in enumerate(rows)]
    return Verdicts(np.array(recorded, bool), np.array(found[: len(imagined)], bool))


def start_bank(
    model: WorldModel,
    params: Params,
    encoded: Sequence[LatentState],
    episodes: Sequence[StepBatch],
    rng: Array,
    first_step: int,
    last_step: int,
    **judging,
) -> tuple[LatentState | None, Verdicts]:
    """The latents of `latents.start_bank` from which imagination comes to the recorded end.

    Args:
      model, params, encoded, episodes, rng: as of `judge`.
      first_step, last_step: of each episode, where imagination may start; those without a step after it are left out.
      **judging: the rest of `judge`'s arguments.

    Returns:
      the bank, None where nothing is left; and the verdicts on all starts.
    """
    chosen, verdicts = [], []
    for step in range(first_step, last_step + 1):
        rows = [row for row, episode in enumerate(episodes) if len(episode.action) > step + 1]
        if not rows:
            break
        parts = [latents.latent_at(encoded[row], slice(step, None)) for row in rows]
        steps = [jax.tree.map(lambda x: x[step:], episodes[row]) for row in rows]  # noqa: B023 (used at once)
        found = judge(model, params, parts, steps, jax.random.fold_in(rng, step), **judging)
        agree = found.recorded == found.imagined
        chosen += [latents.latent_at(part, slice(0, 1)) for part, same in zip(parts, agree, strict=True) if same]
        verdicts.append(found)
    if not verdicts:
        return None, Verdicts(np.zeros(0, bool), np.zeros(0, bool))
    together = Verdicts(*(np.concatenate(x) for x in zip(*verdicts, strict=True)))
    return jax.tree.map(lambda *x: np.concatenate(x), *chosen) if chosen else None, together


def agreement(verdicts: Verdicts) -> dict[str, Any]:
    """How often imagination comes to the recorded end, of successes and of failures; None where there are none.

    `trust` is the smaller of the two that there are: a model that never succeeds, or always does, knows nothing. It is
    0 where no success was recorded.
    """

    def share(of: np.ndarray) -> float | None:
        return float((verdicts.imagined == verdicts.recorded)[of].mean()) if of.any() else None

    successes, failures = share(verdicts.recorded), share(~verdicts.recorded)
    return {
        "attempts": len(verdicts.recorded),
        "successes": int(verdicts.recorded.sum()),
        "successes_imagined": successes,
        "failures_imagined": failures,
        "trust": 0.0 if successes is None else min(successes, 1.0 if failures is None else failures),
    }


def _fires(
    reward_rule: RewardRule, policy_settings: Any, reward_params: Params, start: LatentState, later: LatentState
) -> Array:
    first, feature = (diffusion_policy.features(x, settings=policy_settings) for x in (start, later))
    count = jnp.zeros(len(first), jnp.int32)
    return reward_rule(reward_params, jnp.swapaxes(feature, 0, 1), first, count)[0]


def _hold_still(latent: LatentState, episode: StepBatch) -> tuple[LatentState, StepBatch]:
    """Both longer by HOLD steps, in which the hand stays and the fingers keep their last command."""
    length = len(episode.action) + HOLD
    still = np.zeros((HOLD, specs.ACTION_DIM), np.float32)
    still[:, -1] = episode.action[-1, -1]
    action = np.concatenate([episode.action, still])
    return latents.pad(latent, length), latents.pad(episode, length).replace(action=action)
