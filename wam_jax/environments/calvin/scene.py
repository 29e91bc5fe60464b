"""What CALVIN's scenes consist of: files, joints, links, motors, cameras, places of blocks. Metres, radians, seconds.

All values are those of the original's configuration (calvin_env, `conf/scene/`, `conf/robot/`, `conf/cameras/`).
"""

import dataclasses
import math

import numpy as np

# --- Time and actions ---

PHYSICS_STEP = 1 / 240
PHYSICS_STEPS = 8  # per control step of 1/30 s
GRAVITY = -9.8
POSITION_SCALE, EULER_SCALE = 0.02, 0.05  # of the target pose, per unit of action; equal to specs'
GRIPPER_OPEN, GRIPPER_CLOSE = 1, -1

# --- Robot: link numbers are those of panda_longer_finger.urdf ---

ROBOT_URDF = "franka_panda/panda_longer_finger.urdf"
ROBOT_BASE = (-0.34, -0.46, 0.24)
STAND_RADIUS, STAND_LENGTH, STAND_CENTER = 0.13, 0.24, (-0.39, -0.46, 0.12)  # a cylinder without collisions
ARM = tuple(range(7))
FINGERS = (9, 11)
CAMERA_LINK, TCP_LINK = 14, 15
HEAVY_LINKS = (-1, *ARM, 8)  # base, arm and hand: most triangles of the whole scene
HULL_MARGIN = 0.01  # m; what is drawn reaches up to 0.4 mm beyond a collision shape, and lags it by up to 1.4 mm
ROBOT_LINKS = {FINGERS[0]: "panda_leftfinger", FINGERS[1]: "panda_rightfinger", 14: "gripper_cam", 15: "tcp"}
INITIAL_JOINTS = (-1.21779206, 1.03987646, 2.11978261, -2.34205014, -0.87015947, 1.64119353, 0.55344866)
JOINT_LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
JOINT_HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])
ARM_FORCE, ARM_VELOCITY = 200, 2
FINGER_OPEN = 0.04  # m, of each finger
OPEN_FORCE, CLOSE_FORCE, FINGER_VELOCITY = 2, 200, 1
IK_LIMIT, IK_RANGE = (
    7.0,
    7.0,
)  # the null space of the inverse kinematics is wider than the joints; its result is clipped

# --- Table: link and joint numbers coincide ---

SCALE = 0.8  # of table and blocks
BUTTON, SWITCH, SLIDER, DRAWER, LED, LIGHTBULB, PLANK = range(7)
TABLE_BASE = -1
TABLE_LINKS = {
    BUTTON: "button_link",
    SWITCH: "switch_link",
    SLIDER: "slide_link",
    DRAWER: "drawer_link",
    LED: "led_link",
    LIGHTBULB: "light_link",
    PLANK: "plank_link",
}
JOINT_FORCE = 4  # N; friction of slider, drawer and switch, spring of the button
OBS_SLIDER, OBS_DRAWER, OBS_BUTTON, OBS_SWITCH, OBS_LIGHTBULB, OBS_LED = range(6)  # entries of scene_obs
BUTTON_RANGE, SWITCH_RANGE = 0.02, 0.088  # m; pressed, or on, beyond half of it
LIGHT_COLORS = {LED: (0, 1, 0, 1), LIGHTBULB: (1, 1, 0, 1)}
OFF_COLOR = (1, 1, 1, 1)
PLANE_URDF = "plane/plane.urdf"
FLOOR_TEXTURE = "plane/checker_blue.png"
FLOOR_PIXELS, FLOOR_CELLS, FLOOR_GRAYS = 512, 4, (255, 222)  # of that texture: a checkerboard

# --- Cameras ---


@dataclasses.dataclass(frozen=True)
class Lens:
    """What a camera's picture covers."""

    fov: float  # degrees
    near: float
    far: float
    size: int  # pixels of the original's square pictures


STATIC_LENS = Lens(fov=10, near=0.01, far=10, size=200)
STATIC_EYE = (2.871459009488717, -2.166602199425597, 2.555159848480571)
STATIC_TARGET = (-0.026242351159453392, -0.0302329882979393, 0.3920000493526459)
STATIC_UP = (0.4041403970338857, 0.22629790978217404, 0.8862616969685161)
GRIPPER_LENS = Lens(fov=75, near=0.01, far=2, size=84)


def picture_sizes(size: int) -> tuple[int, int]:
    """Pixels of the static and the gripper camera: `size`, or for 0 those of the original."""
    return size or STATIC_LENS.size, size or GRIPPER_LENS.size


# --- Scenes ---


@dataclasses.dataclass(frozen=True)
class Scene:
    """One of CALVIN's four tables with its blocks."""

    name: str
    table_urdf: str
    block_names: tuple[str, ...]  # three, in the order of scene_obs
    block_urdfs: tuple[str, ...]
    surfaces: dict[str, tuple[tuple[float, float], tuple[float, float]]]  # name: (x, y) low, (x, y) high


_TABLE = ((0.0, -0.15), (0.35, -0.03))
_LEFT_CABINET = {"slider_left": ((-0.32, 0.05), (-0.16, 0.12)), "slider_right": ((-0.05, 0.05), (0.13, 0.12))}
BLOCK_POSES = (
    (0.05, -0.12, 0.46, 1.57),
    (0.23, -0.12, 0.46, 0.0),
    (0.10, 0.08, 0.46, 1.57),
)  # when loaded: x, y, z, yaw


def _scene(letter: str, blocks: dict[str, str], surfaces: dict) -> Scene:
    return Scene(
        name=letter,
        table_urdf=f"calvin_table_{letter}/urdf/calvin_table_{letter}.urdf",
        block_names=tuple(f"block_{color}" for color in blocks),
        block_urdfs=tuple(f"blocks/block_{color}_{size}.urdf" for color, size in blocks.items()),
        surfaces=surfaces,
    )


# Recordings exist of D alone; A, B and C are built from their configuration and have not been compared.
SCENES = {
    "A": _scene(
        "A",
        {"pink": "small", "blue": "big", "red": "middle"},
        {"table": ((-0.2, -0.15), (0.35, -0.03)), **_LEFT_CABINET},
    ),
    "B": _scene(
        "B",
        {"red": "small", "blue": "big", "pink": "middle"},
        {
            "table": ((-0.35, -0.15), (0.15, -0.03)),
            "slider_left": ((-0.12, 0.05), (0.06, 0.12)),
            "slider_right": ((0.15, 0.05), (0.33, 0.12)),
        },
    ),
    "C": _scene(
        "C",
        {"blue": "small", "red": "big", "pink": "middle"},
        {
            "table": _TABLE,
            "slider_left": ((-0.12, 0.05), (0.06, 0.12)),
            "slider_right": ((0.15, 0.05), (0.3, 0.12)),
        },
    ),
    "D": _scene("D", {"red": "middle", "blue": "small", "pink": "big"}, {"table": _TABLE, **_LEFT_CABINET}),
}
SURFACE_HEIGHT = 0.46


def get_scene(name: str) -> Scene:
    """Returns a scene by its letter.

    Raises:
      ValueError: there is no such scene.
    """
    if name not in SCENES:
        raise ValueError(f"unknown scene {name!r} of CALVIN; expected one of {', '.join(SCENES)}")
    return SCENES[name]


# --- Evaluation: the arm's pose in which every chain starts ---

EVALUATION_ROBOT_OBS = np.array(
    [0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963]
    + [-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928, 1]
)
SLIDER_LEFT, DRAWER_OPEN, SWITCH_ON = 0.28, 0.22, 0.088  # end stops
DOWN = (math.pi, 0.0, math.pi / 2)  # roll, pitch, yaw of a hand that points straight down, fingers open along x
