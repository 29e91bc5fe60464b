"""Starts of episodes: random scenes as CALVIN's evaluation draws them, scenes for a task, and given states."""

import jax
import jax.numpy as jnp
import numpy as np

from wam_jax import specs
from wam_jax.environments.playtable import draws, geometry
from wam_jax.environments.playtable.dynamics import State
from wam_jax.types import Array

# Free space in which the hand starts; roll and yaw are about pi and pi / 2.
_HAND_LOW = np.array([-0.18, -0.30, 0.53, np.pi - 0.15, -0.15, np.pi / 2 - 0.22], np.float32)
_HAND_HIGH = np.array([0.28, -0.10, 0.65, np.pi + 0.15, 0.15, np.pi / 2 + 0.22], np.float32)

# Where blocks start: x and y ranges of the table, the cabinet's left and its right side, and shares of the three.
_AREAS_LOW = np.array([[0.0, -0.13], [-0.31, 0.098], [-0.04, 0.098]], np.float32)
_AREAS_HIGH = np.array([[0.35, -0.05], [-0.16, 0.112], [0.12, 0.112]], np.float32)
_AREA_CHOICE = (0.5, 0.75)
_BLOCK_GAP = 0.095  # between centres: no two blocks touch whatever their yaw
_BLOCK_TRIES = 16

# Range of a task's own joint in a start from which it is possible and unsolved: joint, low, high.
_DRAWER, _SLIDER, _SWITCH = geometry.DRAWER, geometry.SLIDER, geometry.SWITCH
_TASK_JOINT = np.array([_DRAWER, _DRAWER, _SLIDER, _SLIDER, _SWITCH, _SWITCH, -1, -1])
_TASK_LOW = np.array([0.0, 0.16, 0.0, 0.20, 0.0, 0.062, 0.0, 0.0], np.float32)
_TASK_HIGH = np.array([0.06, 0.22, 0.08, 0.28, 0.02, 0.088, 0.0, 0.0], np.float32)
_TASK_END = np.array([0.0, 0.22, 0.0, 0.28, 0.0, 0.088, 0.0, 0.0], np.float32)  # the end stop among them
_TASK_LED = np.array([-1, -1, -1, -1, -1, -1, 0, 1], np.float32)  # -1: any
_END_SHARE = 0.35


def reset(rng: Array) -> State:
    """Draws a random scene: fixtures at an end stop or between, blocks anywhere legal, the hand in free space.

    Args:
      rng: one key.
    """
    places = (geometry.NUM_BLOCKS, _BLOCK_TRIES, 3)
    draw = draws.uniform(rng, hand=(6,), open=(), led=(), where=(4,), value=(4,), places=places, yaw=(3,))
    pose = draws.between(_HAND_LOW, _HAND_HIGH, draw["hand"])
    joints = _random_joints(draw["where"], draw["value"])
    blocks = _random_blocks(draw["places"], draws.between(-np.pi, np.pi, draw["yaw"]))
    return _make_state(pose[:3], pose[3:], draw["open"] < 0.5, joints, draw["led"] < 0.5, blocks)


def reset_to_task(rng: Array, task: Array) -> State:
    """Draws a random scene in which a task is possible and not yet solved.

    Args:
      rng: one key.
      task: int32 [], index into `specs.TASKS`; may be traced.
    """
    scene_rng, joint_rng = jax.random.split(rng)
    state = reset(scene_rng)
    draw = draws.uniform(joint_rng, at_end=(), value=())
    value = draws.between(jnp.asarray(_TASK_LOW)[task], jnp.asarray(_TASK_HIGH)[task], draw["value"])
    value = jnp.where(draw["at_end"] < _END_SHARE, jnp.asarray(_TASK_END)[task], value)
    joints = jnp.where(jnp.arange(geometry.NUM_JOINTS) == jnp.asarray(_TASK_JOINT)[task], value, state.joints)
    led = jnp.asarray(_TASK_LED)[task]
    return state.replace(
        joints=joints,
        lightbulb=(joints[_SWITCH] > geometry.SWITCH_ON).astype(jnp.float32),
        led=jnp.where(led < 0, state.led, led),
    )


def reset_to(robot_obs: Array, scene_obs: Array) -> State:
    """Sets a state from observations, for example CALVIN's evaluation starts.

    The bulb follows the switch, blocks lie flat, and each block keeps x, y and yaw only.

    Args:
      robot_obs: float32 [15].
      scene_obs: float32 [24].
    """
    blocks = scene_obs[specs.BLOCKS :].reshape(geometry.NUM_BLOCKS, 6)
    euler = robot_obs[3:6].at[0].set(robot_obs[3] % (2 * np.pi))
    joints = jnp.clip(scene_obs[: geometry.NUM_JOINTS], 0, geometry.JOINT_LIMITS)
    state = _make_state(
        robot_obs[:3], euler, robot_obs[14] > 0, joints, scene_obs[specs.LED], blocks[:, jnp.array([0, 1, 5])]
    )
    return state.replace(opening=jnp.clip(robot_obs[6], 0, geometry.MAX_OPENING))


def _make_state(position, euler, is_open, joints, led, blocks) -> State:
    """A state at rest: the target is the measured pose."""
    as_float = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    return State(
        position=as_float(position),
        euler=as_float(euler),
        target_position=as_float(position),
        target_euler=as_float(euler),
        opening=geometry.MAX_OPENING * as_float(is_open),
        gripper_command=jnp.where(is_open, specs.GRIPPER_OPEN, specs.GRIPPER_CLOSE).astype(jnp.float32),
        joints=as_float(joints),
        lightbulb=(joints[_SWITCH] > geometry.SWITCH_ON).astype(jnp.float32),
        led=as_float(led),
        blocks=as_float(blocks),
        button_down=joints[geometry.BUTTON] > geometry.BUTTON_PRESSED,
        held=jnp.int32(-1),
    )


def _random_joints(where: Array, value: Array) -> Array:
    """Slider, drawer and switch at either end stop (30 % each) or anywhere between; the button is up."""
    value = jnp.where(where < 0.3, 0.0, jnp.where(where < 0.6, 1.0, value))
    return (value * geometry.JOINT_LIMITS).at[geometry.BUTTON].set(0.0)


def _random_blocks(places: Array, yaw: Array) -> Array:
    """Places the blocks one by one, each at the first of its drawn places that is free.

    Args:
      places: [3, tries, 3], draws for area, x and y.
      yaw: [3], rad.

    Returns:
      [3, 3], x, y, yaw.
    """
    area = draws.choice(_AREA_CHOICE, places[..., 0])
    places = draws.between(jnp.asarray(_AREAS_LOW)[area], jnp.asarray(_AREAS_HIGH)[area], places[..., 1:])
    centers = jnp.full((geometry.NUM_BLOCKS, 2), 10.0)  # far away until placed
    for i in range(geometry.NUM_BLOCKS):
        gaps = jnp.linalg.norm(places[i][:, None] - centers[None], axis=-1)
        centers = centers.at[i].set(places[i, jnp.argmax(jnp.min(gaps, axis=-1) > _BLOCK_GAP)])
    return jnp.concatenate([centers, yaw[:, None]], axis=-1)
