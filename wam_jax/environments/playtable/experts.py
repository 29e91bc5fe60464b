"""Scripted experts for the eight tasks: waypoints planned once from the state, then followed in closed loop.

Everything is a pure function of one table, so that experts run inside scans, vectorise over episodes and serve as a
policy in evaluation:

    expert = experts.start(rng, task, state)
    expert, action = experts.act(expert, state)      # once a step

Metres and radians; a speed is in units of the action.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from wam_jax import specs
from wam_jax.environments.playtable import draws, dynamics, geometry
from wam_jax.environments.playtable.dynamics import State
from wam_jax.types import Array

MAX_WAYPOINTS = 9
PLAN_DRAWS = 4  # random numbers of a plan
RETREATS = 2  # the first waypoints of every plan leave the last place, whatever the task
TRAVEL_HEIGHT = 0.60
MIN_SPEED, MAX_SPEED = 0.6, 0.95

_DOWN = np.array([np.pi, 0.0, np.pi / 2], np.float32)  # straight down, fingers open along x
_TILT = np.array([np.pi + 0.6, 0.0, 0.0], np.float32)  # leaning towards the panel, fingers open along y
_TURN_TOLERANCE = 0.06
_OPEN, _CLOSE = specs.GRIPPER_OPEN, specs.GRIPPER_CLOSE


@flax.struct.dataclass
class Plan:
    """Waypoints of one attempt, padded to W = MAX_WAYPOINTS by repeating the last."""

    position: Array  # float32 [W, 3]
    euler: Array  # float32 [W, 3]
    gripper: Array  # float32 [W], +1 or -1
    tolerance: Array  # float32 [W], largest distance by component at which it counts as reached
    measured: Array  # bool [W], whether the measured hand and the orientation must be there too, not the target only
    speed: Array  # float32 [W], largest component of the position action
    cap: Array  # int32 [W], steps after which it is given up
    hold: Array  # int32 [W], steps to stay after it is reached
    length: Array  # int32 [], number of waypoints


@flax.struct.dataclass
class Progress:
    """How far a plan is followed."""

    index: Array  # int32 [], current waypoint; equals the plan's length when it is finished
    age: Array  # int32 [], steps since the current waypoint began
    held: Array  # int32 [], steps since it was reached


@flax.struct.dataclass
class Expert:
    """A plan and how far it is followed: the state of an expert policy."""

    plan: Plan
    progress: Progress


def start(rng: Array, task: Array, state: State) -> Expert:
    """An expert for a task, at its beginning.

    Args:
      rng: one key, draws the variation between demonstrations.
      task: int32 [], index into `specs.TASKS`; may be traced.
      state: one table, as it is now.
    """
    return Expert(plan(jax.random.uniform(rng, (PLAN_DRAWS,)), task, state), first_progress())


def act(expert: Expert, state: State) -> tuple[Expert, Array]:
    """The next action of an expert: float32 [7]; after the end of its plan it stays at the last waypoint."""
    action, progress = follow(expert.plan, expert.progress, state)
    return expert.replace(progress=progress), action


def first_progress() -> Progress:
    """The beginning of any plan."""
    return Progress(index=jnp.int32(0), age=jnp.int32(0), held=jnp.int32(0))


def is_finished(plan: Plan, progress: Progress) -> Array:
    """Whether the last waypoint is done: bool []."""
    return progress.index >= plan.length


def follow(plan: Plan, progress: Progress, state: State) -> tuple[Array, Progress]:
    """Moves the target towards the current waypoint, and on to the next when that is reached or given up.

    Args:
      plan, progress: what to do and how far it is done.
      state: one table; its target closes the follower's loop, and its measured hand where a waypoint says so.

    Returns:
      action float32 [7], and the progress after it.
    """
    at = jnp.minimum(progress.index, plan.length - 1)
    reached = _is_reached(plan, at, state)
    done = (reached & (progress.held >= plan.hold[at])) | (progress.age >= plan.cap[at])
    index = jnp.minimum(progress.index + done, plan.length)
    progress = Progress(
        index=index,
        age=jnp.where(done, 0, progress.age + 1),
        held=jnp.where(done, 0, progress.held + reached),
    )
    at = jnp.minimum(index, plan.length - 1)
    shift = (plan.position[at] - state.target_position) / specs.POSITION_SCALE
    shift = shift * jnp.minimum(1.0, plan.speed[at] / (jnp.max(jnp.abs(shift)) + 1e-6))
    turn = dynamics.wrap(plan.euler[at] - state.target_euler) / specs.EULER_SCALE
    turn = turn * jnp.minimum(1.0, 1.0 / (jnp.max(jnp.abs(turn)) + 1e-6))
    return jnp.concatenate([shift, turn, plan.gripper[at][None]]), progress


def plan(draw: Array, task: Array, state: State) -> Plan:
    """Plans a task from the state as it is now.

    Args:
      draw: float32 [PLAN_DRAWS], uniform in [0, 1): the variation between demonstrations.
      task, state: as of `start`.
    """
    speed = draws.between(MIN_SPEED, MAX_SPEED, draw[0])
    jitter = draws.between(-1.0, 1.0, draw[1:])
    plans = [_stack(_leave(state) + planner(state, jitter)) for planner in _PLANNERS]
    chosen = jax.tree.map(lambda *x: _stack_arrays(x)[task], *plans)
    # The retreats keep the orientation and then turn on the way to the task's first waypoint.
    euler = chosen.euler.at[:RETREATS].set(jnp.stack([state.target_euler, chosen.euler[RETREATS]]))
    return chosen.replace(euler=euler, speed=jnp.where(chosen.speed > 0, chosen.speed, speed))


def _is_reached(plan: Plan, at: Array, state: State) -> Array:
    position, tolerance = plan.position[at], plan.tolerance[at]
    at_target = jnp.max(jnp.abs(position - state.target_position)) < tolerance
    at_hand = 0.8 * jnp.max(jnp.abs(position - state.position)) < tolerance
    turned = jnp.max(jnp.abs(dynamics.wrap(plan.euler[at] - state.target_euler))) < _TURN_TOLERANCE
    return at_target & (~plan.measured[at] | (at_hand & turned))


class _Waypoint(NamedTuple):
    """One waypoint, see `Plan`; only the position depends on the state. Speed 0 stands for the plan's own."""

    position: tuple
    euler: np.ndarray
    gripper: float
    tolerance: float
    measured: bool
    speed: float
    cap: int
    hold: int


def _waypoint(x, y, z, euler=_DOWN, gripper=_CLOSE, tolerance=0.012, measured=True, speed=0.0, cap=60, hold=0):
    return _Waypoint((x, y, z), euler, gripper, tolerance, measured, speed, cap, hold)


def _stack_arrays(arrays: Sequence) -> Array:
    """Stacks arrays, on the host where all of them are constants: there is less to compile then."""
    return jnp.asarray(np.stack(arrays)) if all(isinstance(x, np.ndarray) for x in arrays) else jnp.stack(arrays)


def _stack(waypoints: list[_Waypoint]) -> Plan:
    padded = waypoints + [waypoints[-1]] * (MAX_WAYPOINTS - len(waypoints))
    position = jnp.stack([jnp.asarray(x, jnp.float32) for point in padded for x in point.position])
    column = lambda name, dtype: np.array([getattr(point, name) for point in padded], dtype)  # noqa: E731
    return Plan(
        position=position.reshape(MAX_WAYPOINTS, 3),
        euler=column("euler", np.float32),
        gripper=column("gripper", np.float32),
        tolerance=column("tolerance", np.float32),
        measured=column("measured", bool),
        speed=column("speed", np.float32),
        cap=column("cap", np.int32),
        hold=column("hold", np.int32),
        length=np.array(len(waypoints), np.int32),
    )


def _leave(state: State) -> list[_Waypoint]:
    """Up out of the drawer, then up and away from the panel; `plan` sets the orientation.

    Starts from the target, which may be wound up, not from the measured hand.
    """
    x, y, z = (state.target_position[i] for i in range(3))
    is_low = z < 0.42
    up = _waypoint(x, y, jnp.where(is_low, 0.50, z), tolerance=0.03, measured=False)
    back = jnp.where(y > -0.10, y - 0.05, y)
    away = _waypoint(x, back, jnp.maximum(z, TRAVEL_HEIGHT), tolerance=0.03, measured=False)
    return [up, away]


def _open_drawer(state: State, jitter: Array) -> list[_Waypoint]:
    """Closed fingers go down between the front and its bar, and pull."""
    x, y = 0.18 + 0.05 * jitter[0], -0.212 - state.joints[geometry.DRAWER]
    return [
        _waypoint(x, y, 0.52, tolerance=0.02),
        _waypoint(x, y, 0.42),
        _waypoint(x, y, 0.365, tolerance=0.008, speed=0.7),
        _waypoint(x, -0.462 + 0.02 * jitter[1], 0.365, tolerance=0.01, measured=False, speed=0.7, hold=4),
        _waypoint(x, -0.422, 0.50, tolerance=0.03),
    ]


def _close_drawer(state: State, jitter: Array) -> list[_Waypoint]:
    """Closed fingers push the bar from outside."""
    x, y = 0.18 + 0.05 * jitter[0], -0.30 - state.joints[geometry.DRAWER]
    return [
        _waypoint(x, y, 0.52, tolerance=0.02),
        _waypoint(x, y, 0.37),
        _waypoint(x, -0.245 + 0.01 * jitter[1], 0.365, tolerance=0.01, measured=False, speed=0.7, hold=4),
        _waypoint(x, -0.30, 0.50, tolerance=0.03),
    ]


def _move_slider(state: State, jitter: Array, side: float, end: float) -> list[_Waypoint]:
    """Closed fingers push the handle from the side `side` (+1 its right, so that it goes left) to x = `end`."""
    x, z = 0.04 + 0.062 * side - state.joints[geometry.SLIDER], 0.515 + 0.01 * jitter[0]
    return [
        _waypoint(x + 0.01 * side, -0.10, 0.60, tolerance=0.02),
        _waypoint(x + 0.01 * side, -0.08, z, tolerance=0.015),
        _waypoint(x + 0.005 * side, -0.012, z, cap=25),
        _waypoint(end, -0.012, z, tolerance=0.01, measured=False, speed=0.7, hold=5),
        _waypoint(end + 0.035 * side, -0.09, z + 0.02, tolerance=0.03),
    ]


def _lift_switch(state: State, jitter: Array) -> list[_Waypoint]:
    """Open fingers go around the bar, close on it, and lift it along its slope."""
    x, w = 0.30 + 0.01 * jitter[0], state.joints[geometry.SWITCH]
    y, z = 0.022 + 0.5 * w, 0.522 + 0.866 * w
    way = partial(_waypoint, euler=_TILT)
    return [
        way(x, -0.14, 0.60, gripper=_OPEN, tolerance=0.02),
        way(x, y - 0.052, z + 0.043, gripper=_OPEN),
        way(x, y, z, gripper=_OPEN, tolerance=0.01, speed=0.6, cap=30, hold=2),
        way(x, y, z, tolerance=0.02, hold=8),
        way(x, 0.070, 0.604, tolerance=0.01, measured=False, speed=0.5, hold=6),
        way(x, 0.070, 0.604, gripper=_OPEN, tolerance=0.02, hold=4, cap=12),
        way(x, -0.06, 0.64, gripper=_OPEN, tolerance=0.03),
    ]


def _lower_switch(state: State, jitter: Array) -> list[_Waypoint]:
    """Closed fingers push the raised bar down from above."""
    x, w = 0.30 + 0.015 * jitter[0], state.joints[geometry.SWITCH]
    way = partial(_waypoint, euler=_TILT)
    return [
        way(x, -0.14, 0.64, tolerance=0.02),
        way(x, -0.02 + 0.5 * w, 0.58 + 0.866 * w, tolerance=0.015, cap=40),
        way(x, 0.03 + 0.5 * w, 0.575 + 0.866 * w, cap=30),
        way(x, 0.015, 0.515, measured=False, speed=0.5, hold=5),
        way(x, -0.06, 0.60, tolerance=0.03),
    ]


def _press_button(state: State, jitter: Array) -> list[_Waypoint]:
    """Closed fingers press the button down against its spring and leave upwards."""
    del state
    x, y = -0.12 + 0.008 * jitter[0], -0.12 + 0.008 * jitter[1]
    return [
        _waypoint(x, y, 0.58, tolerance=0.02),
        _waypoint(x, y, 0.52),
        _waypoint(x, y, 0.462, tolerance=0.006, measured=False, speed=0.6, cap=25, hold=4),
        _waypoint(x, y, 0.54),
    ]


_PLANNERS = (
    _open_drawer,
    _close_drawer,
    partial(_move_slider, side=1.0, end=-0.225),
    partial(_move_slider, side=-1.0, end=0.025),
    _lift_switch,
    _lower_switch,
    _press_button,
    _press_button,
)
