"""Shapes of the table, its fixtures, the blocks and the hand, shared by contact and rendering.

Positions, ranges and sizes follow CALVIN's scene D, so that its waypoints apply here; parts are simplified to boxes.
Units are metres and radians. Two fixed frames are used: the world (z up, the table's front towards -y) and the panel
frame of the leaning cabinet front: x as in the world, u up along the front, n out of it towards the robot.
"""

from typing import NamedTuple

import numpy as np

# Joints, in the order of scene_obs. Each moves its body by `joint * axis`.
SLIDER, DRAWER, BUTTON, SWITCH = range(4)
JOINT_LIMITS = np.array([0.28, 0.22, 0.02, 0.088], np.float32)  # upper limits, the lower ones are 0
JOINT_AXES = np.array([[-1, 0, 0], [0, -1, 0], [0, 0, -1], [0, 0.5, np.sqrt(0.75)]], np.float32)
BUTTON_PRESSED = 0.01
SWITCH_ON = 0.044

# Bodies that boxes belong to: the four joints, three blocks, and what never moves.
NUM_JOINTS, NUM_BLOCKS = 4, 3
FIRST_BLOCK = NUM_JOINTS
STATIC = NUM_JOINTS + NUM_BLOCKS

TABLE_HEIGHT = 0.44
PANEL_ORIGIN = np.array([0.0, 0.02, TABLE_HEIGHT], np.float32)
PANEL_AXES = np.array([[1, 0, 0], [0, 0.5, np.sqrt(0.75)], [0, -np.sqrt(0.75), 0.5]], np.float32)  # rows x, u, n

MAX_OPENING = 0.08  # inner distance of the open fingers

# Where the measured tool can be. CALVIN's arm stops there for want of reach; the ranges are those of `specs`.
POSITION_LOW = np.array([-0.4, -0.6, 0.3], np.float32)
POSITION_HIGH = np.array([0.5, 0.2, 0.8], np.float32)
EULER_LOW = np.array([np.pi - 1.0, -0.8, np.pi / 2 - 2.0], np.float32)  # roll is kept around +pi, unwrapped
EULER_HIGH = np.array([np.pi + 1.0, 0.8, np.pi / 2 + 2.0], np.float32)


class Box(NamedTuple):
    """A box of a body, in the frame it is aligned with, where its joint is zero."""

    body: int
    low: tuple[float, float, float]
    high: tuple[float, float, float]


# The cabinet is the block of these limits, cut by the front plane (n = 0) and hollowed by the cavity.
CABINET = Box(STATIC, (-0.44, 0.02, 0.44), (0.44, 0.18, 0.648))
CAVITY = Box(STATIC, (-0.36, -1.0, 0.44), (0.16, 0.16, 0.628))

# World frame.
TABLE_TOP = Box(STATIC, (-0.44, -0.18, 0.40), (0.44, 0.18, TABLE_HEIGHT))
TABLE_BASE = Box(STATIC, (-0.42, -0.155, 0.0), (0.42, 0.18, 0.40))
LED_LAMP = Box(STATIC, (-0.17, 0.13, 0.648), (0.08, 0.18, 0.71))
BULB_CENTER, BULB_RADIUS = (0.19, 0.16, 0.705), 0.06
DRAWER_FRONT = Box(DRAWER, (-0.04, -0.182, 0.30), (0.40, -0.157, 0.40))
DRAWER_TRAY = Box(DRAWER, (-0.02, -0.157, 0.33), (0.38, 0.06, 0.40))  # the hollow of the drawer
DRAWER_BAR = Box(DRAWER, (0.059, -0.261, 0.34), (0.301, -0.238, 0.38))
DRAWER_POSTS = (
    Box(DRAWER, (0.059, -0.238, 0.34), (0.084, -0.182, 0.38)),
    Box(DRAWER, (0.276, -0.238, 0.34), (0.301, -0.182, 0.38)),
)
BUTTON_CAP = Box(BUTTON, (-0.15, -0.15, 0.44), (-0.09, -0.09, 0.487))

# Panel frame.
DOOR = Box(SLIDER, (-0.10, 0.0, -0.012), (0.18, 0.24, 0.006))
SLIDER_HANDLE = Box(SLIDER, (0.019, 0.035, 0.006), (0.061, 0.205, 0.08))
SWITCH_BAR = Box(SWITCH, (0.24, 0.060, 0.030), (0.36, 0.088, 0.054))
SWITCH_POSTS = (
    Box(SWITCH, (0.24, 0.060, 0.0), (0.26, 0.088, 0.030)),
    Box(SWITCH, (0.34, 0.060, 0.0), (0.36, 0.088, 0.030)),
)

# Half sizes of the red, blue and pink block; they lie flat, their frame turned by their yaw.
BLOCK_HALF_SIZES = np.array([[0.028, 0.02, 0.02], [0.02, 0.02, 0.02], [0.04, 0.02, 0.02]], np.float32)
BLOCK_HEIGHT = 0.46

# What the hand runs into but no ray sees as such: the cabinet and the drawer as solid pieces.
_COLLISION_WORLD = (
    TABLE_TOP,
    TABLE_BASE,
    LED_LAMP,
    Box(STATIC, (0.13, 0.12, 0.648), (0.25, 0.20, 0.765)),  # bulb
    Box(STATIC, (-0.44, 0.16, 0.44), (0.44, 0.18, 0.648)),  # back of the cabinet
    DRAWER_FRONT,
    DRAWER_BAR,
    *DRAWER_POSTS,
    Box(DRAWER, (-0.02, -0.157, 0.30), (0.38, 0.06, 0.33)),  # floor of the drawer
    Box(DRAWER, (-0.04, -0.157, 0.30), (-0.02, 0.06, 0.40)),  # its left side
    Box(DRAWER, (0.38, -0.157, 0.30), (0.40, 0.06, 0.40)),  # its right side
    BUTTON_CAP,
)
_COLLISION_PANEL = (
    Box(STATIC, (-0.44, 0.0, -0.12), (-0.36, 0.24, 0.0)),  # left of the cavity
    Box(STATIC, (0.16, 0.0, -0.12), (0.44, 0.24, 0.0)),  # right of it
    Box(STATIC, (-0.36, 0.217, -0.12), (0.16, 0.24, 0.0)),  # above it
    DOOR,
    SLIDER_HANDLE,
    SWITCH_BAR,
    *SWITCH_POSTS,
)
_FIXED = _COLLISION_WORLD + _COLLISION_PANEL

# Contact tables of all boxes; the three blocks are last and get their centre and yaw from the state.
NUM_FIXED = len(_FIXED)
BOX_BODY = np.array([box.body for box in _FIXED] + [FIRST_BLOCK + i for i in range(NUM_BLOCKS)])
BOX_HALF_SIZE = np.concatenate(
    [np.array([np.subtract(box.high, box.low) / 2 for box in _FIXED]), BLOCK_HALF_SIZES]
).astype(np.float32)
_CENTERS = np.array([np.add(box.high, box.low) / 2 for box in _FIXED])
_IN_PANEL = np.arange(NUM_FIXED) >= len(_COLLISION_WORLD)
FIXED_CENTER = np.where(_IN_PANEL[:, None], PANEL_ORIGIN + _CENTERS @ PANEL_AXES, _CENTERS).astype(np.float32)
FIXED_ROTATION = np.where(_IN_PANEL[:, None, None], PANEL_AXES.T, np.eye(3)).astype(np.float32)  # box to world
BAR_OF_JOINT = {SLIDER: _FIXED.index(SLIDER_HANDLE), DRAWER: _FIXED.index(DRAWER_BAR), SWITCH: _FIXED.index(SWITCH_BAR)}

# The hand, in the tool frame: z is the approach direction, y the direction the fingers open along, x the third. The
# origin is the tool centre point between the fingertips. Contact sees spheres, the cameras see boxes.
FINGER_RADIUS = 0.008
FINGER_SPHERES = np.array([0.0, -0.016, -0.032, -0.048], np.float32)  # z of the centres along each finger
PALM_SPHERES = np.array(  # x, y, z, radius
    [[0, -0.075, -0.095, 0.03], [0, -0.025, -0.095, 0.03], [0, 0.025, -0.095, 0.03], [0, 0.075, -0.095, 0.03],
     [0, 0, -0.17, 0.045]],
    np.float32,
)  # fmt: skip
FINGER_BOX = ((-0.009, 0.0, -0.1), (0.009, 0.016, 0.008))  # of the +y finger, its inner face at y = opening / 2
PALM_BOX = ((-0.03, -0.1, -0.125), (0.03, 0.1, -0.065))
WRIST_BOX = ((-0.04, -0.04, -0.26), (0.04, 0.04, -0.125))
