"""Scripted experts of eight tasks in scene D: waypoints, planned once from the state when a task begins."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from wam_jax.environments.calvin import scene
from wam_jax.environments.calvin.follower import AS_IS, Plan, Waypoint

SLOW, FAST = 0.6, 0.95  # bounds of the speed drawn for each attempt, in units of action
_TILT = (math.pi + 0.6, 0.0, 0.0)  # the tip leans towards the panel: straight down, the arm cannot reach the switch
_TRAVEL_Z = 0.60
_BUTTON_XY = (-0.12, -0.12)
_HANDLE_X = 0.18  # of the drawer
_SWITCH_X = 0.30
_OPEN = scene.GRIPPER_OPEN

Jitter = Callable[[float], float]  # a uniform draw in -m..m
Path = list[Waypoint]


def plan(task: str, target: np.ndarray, scene_obs: np.ndarray, rng: np.random.Generator) -> Plan:
    """Plans an attempt at a task.

    Args:
      task: one of EXPERTS.
      target: [6], position and Euler angles that the environment adds actions to; after a reset those measured.
      scene_obs: [24], now.
      rng: draws the speed and small displacements.

    Raises:
      ValueError: there is no expert of that name.
    """
    if task not in EXPERTS:
        raise ValueError(f"no expert for task {task!r}; expected one of {', '.join(EXPERTS)}")
    path = EXPERTS[task](scene_obs, lambda m: float(rng.uniform(-m, m)))
    speed = float(rng.uniform(SLOW, FAST))
    return Plan((*_leave(target[:3]), *path), speed, target[:3].copy(), target[3:].copy())


def _leave(target: np.ndarray) -> Path:
    """Away from the last place, up first where the tool is at the drawer."""
    x, y, z = map(float, target)
    path = []
    if z < 0.42:
        z = 0.50
        path.append(Waypoint((x, y, z), AS_IS, tolerance=0.03, measured=False))
    y = y - 0.05 if y > -0.10 else y
    return [*path, Waypoint((x, y, max(z, _TRAVEL_Z)), AS_IS, tolerance=0.03, measured=False)]


def _press_button(scene_obs: np.ndarray, jitter: Jitter) -> Path:
    """The button needs 10 mm; the closed tips go 25 mm below its top, which holds against the spring."""
    x, y = (center + jitter(0.008) for center in _BUTTON_XY)
    return [
        Waypoint((x, y, 0.58), scene.DOWN, tolerance=0.02),
        Waypoint((x, y, 0.52), scene.DOWN),
        Waypoint((x, y, 0.462), scene.DOWN, tolerance=0.006, measured=False, speed=0.6, cap=25, hold=4),
        Waypoint((x, y, 0.54), scene.DOWN),
    ]


def _open_drawer(scene_obs: np.ndarray, jitter: Jitter) -> Path:
    """The closed fingers go down between front and handle bar, and pull it 3 cm beyond its end."""
    x, y, pulled = _HANDLE_X + jitter(0.05), -0.212 - scene_obs[scene.OBS_DRAWER], -0.462 + jitter(0.02)
    return [
        Waypoint((x, y, 0.52), scene.DOWN, tolerance=0.02),
        Waypoint((x, y, 0.42), scene.DOWN),
        Waypoint((x, y, 0.365), scene.DOWN, tolerance=0.008, speed=0.7),
        Waypoint((x, pulled, 0.365), scene.DOWN, tolerance=0.01, measured=False, speed=0.7, hold=4),
        Waypoint((x, -0.422, 0.50), scene.DOWN, tolerance=0.03),
    ]


def _close_drawer(scene_obs: np.ndarray, jitter: Jitter) -> Path:
    """The closed fingers push the bar from outside."""
    x, y, pushed = _HANDLE_X + jitter(0.05), -0.30 - scene_obs[scene.OBS_DRAWER], -0.245 + jitter(0.01)
    return [
        Waypoint((x, y, 0.52), scene.DOWN, tolerance=0.02),
        Waypoint((x, y, 0.37), scene.DOWN),
        Waypoint((x, pushed, 0.365), scene.DOWN, tolerance=0.01, measured=False, speed=0.7, hold=4),
        Waypoint((x, -0.30, 0.50), scene.DOWN, tolerance=0.03),
    ]


def _push_slider(start_x: float, side: int, end_x: float, leave_x: float, z: float) -> Path:
    """The closed fingers push the handle from its one side; `side` is where they are, +1 for +x."""
    return [
        Waypoint((start_x + side * 0.01, -0.10, 0.60), scene.DOWN, tolerance=0.02),
        Waypoint((start_x + side * 0.01, -0.08, z), scene.DOWN, tolerance=0.015),
        Waypoint((start_x + side * 0.005, -0.012, z), scene.DOWN, cap=25),
        Waypoint((end_x, -0.012, z), scene.DOWN, tolerance=0.01, measured=False, speed=0.7, hold=5),
        Waypoint((leave_x, -0.09, z + 0.02), scene.DOWN, tolerance=0.03),
    ]


def _move_slider_left(scene_obs: np.ndarray, jitter: Jitter) -> Path:
    return _push_slider(0.102 - scene_obs[scene.OBS_SLIDER], 1, -0.225, -0.19, 0.515 + jitter(0.01))


def _move_slider_right(scene_obs: np.ndarray, jitter: Jitter) -> Path:
    return _push_slider(-0.022 - scene_obs[scene.OBS_SLIDER], -1, 0.025, -0.01, 0.515 + jitter(0.01))


def _turn_off_lightbulb(scene_obs: np.ndarray, jitter: Jitter) -> Path:
    """The raised bar is pushed down from above."""
    x, (y, z) = _SWITCH_X + jitter(0.015), _switch_shift(scene_obs)
    return [
        Waypoint((x, -0.14, 0.64), _TILT, tolerance=0.02),
        Waypoint((x, -0.02 + y, 0.58 + z), _TILT, tolerance=0.015, cap=40),
        Waypoint((x, 0.03 + y, 0.575 + z), _TILT, cap=30),
        Waypoint((x, 0.015, 0.515), _TILT, measured=False, speed=0.5, hold=5),
        Waypoint((x, -0.06, 0.60), _TILT, tolerance=0.03),
    ]


def _turn_on_lightbulb(scene_obs: np.ndarray, jitter: Jitter) -> Path:
    """The lowered bar is grasped and lifted along its slope."""
    x, (y, z) = _SWITCH_X + jitter(0.01), _switch_shift(scene_obs)
    grasp = Waypoint((x, 0.022 + y, 0.522 + z), _TILT, _OPEN, tolerance=0.01, speed=0.6, cap=30, hold=2)
    lift = Waypoint((x, 0.070, 0.604), _TILT, tolerance=0.01, measured=False, speed=0.5, hold=6)
    return [
        Waypoint((x, -0.14, 0.60), _TILT, _OPEN, tolerance=0.02),
        Waypoint((x, -0.03 + y, 0.565 + z), _TILT, _OPEN),
        grasp,
        dataclasses.replace(grasp, gripper=scene.GRIPPER_CLOSE, tolerance=0.02, speed=math.inf, cap=60, hold=8),
        lift,
        dataclasses.replace(lift, gripper=_OPEN, tolerance=0.02, measured=True, speed=math.inf, hold=4),
        Waypoint((x, -0.06, 0.64), _TILT, _OPEN, tolerance=0.03),
    ]


def _switch_shift(scene_obs: np.ndarray) -> tuple[float, float]:
    """How far along y and z the switch's bar was raised; it slides on a slope of 60 degrees."""
    return 0.5 * scene_obs[scene.OBS_SWITCH], 0.866 * scene_obs[scene.OBS_SWITCH]


EXPERTS: dict[str, Callable[[np.ndarray, Jitter], Path]] = {
    "open_drawer": _open_drawer,
    "close_drawer": _close_drawer,
    "move_slider_left": _move_slider_left,
    "move_slider_right": _move_slider_right,
    "turn_on_lightbulb": _turn_on_lightbulb,
    "turn_off_lightbulb": _turn_off_lightbulb,
    "turn_on_led": _press_button,
    "turn_off_led": _press_button,
}
