"""State of one table and its motion: a hand that follows a target pose, and parts that it moves only by touching them.

The hand is a set of spheres, everything else a set of boxes. The motion is quasi-static: in each of a few substeps the
hand moves a little towards its target, then overlaps are taken back one after another, the deepest first: by the
touched part, where its joint allows it, else by the hand. A part without contact stays where it is (the doors have
friction); only the button has a spring. A bar that both closed fingers press on from two sides is held until the
fingers open: it goes where the hand goes along its joint, and the hand can neither leave the joint's line nor turn.

Positions are in metres of the world frame, angles in radians, time in control steps of 1/30 s.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from wam_jax import specs
from wam_jax.environments.playtable import geometry
from wam_jax.types import Array

SUBSTEPS = 5
CONTACT_ROUNDS = 3  # overlaps taken back in each substep
FOLLOW = 0.6  # share of the distance to its target that the hand covers in a step: a lag of 13 mm at 20 mm per step
MAX_SPEED = 0.036  # m per step
MAX_TURN = 0.12  # rad per step, about each axis
OPENING_SPEED = 0.01  # m per step: eight steps from open to closed
MAX_OVERLAP = 0.0015  # m that may be left after a substep
MAX_PUSH = 0.012  # m that contacts may push the hand in a substep
BUTTON_SPRING = 0.01  # m per step that a free button rises
_MIN_LEVER = 0.5  # a contact moves a joint if the cosine between its normal and the joint's axis is larger
_PINCH = 0.6  # cosine between a finger's contact normal and the finger axis above which the finger presses
_NOT_HELD = -1

# The seven arm joints that robot_obs reports: Playtable has no arm, so they are an affine function of the hand's pose
# that equals CALVIN's arm at its initial pose and has its mean slopes around it, kept within the joints' ranges.
_INITIAL_POSE = np.array([0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585], np.float32)
_INITIAL_JOINTS = np.array([-1.218, 1.040, 2.120, -2.342, -0.870, 1.641, 0.553], np.float32)
_JOINT_SLOPES = np.array(  # rad per m and rad, rows are joints
    [
        [1.45, 2.81, 0.35, 0.53, 0.46, 0.10],
        [-0.44, -1.52, -0.66, 0.08, -0.79, 0.14],
        [-2.02, -1.34, 1.29, -0.48, -0.25, 0.02],
        [2.58, 1.66, 2.08, 0.78, 0.47, 0.02],
        [-0.77, 0.27, 1.28, 0.66, 0.12, -0.16],
        [-0.17, 0.82, -1.75, -0.52, -0.63, -0.12],
        [-1.59, 0.87, -0.47, -0.32, -0.01, -0.89],
    ],
    np.float32,
)
_JOINT_LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973], np.float32)
_JOINT_HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973], np.float32)

# Where a block's centre can be: on the table before the cabinet, or on the cabinet's floor behind the door.
_TABLE_AREA = np.array([[-0.40, -0.15], [0.40, -0.02]], np.float32)
_CABINET_AREA = np.array([[-0.32, 0.098], [0.13, 0.112]], np.float32)
_BLOCK_RADII = np.linalg.norm(geometry.BLOCK_HALF_SIZES[:, :2], axis=-1).astype(np.float32)

_FINGER_COUNT = len(geometry.FINGER_SPHERES)
_RADII = np.concatenate([np.full(2 * _FINGER_COUNT, geometry.FINGER_RADIUS), geometry.PALM_SPHERES[:, 3]])
_RADII = _RADII.astype(np.float32)
_BOX_JOINT = np.minimum(geometry.BOX_BODY, geometry.NUM_JOINTS)  # joint of each box, NUM_JOINTS where it has none
_BOX_AXIS = np.concatenate([geometry.JOINT_AXES, np.zeros((1, 3), np.float32)])[_BOX_JOINT]
_BAR_JOINT = np.full(len(geometry.BOX_BODY), _NOT_HELD)
for _joint, _box in geometry.BAR_OF_JOINT.items():
    _BAR_JOINT[_box] = _joint


@flax.struct.dataclass
class State:
    """State of one table; a batch has leading axes on every field."""

    position: Array  # float32 [3], measured tool centre point
    euler: Array  # float32 [3], measured roll, pitch, yaw; roll is kept around +pi, not wrapped
    target_position: Array  # float32 [3], what relative actions are added to; never clipped
    target_euler: Array  # float32 [3]
    opening: Array  # float32 [], inner distance of the fingers, 0 .. 0.08
    gripper_command: Array  # float32 [], last command, +1 open or -1 close
    joints: Array  # float32 [4], slider, drawer, button, switch, as in scene_obs
    lightbulb: Array  # float32 [], 0 or 1
    led: Array  # float32 [], 0 or 1
    blocks: Array  # float32 [3, 3], x, y, yaw of the red, blue and pink block
    button_down: Array  # bool [], whether the button was pressed at the end of the last step
    held: Array  # int32 [], joint whose bar is between the closed fingers, -1 for none


def step(state: State, action: Array) -> State:
    """Executes one relative action of 1/30 s.

    Args:
      state: one table.
      action: float32 [7]; position and Euler entries are in units of `specs.POSITION_SCALE` and `specs.EULER_SCALE`
        and move the target; the gripper opens where the last is > 0, else it closes.
    """
    state = state.replace(
        target_position=state.target_position + specs.POSITION_SCALE * action[:3],
        target_euler=state.target_euler + specs.EULER_SCALE * action[3:6],
        gripper_command=jnp.where(action[6] > 0, specs.GRIPPER_OPEN, jnp.float32(specs.GRIPPER_CLOSE)),
    )
    carry = (state, deepest_overlap(state), jnp.int32(0))
    return _lights(jax.lax.fori_loop(0, SUBSTEPS, lambda _, carry: _substep(*carry), carry)[0])


def _lights(state: State) -> State:
    """The bulb shows the switch; each new press of the button toggles the LED."""
    pressed = state.joints[geometry.BUTTON] > geometry.BUTTON_PRESSED
    toggled = pressed & ~state.button_down
    return state.replace(
        lightbulb=(state.joints[geometry.SWITCH] > geometry.SWITCH_ON).astype(jnp.float32),
        led=jnp.where(toggled, 1 - state.led, state.led),
        button_down=pressed,
    )


def _substep(state: State, depth: Array, jams: Array) -> tuple[State, Array, Array]:
    """Moves everything by one substep.

    Args:
      state: one table.
      depth: [], deepest overlap in it.
      jams: int32 [], how many substeps before this one were jammed in a row. After a jam the hand tries to shift only,
        then to turn only, then to move its fingers only, so that one blocked motion does not stop the others.

    Returns:
      the three after the substep.
    """
    state = state.replace(held=jnp.where(state.gripper_command > 0, _NOT_HELD, state.held))
    kind = jams % 4
    moved = _move_hand(state, (kind == 0) | (kind == 1), (kind == 0) | (kind == 2))
    moved = moved.replace(opening=jnp.where((kind == 0) | (kind == 3), _next_opening(state), state.opening))
    spring = jnp.where(jnp.arange(geometry.NUM_JOINTS) == geometry.BUTTON, BUTTON_SPRING / SUBSTEPS, 0.0)
    moved = moved.replace(joints=jnp.maximum(moved.joints - spring, 0.0))
    moved = _pinch(moved)
    free = jax.lax.fori_loop(0, CONTACT_ROUNDS, lambda _, s: _resolve_deepest(s), moved)
    # Where overlaps cannot be taken back the hand is jammed (turned into a corner, say, or holding a bar and pushed off
    # its joint's line by something else): nothing moves in this substep, and the next one tries less.
    new_depth = deepest_overlap(free)
    pushed = jnp.linalg.norm(free.position - moved.position)
    most = jnp.where(state.held >= 0, 1e-4, jnp.maximum(MAX_PUSH, 3 * depth))
    jammed = (new_depth > jnp.maximum(depth, MAX_OVERLAP)) | (pushed > most)
    after = jax.tree.map(lambda old, new: jnp.where(jammed, old, new), state, free)
    return after, jnp.where(jammed, depth, new_depth), jnp.where(jammed, jams + 1, 0)


def deepest_overlap(state: State) -> Array:
    """How far the hand is inside anything, in metres; negative where it touches nothing: []."""
    return jnp.max(_contact_table(state, 0, len(_RADII))[0])


def _move_hand(state: State, may_shift: Array, may_turn: Array) -> State:
    """Moves the hand towards its target; if it holds a bar, only along the bar's joint and with the bar."""
    share = 1 - (1 - FOLLOW) ** (1 / SUBSTEPS)
    goal = jnp.clip(state.target_position, geometry.POSITION_LOW, geometry.POSITION_HIGH)
    shift = share * (goal - state.position)
    shift = shift * jnp.minimum(1.0, MAX_SPEED / SUBSTEPS / (jnp.linalg.norm(shift) + 1e-9))
    shift = jnp.where(may_shift, shift, 0.0)
    turn_goal = jnp.clip(state.target_euler, geometry.EULER_LOW, geometry.EULER_HIGH)
    turn = jnp.clip(share * (turn_goal - state.euler), -MAX_TURN / SUBSTEPS, MAX_TURN / SUBSTEPS)

    is_held = jnp.arange(geometry.NUM_JOINTS) == state.held
    along = geometry.JOINT_AXES @ shift
    joints = jnp.where(is_held, jnp.clip(state.joints + along, 0, geometry.JOINT_LIMITS), state.joints)
    held_shift = (joints - state.joints) @ geometry.JOINT_AXES
    shift = jnp.where(state.held >= 0, held_shift, shift)
    turn = jnp.where(may_turn & (state.held < 0), turn, 0.0)
    return state.replace(position=state.position + shift, euler=state.euler + turn, joints=joints)


def _next_opening(state: State) -> Array:
    """Moves the fingers; they do not close further on a bar that they hold."""
    opening = state.opening + state.gripper_command * OPENING_SPEED / SUBSTEPS
    return jnp.where(state.held >= 0, state.opening, jnp.clip(opening, 0.0, geometry.MAX_OPENING))


def _hand_spheres(state: State) -> tuple[Array, Array]:
    """Centres of the hand's contact spheres (+y finger, -y finger, palm; [13, 3]) and the finger axis ([3])."""
    rotation = specs.euler_to_matrix(state.euler)
    side = state.opening / 2 + geometry.FINGER_RADIUS
    finger = jnp.stack([jnp.zeros(_FINGER_COUNT), jnp.ones(_FINGER_COUNT) * side, geometry.FINGER_SPHERES], axis=-1)
    mirror = np.array([1, -1, 1], np.float32)
    local = jnp.concatenate([finger, finger * mirror, geometry.PALM_SPHERES[:, :3]])
    return state.position + local @ rotation.T, rotation[:, 1]


def _box_centers(state: State) -> Array:
    """Centres of all boxes: [boxes, 3]."""
    joints = jnp.concatenate([state.joints, jnp.zeros(1)])
    shift = joints[_BOX_JOINT[: geometry.NUM_FIXED], None] * _BOX_AXIS[: geometry.NUM_FIXED]
    height = jnp.full((geometry.NUM_BLOCKS, 1), geometry.BLOCK_HEIGHT)
    blocks = jnp.concatenate([state.blocks[:, :2], height], axis=-1)
    return jnp.concatenate([geometry.FIXED_CENTER + shift, blocks])


def _box_rotations(state: State) -> Array:
    """Rotations, box to world, of all boxes: [boxes, 3, 3]."""
    yaw = state.blocks[:, 2]
    blocks = specs.euler_to_matrix(jnp.stack([0 * yaw, 0 * yaw, yaw], axis=-1))
    return jnp.concatenate([geometry.FIXED_ROTATION, blocks])


def _overlap(spheres: Array, radii: Array, centers: Array, rotations: Array, half_sizes: Array):
    """Overlap of spheres and boxes, whose leading axes broadcast; written by component so that it fuses into one loop.

    Args:
      spheres, radii: [..., 3] and [...].
      centers, rotations, half_sizes: [..., 3], [..., 3, 3] (box to world), [..., 3].

    Returns:
      depth [...], positive where they overlap, and the normal that frees the sphere, a list of three [...] in the
      box's frame.
    """
    offset = [spheres[..., i] - centers[..., i] for i in range(3)]
    local = [sum(offset[i] * rotations[..., i, j] for i in range(3)) for j in range(3)]
    outside = [jnp.abs(local[j]) - half_sizes[..., j] for j in range(3)]
    away = [jnp.maximum(x, 0) for x in outside]
    distance = jnp.sqrt(sum(x * x for x in away) + 1e-12)
    deepest = jnp.maximum(jnp.maximum(outside[0], outside[1]), outside[2])
    is_inside = deepest < 0
    size = [jnp.where(is_inside, x == deepest, a / distance) for x, a in zip(outside, away, strict=True)]
    normal = [jnp.where(x < 0, -s, s) for x, s in zip(local, size, strict=True)]
    return radii - jnp.where(is_inside, deepest, distance), normal


def _contact_table(state: State, first: int, last: int) -> tuple[Array, Array]:
    """Overlaps of the hand's spheres `first` to `last` with every box.

    Returns:
      depth [spheres, boxes], negative for the bar that is held, and the cosine between normal and finger axis.
    """
    spheres, finger_axis = _hand_spheres(state)
    centers, rotations = _box_centers(state), _box_rotations(state)
    spheres, radii = spheres[first:last, None], _RADII[first:last, None]
    depth, normal = _overlap(spheres, radii, centers, rotations, geometry.BOX_HALF_SIZE)
    axis = [sum(finger_axis[i] * rotations[:, i, j] for i in range(3)) for j in range(3)]
    lean = sum(n * a for n, a in zip(normal, axis, strict=True))
    own = (state.held == geometry.BOX_BODY) & (state.held >= 0)
    return jnp.where(own, -1.0, depth), lean


def _pinch(state: State) -> State:
    """Opens the fingers where they close on something from both sides; a bar between them is then held."""
    depth, lean = _contact_table(state, 0, 2 * _FINGER_COUNT)
    sign = np.repeat(np.array([1, -1], np.float32), _FINGER_COUNT)[:, None]
    pressed = jnp.where(lean * sign > _PINCH, depth, -1.0).reshape(2, _FINGER_COUNT, -1).max(axis=1)
    between = jnp.all(pressed > 0, axis=0)
    widen = jnp.max(jnp.where(between, jnp.sum(pressed, axis=0), 0.0))
    bar = jnp.max(jnp.where(between & (state.gripper_command < 0), _BAR_JOINT, _NOT_HELD))
    return state.replace(
        opening=jnp.clip(state.opening + widen, 0.0, geometry.MAX_OPENING),
        held=jnp.where(state.held >= 0, state.held, bar),
    )


def _resolve_deepest(state: State) -> State:
    """Takes back the deepest overlap: by the touched part as far as it can move, the rest by the hand."""
    table, _ = _contact_table(state, 0, len(_RADII))
    # First the box, then the sphere: an argmax over all pairs is not vectorised on CPUs and costs more than the table.
    box = jnp.argmax(jnp.max(table, axis=0))
    sphere = jnp.argmax(table[:, box])
    depth = jnp.maximum(table[sphere, box], 0.0)
    body = jnp.asarray(geometry.BOX_BODY)[box]
    rotation = _box_rotations(state)[box]
    half_size = jnp.asarray(geometry.BOX_HALF_SIZE)[box]
    _, normal = _overlap(_hand_spheres(state)[0][sphere], jnp.float32(0), _box_centers(state)[box], rotation, half_size)
    normal = rotation @ jnp.stack(normal)
    joints, rest = _push_joint(state.joints, body, normal, depth)
    blocks, rest = _push_block(state.blocks, body, normal, rest)
    return state.replace(joints=joints, blocks=blocks, position=state.position + rest * normal)


def _push_joint(joints: Array, body: Array, normal: Array, depth: Array) -> tuple[Array, Array]:
    """Moves the joint of `body` away from a contact; returns the joints and the overlap that is left."""
    lever = geometry.JOINT_AXES @ normal
    can_move = (jnp.arange(geometry.NUM_JOINTS) == body) & (jnp.abs(lever) > _MIN_LEVER)
    wanted = joints - jnp.where(can_move, depth / jnp.where(can_move, lever, 1.0), 0.0)
    moved = jnp.clip(wanted, 0, geometry.JOINT_LIMITS)
    return moved, depth + jnp.sum((moved - joints) * lever)


def _push_block(blocks: Array, body: Array, normal: Array, depth: Array) -> tuple[Array, Array]:
    """Slides block `body` away from a contact at its side, unless its area ends there or another block is there."""
    is_pushed = (jnp.arange(geometry.NUM_BLOCKS) + geometry.FIRST_BLOCK == body) & (jnp.abs(normal[2]) < _MIN_LEVER)
    center = blocks[:, :2]
    wanted = center - jnp.where(is_pushed[:, None], depth * normal[:2], 0.0)
    in_cabinet = (center[:, 1] > 0.04)[:, None]
    low = jnp.where(in_cabinet, _CABINET_AREA[0], _TABLE_AREA[0])
    high = jnp.where(in_cabinet, _CABINET_AREA[1], _TABLE_AREA[1])
    wanted = jnp.clip(wanted, low, high)

    def gaps(points):
        return jnp.linalg.norm(points[:, None] - center[None], axis=-1)

    near = gaps(wanted) < _BLOCK_RADII[:, None] + _BLOCK_RADII[None]
    crowded = jnp.any(near & (gaps(wanted) < gaps(center)) & ~jnp.eye(geometry.NUM_BLOCKS, dtype=bool), axis=-1)
    moved = jnp.where(crowded[:, None], center, wanted)
    freed = -jnp.sum((moved - center) * normal[:2])
    return blocks.at[:, :2].set(moved), jnp.maximum(depth - freed, 0.0)


def wrap(angle: Array) -> Array:
    """The same angle within -pi .. pi."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def robot_obs(state: State) -> Array:
    """Proprioception in CALVIN's layout: float32 [15], see `types.Observation`."""
    pose = jnp.concatenate([state.position, state.euler])
    arm = jnp.clip(_INITIAL_JOINTS + _JOINT_SLOPES @ (pose - _INITIAL_POSE), _JOINT_LOW, _JOINT_HIGH)
    return jnp.concatenate([state.position, wrap(state.euler), state.opening[None], arm, state.gripper_command[None]])


def scene_obs(state: State) -> Array:
    """Scene state in CALVIN's layout: float32 [24], see `types.Observation`."""
    x, y, yaw = (state.blocks[:, i] for i in range(3))
    blocks = jnp.stack([x, y, jnp.full_like(x, geometry.BLOCK_HEIGHT), 0 * x, 0 * x, wrap(yaw)], axis=-1)
    lights = jnp.stack([state.lightbulb, state.led])
    return jnp.concatenate([state.joints, lights, blocks.reshape(-1)])
