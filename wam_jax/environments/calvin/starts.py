"""Starts of episodes: random ones for a task, and files of them."""

import hashlib

import numpy as np

from wam_jax import npz_files
from wam_jax.environments.calvin import follower, scene
from wam_jax.environments.calvin.follower import Waypoint
from wam_jax.environments.calvin.scene import Scene
from wam_jax.environments.calvin.simulator import Simulator

Start = tuple[np.ndarray, np.ndarray]  # robot_obs [15] and scene_obs [24] to reset to

# A task's own joint in a random start, and the same entry of scene_obs: (index, low, high, end stop among them).
_OWN_JOINT = {
    "open_drawer": (scene.OBS_DRAWER, 0.0, 0.06, 0.0),
    "close_drawer": (scene.OBS_DRAWER, 0.16, 0.22, scene.DRAWER_OPEN),
    "move_slider_left": (scene.OBS_SLIDER, 0.0, 0.08, 0.0),
    "move_slider_right": (scene.OBS_SLIDER, 0.20, 0.28, scene.SLIDER_LEFT),
    "turn_on_lightbulb": (scene.OBS_SWITCH, 0.0, 0.02, 0.0),
    "turn_off_lightbulb": (scene.OBS_SWITCH, 0.062, 0.088, scene.SWITCH_ON),
}
_OWN_LED = {"turn_on_led": 0, "turn_off_led": 1}
TASKS = (*_OWN_JOINT, *_OWN_LED)
_END_STOP_SHARE, _OTHER_END_SHARE = 0.35, 0.3
_JOINT_HIGH = {
    scene.OBS_SLIDER: scene.SLIDER_LEFT,
    scene.OBS_DRAWER: scene.DRAWER_OPEN,
    scene.OBS_SWITCH: scene.SWITCH_ON,
}

# Where the hand wanders before a start, and how the target may look: position low and high, spread of the angles.
_HAND_LOW, _HAND_HIGH = (-0.18, -0.30, 0.53), (0.28, -0.10, 0.65)
_HAND_SPREAD = (0.08, 0.08, 0.12)
_BLOCK_GAP = 0.004  # m
_REST_STEPS = 6
_TRIES = 200

# Otherwise a task is impossible or already done: entries of scene_obs, and what each must lie between. The bulb follows
# its switch at the first step, so both must agree.
_POSSIBLE = {
    "open_drawer": ((scene.OBS_DRAWER, -0.01, 0.10),),
    "close_drawer": ((scene.OBS_DRAWER, 0.12, 0.24),),
    "move_slider_left": ((scene.OBS_SLIDER, -0.01, 0.13),),
    "move_slider_right": ((scene.OBS_SLIDER, 0.15, 0.32),),
    "turn_on_lightbulb": ((scene.OBS_LIGHTBULB, 0, 0), (scene.OBS_SWITCH, -0.01, scene.SWITCH_RANGE / 2)),
    "turn_off_lightbulb": ((scene.OBS_LIGHTBULB, 1, 1), (scene.OBS_SWITCH, scene.SWITCH_RANGE / 2, 0.10)),
    "turn_on_led": ((scene.OBS_LED, 0, 0),),
    "turn_off_led": ((scene.OBS_LED, 1, 1),),
}
_NAMES = {
    scene.OBS_SLIDER: "the slider",
    scene.OBS_DRAWER: "the drawer",
    scene.OBS_SWITCH: "the switch",
    scene.OBS_LIGHTBULB: "the lightbulb",
    scene.OBS_LED: "the LED",
}


def why_impossible(task: str, scene_obs: np.ndarray) -> str:
    """Says why a task cannot be solved from a state, or is solved in it already; empty where it can."""
    for index, low, high in _POSSIBLE[task]:
        value, needs = scene_obs[index], f"{low:g}" if low == high else f"{low:g} to {high:g}"
        if not low <= value <= high:
            return f"{_NAMES[index]} is at {value:.4g}, where {task} is done already or impossible; it needs {needs}"
    return ""


def draw(simulator: Simulator, of: Scene, task: str, rng: np.random.Generator) -> Start:
    """Draws a random scene in which a task is possible, and lets the hand wander and come to rest.

    Args:
      simulator: is left in an arbitrary state.
      of: the simulator's scene.
      task: one of TASKS.
      rng: decides everything.

    Raises:
      ValueError: the task is not known, or the scene is not D, whose ranges these are.
    """
    if of.name != "D":
        raise ValueError(
            f"random starts are drawn in scene D only, not {of.name}; give a file of starts: --starts=FILE"
        )
    if task not in TASKS:
        raise ValueError(f"no random starts for task {task!r}; expected one of {', '.join(TASKS)}")
    for _ in range(_TRIES):
        simulator.reset(scene.EVALUATION_ROBOT_OBS, _random_scene(of, task, rng))
        if simulator.smallest_gap(_BLOCK_GAP) < _BLOCK_GAP:
            continue
        _wander(simulator, rng)
        robot_obs, scene_obs = simulator.robot_obs(), simulator.scene_obs()
        if not simulator.info().robot_contacts and not why_impossible(task, scene_obs):
            return robot_obs, scene_obs
    raise RuntimeError(f"no legal start for {task} in {_TRIES} draws")


def _random_scene(of: Scene, task: str, rng: np.random.Generator) -> np.ndarray:
    """scene_obs: the task's own fixture where the task is possible, others at an end stop or anywhere between."""
    scene_obs = np.zeros(24)
    for index, high in _JOINT_HIGH.items():
        kind = rng.uniform()
        scene_obs[index] = high * (rng.uniform() if kind >= 2 * _OTHER_END_SHARE else kind < _OTHER_END_SHARE)
    if task in _OWN_JOINT:
        index, low, high, stop = _OWN_JOINT[task]
        scene_obs[index] = stop if rng.uniform() < _END_STOP_SHARE else rng.uniform(low, high)
    scene_obs[scene.OBS_LIGHTBULB] = scene_obs[scene.OBS_SWITCH] > scene.SWITCH_RANGE / 2
    scene_obs[scene.OBS_LED] = _OWN_LED.get(task, int(rng.integers(2)))
    for block in scene_obs[6:].reshape(3, 6):
        low_xy, high_xy = of.surfaces[rng.choice(sorted(of.surfaces))]
        block[:3] = *rng.uniform(low_xy, high_xy), scene.SURFACE_HEIGHT
        block[5] = rng.uniform(-np.pi, np.pi)
    return scene_obs


def _wander(simulator: Simulator, rng: np.random.Generator) -> None:
    """One to three random places in free space, then rest."""
    gripper = int(rng.choice((scene.GRIPPER_OPEN, scene.GRIPPER_CLOSE)))
    places = rng.uniform(_HAND_LOW, _HAND_HIGH, (rng.integers(1, 4), 3))
    angles = np.array(scene.DOWN) + rng.normal(0, _HAND_SPREAD, places.shape)
    waypoints = [
        Waypoint(tuple(place), tuple(euler), gripper, tolerance=0.02, cap=40, measured=False)
        for place, euler in zip(places.tolist(), angles.tolist(), strict=True)
    ]
    plan = follower.Plan(
        tuple(waypoints), rng.uniform(0.3, 0.9), simulator.target_position.copy(), simulator.target_euler.copy()
    )
    while not plan.done:
        plan, action = follower.act(plan, simulator.robot_obs())
        simulator.step(action)
    for _ in range(_REST_STEPS):
        simulator.step(np.array([0, 0, 0, 0, 0, 0, gripper], np.float64))


def load(path: str) -> dict[str, list[Start]]:
    """Reads a file of starts: arrays TASK_robot_obs [n, 15] and TASK_scene_obs [n, 24] for each task it knows.

    Raises:
      ValueError: the file is not one, knows no task, or holds a start in which its task is done or impossible.
    """
    arrays = npz_files.read(path, "the starts")
    given = {
        task: _task_starts(path, task, arrays)
        for task in TASKS
        if f"{task}_robot_obs" in arrays or f"{task}_scene_obs" in arrays
    }
    if not given:
        raise ValueError(f"{path} holds no starts; expected TASK_robot_obs and TASK_scene_obs for tasks of {TASKS}")
    return given


def _task_starts(path: str, task: str, arrays: dict[str, np.ndarray]) -> list[Start]:
    keys = f"{task}_robot_obs", f"{task}_scene_obs"
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(missing)}; expected [n, 15] and [n, 24] for each task")
    robot_obs, scene_obs = (np.asarray(arrays[key], np.float64) for key in keys)
    if robot_obs.shape != (len(robot_obs), 15) or scene_obs.shape != (len(robot_obs), 24):
        raise ValueError(
            f"{path}: {task} has shapes {robot_obs.shape} and {scene_obs.shape}; expected [n, 15], [n, 24]"
        )
    for row, start in enumerate(scene_obs):
        finite = np.isfinite(start).all() and np.isfinite(robot_obs[row]).all()
        why = _why_out_of_range(robot_obs[row], start) if finite else "it has entries that are not finite"
        why = why or why_impossible(task, start)
        if why:
            raise ValueError(f"{path}: start {row} of {task} cannot be used: {why}")
    return list(zip(robot_obs, scene_obs, strict=True))


def _why_out_of_range(robot_obs: np.ndarray, scene_obs: np.ndarray) -> str:
    """Says which entry cannot be what it should be: another unit, or another column."""
    parts = {
        "robot_obs 0 to 2, the hand's position in m": (robot_obs[:3], 2.0),
        "robot_obs 7 to 13, the joints' angles in rad": (robot_obs[7:14], 2 * np.pi),
        "scene_obs 0 to 3, slider, drawer, button and switch in m": (scene_obs[:4], 1.0),
    }
    for name, (values, most) in parts.items():
        if np.abs(values).max() > most:
            return f"{name}, reaches {values[np.abs(values).argmax()]:.4g}; expected at most {most:.3g}"
    return ""


def version_of(given: dict[str, list[Start]]) -> str:
    """Twelve hexadecimal digits that tell one set of starts from another, whatever its file is called."""
    digest = hashlib.sha256()
    for task in sorted(given):
        digest.update(task.encode() + b"".join(vector.tobytes() for start in given[task] for vector in start))
    return digest.hexdigest()[:12]
