"""Rollouts of any policy in any environment, and their success by CALVIN's oracle."""

import functools
from collections.abc import Callable, Sequence
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

    def start(self, task: Any, state: Any, observation: Observation, rngs: Array) -> Any:
        """Returns the carry after the first observation.

        Args:
          task: int32 [B], index into specs.TASKS; for policies that follow language (`chains`) B sentences.
          state: the environment's, for scripted experts.
          observation: [B, ...].
          rngs: B keys, one an episode, here and below.
        """
        ...

    def act(self, carry: Any, state: Any, rngs: Array) -> tuple[Any, Array]:
        """Returns the carry and the next chunk of actions, [B, C, 7]."""
        ...

    def observe(self, carry: Any, action: Array, observation: Observation, rngs: Array) -> Any:
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
    numbers: Sequence[int],
    max_steps: int,
    films: int = 0,
    ended: Callable[[int, bool, int], None] = lambda number, success, steps: None,
) -> Rollout:
    """Runs B episodes of one task in parallel, until all are solved or the limit is reached.

    Pictures are drawn for a policy that sees them, of episodes that are not solved yet, and for films. An episode is a
    function of `rng` and its number (up to the rounding of products that depends on B), whatever runs beside it.

    Args:
      environment: where to run.
      policy: what to run.
      task: one of specs.TASKS.
      rng: key; the starts depend on it and the numbers alone, so every policy meets the same ones.
      numbers: of the B episodes, 0 or more.
      max_steps: control steps (1/30 s) an episode may take; a chunk that begins before the limit is executed whole.
      films: F, the first episodes of these are filmed.
      ended: is told number, success and steps of each episode as it ends.

    Returns:
      success and length of every episode, and the films.
    """
    filmed = np.arange(len(numbers)) < films
    tasks, state, observation, carry, policy_rngs = _start(environment, policy, task, rng, numbers, filmed)
    scene_start = np.asarray(observation.scene_obs)
    first_success, solved = np.full(len(numbers), max_steps), np.zeros(len(numbers), bool)
    frames = [jax.tree.map(lambda x: np.asarray(x[:films, None]), observation)]
    actions = [np.zeros((min(films, len(numbers)), 0, specs.ACTION_DIM), np.float32)]
    step = decision = 0
    while step < max_steps and (filmed | ~solved).any():
        decision += 1
        act_rngs, observe_rngs = decision_rngs(policy_rngs, decision)
        carry, chunk = policy.act(carry, state, act_rngs)
        is_last = step + chunk.shape[1] >= max_steps  # nothing is decided after it, so the policy sees none of it
        drawn = filmed | (~solved & (policy.sees and not is_last))
        state, observations = environment.step_chunk(state, chunk, drawn)
        if not is_last:
            carry = policy.observe(carry, chunk, observations, observe_rngs)
        for index, scene in enumerate(np.asarray(observations.scene_obs).swapaxes(0, 1)):
            hit = np.asarray(specs.task_success(tasks, scene_start, scene)) & (step + index < max_steps) & ~solved
            first_success = np.where(hit, step + index + 1, first_success)
            solved |= hit
            for row in np.flatnonzero(hit).tolist():
                ended(numbers[row], True, int(first_success[row]))
        step += chunk.shape[1]
        frames.append(jax.tree.map(lambda x: np.asarray(x[:films]), observations))
        actions.append(np.asarray(chunk[:films]))
    for row in np.flatnonzero(~solved).tolist():
        ended(numbers[row], False, max_steps)
    video = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *frames)
    return Rollout(solved, first_success, video, np.concatenate(actions, axis=1))


def start_latents(
    environment: Environment, policy: Policy, task: str, rng: Array, *, numbers: Sequence[int]
) -> LatentState:
    """The latents from which `rollout` with the same arguments begins, [B, ...]: for the same starts in imagination."""
    return _start(environment, policy, task, rng, numbers, np.zeros(len(numbers), bool))[3]


def _start(
    environment: Environment, policy: Policy, task: str, rng: Array, numbers: Sequence[int], filmed: np.ndarray
) -> tuple:
    """Begins B episodes; returns tasks, state, observation, the policy's carry, and B keys for the rest."""
    start_rng, policy_rng = jax.random.split(rng)
    tasks = jnp.full(len(numbers), specs.task_index(task), jnp.int32)
    state = environment.reset_to_task(start_rng, tasks, np.asarray(numbers))
    observation = environment.observe(state, filmed | policy.sees)
    policy_rngs = episode_rngs(policy_rng, np.asarray(numbers))
    carry = policy.start(tasks, state, observation, decision_rngs(policy_rngs, 0)[0])
    return tasks, state, observation, carry, policy_rngs


@jax.jit
def episode_rngs(rng: Array, numbers: Array) -> Array:
    """A key for each of B episodes, by its number."""
    return jax.vmap(functools.partial(jax.random.fold_in, rng))(numbers)


@jax.jit
def decision_rngs(rngs: Array, decision: int) -> tuple[Array, Array]:
    """Two keys for each of B episodes, [B] and [B]."""
    pairs = jax.vmap(lambda rng: jax.random.split(jax.random.fold_in(rng, decision)))(rngs)
    return pairs[:, 0], pairs[:, 1]


class ScriptedPolicy:
    """An environment's scripted expert as a policy: one action at a time, closed loop on the environment's state."""

    sees = False

    def __init__(self, environment: Environment):
        self._environment = environment

    def start(self, task: Any, state: Any, observation: Observation, rngs: Array) -> Any:
        """Plans from the state."""
        del observation
        return self._environment.start_expert(rngs, task, state)

    def act(self, carry: Any, state: Any, rngs: Array) -> tuple[Any, Array]:
        """The next action, as a chunk of one."""
        del rngs
        carry, action = self._environment.act_expert(carry, state)
        return carry, action[:, None]

    def observe(self, carry: Any, action: Array, observation: Observation, rngs: Array) -> Any:
        """Needs no observation."""
        del action, observation, rngs
        return carry


class LatentPolicy:
    """A diffusion policy on the filtered state of a world model: what BC and PPO train."""

    sees = True

    def __init__(self, model: WorldModel, world_model_params: Params, policy: PolicyParams, settings: Any):
        """Settings are those of the diffusion policy, `config.policy` with PPO's number of fine-tuned steps."""
        self._world_model_params = world_model_params
        self._policy = policy
        self._start, self._act, self._observe = _latent_policy_functions(model, settings)

    def start(self, task: Array, state: Any, observation: Observation, rngs: Array) -> LatentState:
        """Filters the first frame."""
        del task, state
        return self._start(self._world_model_params, observation, rngs)

    def act(self, carry: LatentState, state: Any, rngs: Array) -> tuple[LatentState, Array]:
        """Samples a chunk."""
        del state
        return carry, self._act(self._policy, carry, rngs)

    def observe(self, carry: LatentState, action: Array, observation: Observation, rngs: Array) -> LatentState:
        """Filters every frame of the chunk."""
        return self._observe(self._world_model_params, carry, action, observation, rngs)


@functools.lru_cache(maxsize=8)
def _latent_policy_functions(model: WorldModel, settings: Any) -> tuple[Callable, Callable, Callable]:
    """Compiled once for every policy of one size; each episode draws from its own key."""

    def start(params, observation, rngs):
        neutral = jnp.asarray(specs.NEUTRAL_ACTION)[None]

        def one(observation, rng):
            return world_model.observe_step(
                model, params, world_model.initial(model, params, 1), neutral, observation, rng
            )

        return _each(one)(observation, rng=rngs)

    def act(policy, latent, rngs):
        def one(latent, rng):
            feature = diffusion_policy.features(latent, settings=settings)
            return diffusion_policy.executed(diffusion_policy.act(policy, feature, rng, settings=settings))

        return _each(one)(latent, rng=rngs)

    def observe(params, latent, action, observation, rngs):
        observe_step = _each(functools.partial(world_model.observe_step, model, params))

        def step(latent, inputs):
            action, observation, rngs = inputs
            return observe_step(latent, action, observation, rng=rngs), None

        time_major = jax.tree.map(lambda x: x.swapaxes(0, 1), (action, observation))
        step_rngs = jax.vmap(lambda rng: jax.random.split(rng, action.shape[1]), out_axes=1)(rngs)
        return jax.lax.scan(step, latent, (*time_major, step_rngs))[0]

    return jax.jit(start), jax.jit(act), jax.jit(observe)


def _each(function: Callable) -> Callable:
    """From a function of batches [B, ...] and one key to one with a key for each of the B, passed as `rng`."""

    def one(inputs, rng):
        result = function(*jax.tree.map(lambda x: x[None], inputs), rng)
        return jax.tree.map(lambda x: x[0], result)

    return lambda *inputs, rng: jax.vmap(one)(inputs, rng)
