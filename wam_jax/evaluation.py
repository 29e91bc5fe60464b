"""Rollouts of any policy in any environment, and their success by CALVIN's oracle."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from wam_jax import diffusion_policy, specs, world_model
from wam_jax.diffusion_policy import PolicyParams
from wam_jax.environments.interface import Environment
from wam_jax.types import Array, LatentState, Observation, Params
from wam_jax.world_model import WorldModel


class Policy(Protocol):
    """Chooses chunks of actions for B episodes; its own memory travels as `carry`."""

    sees: bool  # whether it looks at pictures; for one that does not, none are drawn

    def start(self, task: Any, state: Any, observation: Observation, rng: Array) -> Any:
        """Returns the carry after the first observation.

        Args:
          task: int32 [B], index into specs.TASKS; for policies that follow language (`chains`) B sentences.
          state: the environment's, for scripted experts.
          observation: [B, ...].
          rng: one key.
        """
        ...

    def act(self, carry: Any, state: Any, rng: Array) -> tuple[Any, Array]:
        """Returns the carry and the next chunk of actions, [B, C, 7]."""
        ...

    def observe(self, carry: Any, action: Array, observation: Observation, rng: Array) -> Any:
        """Returns the carry after a chunk [B, C, 7] was executed and observed [B, C, ...]."""
        ...


@flax.struct.dataclass
class Rollout:
    """What B episodes came to."""

    success: np.ndarray  # bool [B], whether the oracle fired within the limit
    steps: np.ndarray  # int32 [B], steps until it fired first; the limit where it did not
    video: Observation  # of the first F episodes, to the limit, [F, T + 1, ...]
    actions: np.ndarray  # likewise, [F, T, 7]


def rollout(
    environment: Environment,
    policy: Policy,
    task: str,
    rng: Array,
    *,
    num_episodes: int,
    max_steps: int,
    first: int = 0,
    films: int = 0,
) -> Rollout:
    """Runs B episodes of one task in parallel, until all are solved or the limit is reached.

    Pictures are drawn for a policy that sees them, of episodes that are not solved yet, and for films.

    Args:
      environment: where to run.
      policy: what to run.
      task: one of specs.TASKS.
      rng: key; the starts depend on it alone, so every policy meets the same ones.
      num_episodes: B.
      max_steps: control steps (1/30 s) an episode may take; a chunk that begins before the limit is executed whole.
      first: number of the first episode, where a larger evaluation runs in batches; its start follows from it.
      films: F, episodes that are filmed.

    Returns:
      success and length of every episode, and the films.
    """
    filmed = np.arange(num_episodes) < films
    tasks, state, observation, carry, policy_rng = _start(environment, policy, task, rng, first, filmed)
    scene_start = np.asarray(observation.scene_obs)
    first_success, solved = np.full(num_episodes, max_steps), np.zeros(num_episodes, bool)
    frames = [jax.tree.map(lambda x: np.asarray(x[:films, None]), observation)]
    actions = [np.zeros((min(films, num_episodes), 0, specs.ACTION_DIM), np.float32)]
    step = decision = 0
    while step < max_steps and (filmed | ~solved).any():
        decision += 1
        act_rng, observe_rng = jax.random.split(jax.random.fold_in(policy_rng, decision))
        carry, chunk = policy.act(carry, state, act_rng)
        is_last = step + chunk.shape[1] >= max_steps  # nothing is decided after it, so the policy sees none of it
        drawn = filmed | (~solved & (policy.sees and not is_last))
        state, observations = environment.step_chunk(state, chunk, drawn)
        if not is_last:
            carry = policy.observe(carry, chunk, observations, observe_rng)
        for index, scene in enumerate(np.asarray(observations.scene_obs).swapaxes(0, 1)):
            hit = np.asarray(specs.task_success(tasks, scene_start, scene)) & (step + index < max_steps)
            first_success = np.where(hit & ~solved, step + index + 1, first_success)
            solved |= hit
        step += chunk.shape[1]
        frames.append(jax.tree.map(lambda x: np.asarray(x[:films]), observations))
        actions.append(np.asarray(chunk[:films]))
    video = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *frames)
    return Rollout(solved, first_success, video, np.concatenate(actions, axis=1))


def start_latents(
    environment: Environment, policy: Policy, task: str, rng: Array, *, num_episodes: int, first: int = 0
) -> LatentState:
    """The latents from which `rollout` with the same arguments begins, [B, ...]: for the same starts in imagination."""
    return _start(environment, policy, task, rng, first, np.zeros(num_episodes, bool))[3]


def _start(environment: Environment, policy: Policy, task: str, rng: Array, first: int, filmed: np.ndarray) -> tuple:
    """Begins B episodes; returns tasks, state, observation, the policy's carry, and a key of its own for the rest."""
    keys = jax.random.split(rng, first + 2)  # the starts' one, and one for the policy of each batch
    start_rng, policy_rng = keys[0], keys[first + 1]
    tasks = jnp.full(len(filmed), specs.task_index(task), jnp.int32)
    state = environment.reset_to_task(start_rng, tasks, first)
    observation = environment.observe(state, filmed | policy.sees)
    carry = policy.start(tasks, state, observation, jax.random.fold_in(policy_rng, 0))
    return tasks, state, observation, carry, policy_rng


class ScriptedPolicy:
    """An environment's scripted expert as a policy: one action at a time, closed loop on the environment's state."""

    sees = False

    def __init__(self, environment: Environment):
        self._environment = environment

    def start(self, task: Array, state: Any, observation: Observation, rng: Array) -> Any:
        """Plans from the state."""
        del observation
        return self._environment.start_expert(rng, task, state)

    def act(self, carry: Any, state: Any, rng: Array) -> tuple[Any, Array]:
        """The next action, as a chunk of one."""
        del rng
        carry, action = self._environment.act_expert(carry, state)
        return carry, action[:, None]

    def observe(self, carry: Any, action: Array, observation: Observation, rng: Array) -> Any:
        """Needs no observation."""
        del action, observation, rng
        return carry


class LatentPolicy:
    """A diffusion policy on the filtered state of a world model: what BC and PPO train."""

    sees = True

    def __init__(self, model: WorldModel, world_model_params: Params, policy: PolicyParams, settings: Any):
        """Settings are those of the diffusion policy, `config.policy` with PPO's number of fine-tuned steps."""
        self._world_model_params = world_model_params
        self._policy = policy
        self._start, self._act, self._observe = _latent_policy_functions(model, settings)

    def start(self, task: Array, state: Any, observation: Observation, rng: Array) -> LatentState:
        """Filters the first frame."""
        del task, state
        return self._start(self._world_model_params, observation, rng)

    def act(self, carry: LatentState, state: Any, rng: Array) -> tuple[LatentState, Array]:
        """Samples a chunk."""
        del state
        return carry, self._act(self._policy, carry, rng)

    def observe(self, carry: LatentState, action: Array, observation: Observation, rng: Array) -> LatentState:
        """Filters every frame of the chunk."""
        return self._observe(self._world_model_params, carry, action, observation, rng)


@functools.lru_cache(maxsize=8)
def _latent_policy_functions(model: WorldModel, settings: Any) -> tuple[Callable, Callable, Callable]:
    """Compiled once for every policy of one size."""

    def start(params, observation, rng):
        batch_size = observation.robot_obs.shape[0]
        neutral = jnp.broadcast_to(jnp.asarray(specs.NEUTRAL_ACTION), (batch_size, specs.ACTION_DIM))
        latent = world_model.initial(model, params, batch_size)
        return world_model.observe_step(model, params, latent, neutral, observation, rng)

    def act(policy, latent, rng):
        chunk = diffusion_policy.act(
            policy, diffusion_policy.features(latent, settings=settings), rng, settings=settings
        )
        return diffusion_policy.executed(chunk)

    def observe(params, latent, action, observation, rng):
        def step(latent, inputs):
            return world_model.observe_step(model, params, latent, *inputs), None

        time_major = jax.tree.map(lambda x: x.swapaxes(0, 1), (action, observation))
        rngs = jax.random.split(rng, action.shape[1])
        return jax.lax.scan(step, latent, (*time_major, rngs))[0]

    return jax.jit(start), jax.jit(act), jax.jit(observe)
