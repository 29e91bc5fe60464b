"""The batched environment: the pure functions of one table, vectorised and compiled once."""

import jax
import jax.numpy as jnp

from wam_jax import specs
from wam_jax.environments.playtable import dynamics, experts, rendering, starts
from wam_jax.environments.playtable.dynamics import State
from wam_jax.types import Array, Observation


def observe(state: State) -> Observation:
    """Renders and reads one table; vectorise with `jax.vmap`."""
    rgb_static, rgb_gripper = rendering.render(state)
    return Observation(rgb_static, rgb_gripper, dynamics.robot_obs(state), dynamics.scene_obs(state))


def step_chunk(state: State, actions: Array) -> tuple[State, Observation]:
    """Executes the actions of one decision, [C, 7], on one table; observations are [C, ...]."""

    def one(state, action):
        state = dynamics.step(state, action)
        return state, observe(state)

    return jax.lax.scan(one, state, actions)


_reset_to_task = jax.jit(jax.vmap(starts.reset_to_task))
_observe = jax.jit(jax.vmap(observe))
_step_chunk = jax.jit(jax.vmap(step_chunk))
_start_expert = jax.jit(jax.vmap(experts.start))
_act_expert = jax.jit(jax.vmap(experts.act))


class Playtable:
    """Implements `interface.Environment`; a state is a batched `dynamics.State`."""

    name = "playtable"

    def reset_to_task(self, rng: Array, task: Array, number: Array | None = None) -> State:
        """See `interface.Environment`.

        Raises:
          ValueError: a task is not an index into `specs.TASKS`.
        """
        task = jnp.asarray(task, jnp.int32)
        if task.ndim != 1 or bool(jnp.any((task < 0) | (task >= len(specs.TASKS)))):
            raise ValueError(f"task must be [B] with entries 0..{len(specs.TASKS) - 1}, got {task}")
        number = jnp.arange(len(task)) if number is None else jnp.asarray(number)
        return _reset_to_task(jax.random.split(rng, int(number.max()) + 1)[number], task)

    def observe(self, state: State, drawn: Array | None = None) -> Observation:
        """See `interface.Environment`; everything is drawn."""
        del drawn
        return _observe(state)

    def step_chunk(self, state: State, actions: Array, drawn: Array | None = None) -> tuple[State, Observation]:
        """See `interface.Environment`; everything is drawn.

        Raises:
          ValueError: the actions are not [B, C, 7].
        """
        del drawn
        if actions.ndim != 3 or actions.shape[-1] != specs.ACTION_DIM:
            raise ValueError(f"actions must be [B, C, {specs.ACTION_DIM}], got {actions.shape}")
        return _step_chunk(state, actions)

    def start_expert(self, rngs: Array, task: Array, state: State) -> experts.Expert:
        """See `interface.Environment`."""
        return _start_expert(rngs, task, state)

    def act_expert(self, expert: experts.Expert, state: State) -> tuple[experts.Expert, Array]:
        """See `interface.Environment`."""
        return _act_expert(expert, state)
