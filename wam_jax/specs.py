"""Observation, action and task specification shared by environments, data and models.

All constants are CALVIN's (calvin_env, scene D), so a policy, a dataset or a table row means the same thing in
CALVIN and in Playtable.
"""

import jax.numpy as jnp
import numpy as np

from wam_jax.types import Array

CONTROL_HZ = 30
IMAGE_SIZE = 64  # pixels, height and width of both cameras
ROBOT_OBS_DIM = 15
SCENE_OBS_DIM = 24
PROPRIOCEPTION_DIM = 18
ACTION_DIM = 7

POSITION_SCALE = 0.02  # m of target motion per unit of action[0:3]
EULER_SCALE = 0.05  # rad of target rotation per unit of action[3:6]
GRIPPER_OPEN, GRIPPER_CLOSE = 1.0, -1.0
NEUTRAL_ACTION = np.array([0, 0, 0, 0, 0, 0, GRIPPER_OPEN], np.float32)  # the "action" before an episode's first frame

# Indices into scene_obs.
SLIDER, DRAWER, BUTTON, SWITCH, LIGHTBULB, LED = range(6)
BLOCKS = NUM_MECHANISMS = 6  # three blocks of (xyz, Euler xyz) follow

TASKS = (
    "open_drawer",
    "close_drawer",
    "move_slider_left",
    "move_slider_right",
    "turn_on_lightbulb",
    "turn_off_lightbulb",
    "turn_on_led",
    "turn_off_led",
)
INSTRUCTIONS = {
    "open_drawer": "pull the handle to open the drawer",
    "close_drawer": "push the handle to close the drawer",
    "move_slider_left": "push the sliding door to the left side",
    "move_slider_right": "push the sliding door to the right side",
    "turn_on_lightbulb": "use the switch to turn on the light bulb",
    "turn_off_lightbulb": "use the switch to turn off the light bulb",
    "turn_on_led": "press the button to turn on the led light",
    "turn_off_led": "press the button to turn off the led light",
}
MAX_EPISODE_STEPS = 72  # 18 decisions of 4 actions: the papers' evaluation limit

# The oracle: a task is solved when `sign * (now - start)` of its scene_obs entry exceeds the threshold. Lights are 0 or
# 1, so 0.5 means "was off and is on" (or the reverse).
_ORACLE_INDEX = np.array([DRAWER, DRAWER, SLIDER, SLIDER, LIGHTBULB, LIGHTBULB, LED, LED])
_ORACLE_SIGN = np.array([1, -1, 1, -1, 1, -1, 1, -1], np.float32)
_ORACLE_THRESHOLD = np.array([0.12, 0.12, 0.15, 0.15, 0.5, 0.5, 0.5, 0.5], np.float32)

# Physical ranges that proprioception is scaled with to [-1, 1]; constants, not data statistics, so that a model reads
# every dataset of this robot alike. (DiWA uses per-dataset min-max to [0, 1], LUMOS z-scores.)
_POSITION_LOW = np.array([-0.4, -0.6, 0.3], np.float32)
_POSITION_HIGH = np.array([0.5, 0.2, 0.8], np.float32)
_MAX_OPENING = 0.08
_JOINT_LOW = np.array([-2.9, -1.77, -2.9, -3.08, -2.9, -0.02, -2.9], np.float32)
_JOINT_HIGH = np.array([2.9, 1.77, 2.9, -0.06, 2.9, 3.76, 2.9], np.float32)
_MECHANISM_HIGH = np.array([0.28, 0.22, 0.02, 0.088, 1, 1], np.float32)  # end stops (m), and lights that are on; from 0


def task_index(task: str) -> int:
    """Returns the index of `task` in TASKS.

    Raises:
      ValueError: the task is not one of TASKS.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
    return TASKS.index(task)


def task_mechanism(task: str) -> int:
    """The entry of scene_obs that the oracle looks at for a task."""
    return int(_ORACLE_INDEX[task_index(task)])


def task_success(task: Array, scene_obs_start: Array, scene_obs: Array) -> Array:
    """Says whether CALVIN's oracle finds a task solved; works on numpy and JAX arrays alike.

    Args:
      task: int [...], index into TASKS.
      scene_obs_start: [..., 24], scene state when the task began; its first six entries will do.
      scene_obs: likewise, scene state now.

    Returns:
      bool [...].
    """
    change = scene_obs - scene_obs_start
    xp = change.__array_namespace__()  # numpy stays numpy: JAX would compile anew for every number of steps
    index = xp.broadcast_to(xp.asarray(_ORACLE_INDEX)[task], change.shape[:-1])
    moved = xp.take_along_axis(change, index[..., None], axis=-1)[..., 0]
    return xp.asarray(_ORACLE_SIGN)[task] * moved > xp.asarray(_ORACLE_THRESHOLD)[task]


def euler_to_matrix(euler: Array) -> Array:
    """Rotation matrix of fixed-axis XYZ Euler angles.

    Args:
      euler: [..., 3], roll, pitch, yaw in rad.

    Returns:
      [..., 3, 3], R = Rz(yaw) Ry(pitch) Rx(roll).
    """
    cos_r, cos_p, cos_y = (jnp.cos(euler[..., i]) for i in range(3))
    sin_r, sin_p, sin_y = (jnp.sin(euler[..., i]) for i in range(3))
    rows = (
        (cos_y * cos_p, cos_y * sin_p * sin_r - sin_y * cos_r, cos_y * sin_p * cos_r + sin_y * sin_r),
        (sin_y * cos_p, sin_y * sin_p * sin_r + cos_y * cos_r, sin_y * sin_p * cos_r - cos_y * sin_r),
        (-sin_p, cos_p * sin_r, cos_p * cos_r),
    )
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def proprioception(robot_obs: Array) -> Array:
    """What the network sees of `robot_obs`: 15 entries become 18, each within about [-1, 1].

    The three Euler angles become the 6-D rotation representation (first two rows of the rotation matrix; Zhou et al.
    2019), since roll sits at +-pi and flips its sign from frame to frame.

    Args:
      robot_obs: [..., 15], metres and radians.

    Returns:
      float32 [..., 18]: position 3, rotation 6, opening 1, joints 7, gripper command 1.
    """

    def scale(x, low, high):
        return 2 * (x - low) / (high - low) - 1

    robot_obs = jnp.asarray(robot_obs, jnp.float32)
    rotation = euler_to_matrix(robot_obs[..., 3:6])[..., :2, :]
    return jnp.concatenate(
        [
            scale(robot_obs[..., 0:3], _POSITION_LOW, _POSITION_HIGH),
            rotation.reshape(*rotation.shape[:-2], 6),
            scale(robot_obs[..., 6:7], 0.0, _MAX_OPENING),
            scale(robot_obs[..., 7:14], _JOINT_LOW, _JOINT_HIGH),
            robot_obs[..., 14:15],
        ],
        axis=-1,
    )


def scaled_mechanisms(scene_obs: Array) -> Array:
    """What the hybrid world model decodes of `scene_obs` [..., 24]: its mechanisms, float32 [..., 6] in [-1, 1]."""
    return 2 * jnp.asarray(scene_obs, jnp.float32)[..., :NUM_MECHANISMS] / _MECHANISM_HIGH - 1


def unscaled_mechanisms(scaled: Array) -> Array:
    """The inverse: [..., 6] to the first six entries of `scene_obs`, metres, and 0 to 1 for lights."""
    return (scaled + 1) / 2 * _MECHANISM_HIGH
