"""Rollouts for PPO in an environment instead of imagination: DPPO's own setting (Ren et al. 2024), on filtered latents.

Policy, features, horizon, explored noise and the reward of 1 at success are those of imagination.py. What differs: the
frames are real and filtered by the frozen world model, success is the oracle's, and every step costs the environment
one. It separates what the latents allow from what imagined dynamics do to PPO.

Keys of `settings`: horizon 18 (H).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wam_jax import diffusion_policy, evaluation, specs
from wam_jax.diffusion_policy import PolicyParams
from wam_jax.environments.interface import Environment
from wam_jax.imagination import Rollout
from wam_jax.types import Array, LatentState, Params
from wam_jax.world_model import WorldModel


def collect(
    environment: Environment,
    policy: PolicyParams,
    task: str,
    rng: Array,
    *,
    num_rollouts: int,
    model: WorldModel,
    world_model_params: Params,
    policy_settings: Any,
    settings: Any,
) -> Rollout:
    """Runs the policy as PPO collects, for H decisions in B episodes from random starts; on the host.

    Args:
      environment: where to run.
      policy: base and fine-tuned parameters.
      task: one of specs.TASKS.
      rng: key of starts and noise.
      num_rollouts: B, of all devices together.
      model, world_model_params: filter the frames.
      policy_settings: see diffusion_policy.
      settings: see the module.

    Returns:
      numpy arrays. Once all episodes have ended nothing is executed any more; what is left of H is marked invalid.
    """
    start_rng, policy_rng, explore_rng = jax.random.split(rng, 3)
    tasks = jnp.full(num_rollouts, specs.task_index(task), jnp.int32)
    numbers = np.arange(num_rollouts)
    state = environment.reset_to_task(start_rng, tasks, numbers)
    observation = environment.observe(state)
    scene_start = np.asarray(observation.scene_obs)
    filter_policy = evaluation.LatentPolicy(model, world_model_params, policy, policy_settings)
    keys = evaluation.episode_rngs(policy_rng, numbers)
    latent = filter_policy.start(tasks, state, observation, evaluation.decision_rngs(keys, 0)[0])
    explore = _explore(policy_settings)
    done = np.zeros(num_rollouts, bool)
    decisions: list[Rollout] = []
    for decision in range(settings.horizon):
        feature, chunk, chain = explore(policy, latent, jax.random.fold_in(explore_rng, decision))
        state, observations = environment.step_chunk(state, chunk, ~done)
        latent = filter_policy.observe(latent, chunk, observations, evaluation.decision_rngs(keys, decision + 1)[1])
        scenes = np.asarray(observations.scene_obs).swapaxes(0, 1)
        success = np.any([np.asarray(specs.task_success(tasks, scene_start, scene)) for scene in scenes], axis=0)
        terminated = success & ~done
        truncated = (decision == settings.horizon - 1) & ~success & ~done
        reward = terminated.astype(np.float32)
        decisions.append(Rollout(feature, feature, chain, reward, terminated, truncated, ~done))
        done = done | success
        if done.all():
            break
    nothing = jax.tree.map(np.zeros_like, jax.device_get(decisions[-1]))
    decisions += [nothing] * (settings.horizon - len(decisions))
    episodes = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(decisions))
    return episodes.replace(last_feature=np.asarray(diffusion_policy.features(latent, settings=policy_settings)))


@functools.lru_cache(maxsize=8)
def _explore(policy_settings: Any):
    @jax.jit
    def explore(policy: PolicyParams, latent: LatentState, rng: Array) -> tuple[Array, Array, Array]:
        feature = diffusion_policy.features(latent, settings=policy_settings)
        chunk, chain = diffusion_policy.sample(policy, feature, rng, explore=True, settings=policy_settings)
        return feature, diffusion_policy.executed(chunk), chain

    return explore


def split(episodes: Rollout, num_devices: int) -> Rollout:
    """Gives each device its share of the episodes: leaves [H, B, ...] become [D, H, B / D, ...]."""

    def of_devices(x: Array, axis: int) -> np.ndarray:
        return np.stack(np.split(np.asarray(x), num_devices, axis=axis))

    last_feature = of_devices(episodes.last_feature, 0)
    return jax.tree.map(lambda x: of_devices(x, 1), episodes.replace(last_feature=episodes.feature)).replace(
        last_feature=last_feature
    )
