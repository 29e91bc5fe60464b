"""The learned environment, and rollouts of a diffusion policy in it: the Dream Diffusion MDP (DiWA, Celik et al. 2025).

A decision denoises a chunk of C actions; the frozen world model then takes C steps of its prior, and the reward rule
looks at each latent on the way (DiWA: only at the chunk's last). The reward of a decision is 1 where it brings success,
else 0. Every rollout is one episode of at most H decisions from a fresh start: success terminates it, the horizon
truncates it. After termination the world model runs on, for the sake of static shapes, and those decisions are marked
invalid. Nothing is reset on the way, so no trace can run from one episode into the next.

Keys of `settings` (the papers' values):
    num_rollouts 50 (B, per device), horizon 18 (H)
    resample_latent True: draws the start's z from its stored posterior instead of repeating the stored sample
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wam_jax import diffusion_policy
from wam_jax.networks import categorical
from wam_jax.types import Array, LatentState, Params

# (world_model_params, latent [B, ...], action [B, 7], rng) -> latent: one step of the prior, z sampled or expected.
ImagineStep = Callable[[Params, LatentState, Array, Array], LatentState]
# (reward_params, feature [C, B, state_dim], first feature of each episode [B, state_dim], count int32 [B]) -> (success
# bool [C, B], count): see reward_rules.
RewardRule = Callable[[Params, Array, Array, Array], tuple[Array, Array]]


@flax.struct.dataclass
class ImaginationInputs:
    """What imagination needs and training does not change."""

    start: LatentState  # [M, ...], bank of start latents (posteriors of real first frames); padded, as PolicyBank is
    num_starts: Array  # int32 [], the rows in front of the padding
    world_model_params: Params
    reward_params: Params  # of the success classifier, or whatever the reward rule reads
    base_policy_params: Params  # of the cloned policy (its moving average)


# For jax.vmap: what each of several tasks has of its own (0), and the world model that they share (None).
_AXES: dict[str, Any] = {
    **dict.fromkeys(("start", "num_starts", "reward_params", "base_policy_params"), 0),
    "world_model_params": None,
}
TASK_AXES = ImaginationInputs(**_AXES)


def stack_tasks(inputs: Sequence[ImaginationInputs]) -> ImaginationInputs:
    """Stacks the inputs of G tasks on the host, leaves [G, ...]; the world model is one for all, the first's."""

    def stack(name):
        return jax.tree.map(lambda *x: np.stack(x), *(getattr(task, name) for task in inputs))

    return inputs[0].replace(**{name: stack(name) for name, axis in _AXES.items() if axis == 0})


@flax.struct.dataclass
class ImaginedState:
    """B imagined episodes."""

    latent: LatentState  # [B, ...]
    first_feature: Array  # [B, state_dim], of the start, for the reward rule
    success_count: Array  # int32 [B], positive frames in a row, for the reward rule
    done: Array  # bool [B], terminated in an earlier decision
    decision: Array  # int32 [], decisions taken


@flax.struct.dataclass
class Rollout:
    """H decisions of B episodes; `valid` marks those that were taken before the episode ended."""

    feature: Array  # [H, B, state_dim], before the decision
    last_feature: Array  # [B, state_dim], after decision H
    chain: Array  # float32 [H, B, F+1, C, A], denoising chain of the decision
    reward: Array  # float32 [H, B], 0 or 1
    terminated: Array  # bool [H, B], success at this decision
    truncated: Array  # bool [H, B], the horizon ends the episode here, without success
    valid: Array  # bool [H, B]


def reset(start: LatentState, num_starts: Array, rng: Array, *, policy_settings: Any, settings: Any) -> ImaginedState:
    """Draws the first latent of each episode uniformly from a bank; none again before all have been drawn as often.

    Args:
      start: [M, ...], the bank.
      num_starts: int32 [], at least 1: its rows in front of the padding, which is never drawn.
      rng: one key.
      policy_settings, settings: see diffusion_policy and the module.
    """
    row_rng, latent_rng = jax.random.split(rng)
    size = start.deterministic.shape[0]
    place = jax.random.uniform(row_rng, (size,))  # of a row: the same whatever padding comes after it
    order = jnp.argsort(jnp.where(jnp.arange(size) < num_starts, place, jnp.inf))
    rows = order[jnp.arange(settings.num_rollouts) % num_starts]
    latent = jax.tree.map(lambda x: x[rows], start)
    if settings.resample_latent:
        stochastic = categorical.sample_one_hot(latent.logits, latent_rng).astype(latent.stochastic.dtype)
        latent = latent.replace(stochastic=stochastic)
    return ImaginedState(
        latent=latent,
        first_feature=diffusion_policy.features(latent, settings=policy_settings),
        success_count=jnp.zeros(settings.num_rollouts, jnp.int32),
        done=jnp.zeros(settings.num_rollouts, bool),
        decision=jnp.zeros((), jnp.int32),
    )


def step_chunk(
    state: ImaginedState,
    chunk: Array,
    rng: Array,
    inputs: ImaginationInputs,
    *,
    imagine_step: ImagineStep,
    reward_rule: RewardRule,
    policy_settings: Any,
    settings: Any,
) -> tuple[ImaginedState, Array, Array, Array]:
    """Executes one decision in every episode.

    Args:
      state: B episodes.
      chunk: float32 [B, C, A], in [-1, 1]; the gripper is thresholded as environments do.
      rng: one key.
      inputs: world model and reward parameters.
      imagine_step: one step of the world model's prior.
      reward_rule: judges the latents of a chunk.
      policy_settings: see diffusion_policy; what the reward rule sees of a latent is what the policy sees.
      settings: see the module.

    Returns:
      the next state; reward float32 [B]; terminated bool [B]; truncated bool [B]. All zero in episodes already done.
    """

    def body(latent, action_and_rng):
        stepped = imagine_step(inputs.world_model_params, latent, *action_and_rng)
        # The bank decides the dtypes: a scan's carry may not change them.
        latent = jax.tree.map(lambda new, old: new.astype(old.dtype), stepped, latent)
        return latent, diffusion_policy.features(latent, settings=policy_settings)

    actions = jnp.moveaxis(diffusion_policy.executed(chunk), 1, 0)
    latent, feature = lax.scan(body, state.latent, (actions, jax.random.split(rng, actions.shape[0])))
    solved, count = reward_rule(  # of a whole chunk at once
        inputs.reward_params, feature, state.first_feature, state.success_count
    )
    success = jnp.any(solved, axis=0)
    terminated = success & ~state.done
    truncated = (state.decision == settings.horizon - 1) & ~success & ~state.done
    next_state = state.replace(
        latent=latent, success_count=count, done=state.done | success, decision=state.decision + 1
    )
    return next_state, terminated.astype(jnp.float32), terminated, truncated


def rollout(
    policy: diffusion_policy.PolicyParams,
    inputs: ImaginationInputs,
    rng: Array,
    *,
    explore: bool,
    imagine_step: ImagineStep,
    reward_rule: RewardRule,
    policy_settings: Any,
    settings: Any,
) -> Rollout:
    """Runs the policy for H decisions in B episodes from fresh starts.

    Args:
      policy: base and fine-tuned parameters; they need not be `inputs.base_policy_params`.
      inputs: start latents, world model and reward parameters.
      rng: one key.
      explore: samples as PPO collects, otherwise as evaluation acts.
      imagine_step: one step of the world model's prior.
      reward_rule: judges the latents of a chunk.
      policy_settings: see diffusion_policy.
      settings: see the module.
    """

    def decide(state, rng):
        policy_rng, model_rng = jax.random.split(rng)
        feature = diffusion_policy.features(state.latent, settings=policy_settings)
        chunk, chain = diffusion_policy.sample(policy, feature, policy_rng, explore=explore, settings=policy_settings)
        next_state, reward, terminated, truncated = step_chunk(
            state, chunk, model_rng, inputs, imagine_step=imagine_step, reward_rule=reward_rule,
            policy_settings=policy_settings, settings=settings,
        )  # fmt: skip
        return next_state, (feature, chain, reward, terminated, truncated, ~state.done)

    policy = diffusion_policy.in_compute_dtype(policy, settings=policy_settings)
    reset_rng, decision_rng = jax.random.split(rng)
    state = reset(inputs.start, inputs.num_starts, reset_rng, policy_settings=policy_settings, settings=settings)
    last_state, decisions = lax.scan(decide, state, jax.random.split(decision_rng, settings.horizon))
    feature, chain, reward, terminated, truncated, valid = decisions
    last_feature = diffusion_policy.features(last_state.latent, settings=policy_settings)
    return Rollout(feature, last_feature, chain, reward, terminated, truncated, valid)


def success_rate(episodes: Rollout) -> Array:
    """Share of the episodes that ended in (imagined) success: float32 scalar."""
    return jnp.mean(jnp.any(episodes.terminated, axis=0))
