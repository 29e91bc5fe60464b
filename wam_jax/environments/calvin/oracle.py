"""CALVIN's oracle: which of its 34 tasks were solved between two moments.

Thresholds are those of the benchmark (`calvin_models/conf/callbacks/rollout/tasks/new_playtable_tasks.yaml`).
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from wam_jax.environments.calvin import scene

Contact = tuple[str, int]  # the other body ("robot", "table", a block's name, "body N") and its link

_COLORS = ("red", "blue", "pink")
_ROTATION = 60.0  # degrees about z, of rotate_*
_TILT = 30.0  # degrees about x or y that a rotation may have at most
_DRIFT = 0.1  # m that a rotated block may have moved at most
_PUSH = 0.1  # m along x, of push_*
_LIFT = {"table": 0.05, "slider": 0.03, "drawer": 0.05}  # m, of lift_*
_SURFACE_LINKS = {"table": scene.TABLE_BASE, "slider": scene.PLANK, "drawer": scene.DRAWER}
_SLIDER, _DRAWER = 0.15, 0.12  # m
_REST = 1.0  # m/s and rad/s; a stacked block is slower


@dataclasses.dataclass(frozen=True)
class Block:
    """One block at one moment."""

    position: np.ndarray  # [3], m
    orientation: np.ndarray  # [4], quaternion x, y, z, w
    velocity: np.ndarray  # [3], m/s
    spin: np.ndarray  # [3], rad/s
    contacts: frozenset[Contact]

    @property
    def touched(self) -> frozenset[str]:
        """Bodies in contact with it."""
        return frozenset(body for body, _ in self.contacts)


@dataclasses.dataclass(frozen=True)
class Info:
    """What the oracle needs to know of one moment."""

    joints: dict[int, float]  # m, of scene.SLIDER and scene.DRAWER
    lights: dict[int, int]  # 0 or 1, of scene.LIGHTBULB and scene.LED
    blocks: dict[str, Block]
    robot_contacts: frozenset[str]  # bodies that the robot touches


Rule = Callable[[Info, Info], bool]  # of the start and now


def solved(start: Info, now: Info, tasks: tuple[str, ...] | None = None) -> set[str]:
    """Names of the tasks that were solved since `start`, among `tasks` (default: all 34).

    Raises:
      ValueError: a task is not one of CALVIN's.
    """
    for task in tasks or ():
        if task not in RULES:
            raise ValueError(f"unknown task {task!r}; expected one of {', '.join(RULES)}")
    return {task for task in tasks or RULES if RULES[task](start, now)}


def _rotate(block: str, sign: int, start: Info, now: Info) -> bool:
    """Turned about z, hardly tilted, about where it was, and lying on something."""
    before, after = start.blocks[block], now.blocks[block]
    x, y, z = np.degrees(_euler(_relative_rotation(before.orientation, after.orientation)))
    in_place = np.linalg.norm(after.position - before.position) <= _DRIFT and after.touched - {"robot"}
    return bool(in_place and sign * z > _ROTATION and abs(x) < _TILT and abs(y) < _TILT)


def _push(block: str, sign: int, start: Info, now: Info) -> bool:
    """Moved along x, on the same bodies as before."""
    before, after = start.blocks[block], now.blocks[block]
    surface = before.touched - {"robot"}
    moved = after.position[0] - before.position[0]
    return bool(surface) and surface == after.touched - {"robot"} and bool(sign * moved > _PUSH)


def _lift(block: str, surface: str, start: Info, now: Info) -> bool:
    """Lay on the surface, untouched by the robot; now higher and touched by the robot alone."""
    before, after = start.blocks[block], now.blocks[block]
    return (
        bool(after.position[2] - before.position[2] > _LIFT[surface])
        and "robot" not in before.touched
        and after.touched == {"robot"}
        and ("table", _SURFACE_LINKS[surface]) in before.contacts
    )


def _place(surface: str, start: Info, now: Info) -> bool:
    """The block that the robot alone held at the start now lies on the surface and is let go."""
    held = start.robot_contacts
    if len(held) != 1:
        return False
    (block,) = held
    if block not in start.blocks or block in now.robot_contacts:
        return False
    on_surface = ("table", _SURFACE_LINKS[surface]) in now.blocks[block].contacts
    return start.blocks[block].touched == {"robot"} and on_surface


def _push_into_drawer(start: Info, now: Info) -> bool:
    """A block that touched the table top alone now touches the drawer.

    The original means to refuse a block that the robot touches at the end, too, but compares a number with pairs; that
    has no effect, and here as there such a block counts.
    """
    return any(
        before.contacts == {("table", scene.TABLE_BASE)} and ("table", scene.DRAWER) in now.blocks[name].contacts
        for name, before in start.blocks.items()
    )


def _stack(start: Info, now: Info) -> bool:
    """Some block that touched no block now rests on blocks alone."""
    names = set(start.blocks)
    return any(
        not names & start.blocks[name].touched and _on_blocks_alone(now.blocks[name], names) for name in start.blocks
    )


def _unstack(start: Info, now: Info) -> bool:
    """Some block that rested on blocks alone now touches none."""
    names = set(start.blocks)
    return any(
        _on_blocks_alone(start.blocks[name], names) and not names & now.blocks[name].touched for name in start.blocks
    )


def _on_blocks_alone(block: Block, names: set[str]) -> bool:
    slow = max(np.abs(block.velocity).max(), np.abs(block.spin).max()) < _REST
    return bool(block.touched) and block.touched <= names and bool(slow)


def _move(joint: int, distance: float, start: Info, now: Info) -> bool:
    moved = now.joints[joint] - start.joints[joint]
    return bool(0 < distance < moved or 0 > distance > moved)


def _switch(light: int, on: int, start: Info, now: Info) -> bool:
    return start.lights[light] == 1 - on and now.lights[light] == on


def _relative_rotation(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The rotation matrix that turns one quaternion's frame into the other's."""
    return _matrix(after) @ _matrix(before).T


def _matrix(quaternion: np.ndarray) -> np.ndarray:
    x, y, z, w = quaternion / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def _euler(matrix: np.ndarray) -> tuple[float, float, float]:
    """Fixed-axis XYZ angles, rad."""
    pitch = np.arcsin(np.clip(-matrix[2, 0], -1, 1))
    return np.arctan2(matrix[2, 1], matrix[2, 2]), pitch, np.arctan2(matrix[1, 0], matrix[0, 0])


def _rules() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for color in _COLORS:
        block = f"block_{color}"
        for side, sign in (("right", 1), ("left", -1)):  # right is +x, and a clockwise turn
            rules[f"rotate_{color}_block_{side}"] = functools.partial(_rotate, block, -sign)
            rules[f"push_{color}_block_{side}"] = functools.partial(_push, block, sign)
        for surface in _LIFT:
            rules[f"lift_{color}_block_{surface}"] = functools.partial(_lift, block, surface)
    rules |= {
        "move_slider_left": functools.partial(_move, scene.SLIDER, _SLIDER),
        "move_slider_right": functools.partial(_move, scene.SLIDER, -_SLIDER),
        "open_drawer": functools.partial(_move, scene.DRAWER, _DRAWER),
        "close_drawer": functools.partial(_move, scene.DRAWER, -_DRAWER),
        "place_in_slider": functools.partial(_place, "slider"),
        "place_in_drawer": functools.partial(_place, "drawer"),
        "push_into_drawer": _push_into_drawer,
        "stack_block": _stack,
        "unstack_block": _unstack,
        "turn_on_lightbulb": functools.partial(_switch, scene.LIGHTBULB, 1),
        "turn_off_lightbulb": functools.partial(_switch, scene.LIGHTBULB, 0),
        "turn_on_led": functools.partial(_switch, scene.LED, 1),
        "turn_off_led": functools.partial(_switch, scene.LED, 0),
    }
    return rules


RULES = _rules()  # by task, all 34
