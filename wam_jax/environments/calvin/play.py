"""Recorded data, as Playtable's: play that goes from one attempt to the next without resets, and demonstrations.

A world model that never saw a failure imagines none. A share of play's attempts is therefore disturbed: placed
2 to 4.5 cm beside their goal, pushed only part of the way, broken off, or with fingers that close early, late or not
at all. Between attempts the hand moves freely, also among the fixtures. After a failure play simply goes on.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from wam_jax.environments.calvin import experts, follower, oracle, scene, starts
from wam_jax.environments.calvin.follower import Plan, Waypoint
from wam_jax.environments.calvin.pool import Pool
from wam_jax.environments.calvin.worker import Frames

ACTION_NOISE = 0.05  # standard deviation on the three position entries, units of the action
STEPS_AFTER_SUCCESS = 6  # of a demonstration

# How an attempt is disturbed, and how often in relation to the other ways.
_DISTURBANCES = {"offset": 26, "short": 16, "broken off": 10, "gripper": 8}
_GRIPPER_SHIFTS = (-2, -1, 0, 0, 1, 2)  # waypoints by which the fingers are late or early, 0: reversed

_FREE_SHARE = 0.6  # of attempts that free motion follows
_NEAR_SHARE = 0.35  # of free motions that go among the fixtures instead of above the table
_FREE_LOW, _FREE_HIGH = (-0.20, -0.30, 0.50), (0.30, -0.08, 0.66)
_NEAR_LOW, _NEAR_HIGH = (-0.30, -0.48, 0.37), (0.36, 0.02, 0.62)
_TABLE_EDGE, _ABOVE_TABLE = -0.24, 0.46  # m: beyond this y the hand stays above this height
_TURN = (0.2, 0.2, 0.6)  # half range of roll, pitch and yaw

# An attempt is labelled if its entry of scene_obs is within this range: the oracle can then find it solved.
_LABELLED = {
    "open_drawer": (scene.OBS_DRAWER, -1.0, 0.07),
    "close_drawer": (scene.OBS_DRAWER, 0.15, 1.0),
    "move_slider_left": (scene.OBS_SLIDER, -1.0, 0.095),
    "move_slider_right": (scene.OBS_SLIDER, 0.185, 1.0),
    "turn_on_lightbulb": (scene.OBS_LIGHTBULB, -1.0, 0.5),
    "turn_off_lightbulb": (scene.OBS_LIGHTBULB, 0.5, 2.0),
    "turn_on_led": (scene.OBS_LED, -1.0, 0.5),
    "turn_off_led": (scene.OBS_LED, 0.5, 2.0),
}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A stretch of a track in which a task is tried."""

    task: str
    start: int  # first step
    end: int  # one past the last step


@dataclasses.dataclass(frozen=True, eq=False)
class Track:
    """One episode of T steps, and the state after the last of them."""

    robot_obs: np.ndarray  # float64 [T + 1, 15]
    scene_obs: np.ndarray  # float64 [T + 1, 24]
    rgb_static: np.ndarray  # uint8 [T, S, S, 3]
    rgb_gripper: np.ndarray  # uint8 [T, G, G, 3]
    actions: np.ndarray  # float64 [T, 7], as commanded
    attempts: tuple[Attempt, ...]


def reached_actions(robot_obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The actions that CALVIN's own data hold: what was reached a step later, not what was commanded.

    Args:
      robot_obs: [T + 1, 15].

    Returns:
      absolute ones, float64 [T, 7]: the pose measured a step later, and the gripper command; and relative ones,
      float64 [T, 7]: the way there in units of action, clipped to [-1, 1], and the gripper command.
    """
    pose, gripper = robot_obs[:, :6], robot_obs[1:, 14:]
    moved = pose[1:] - pose[:-1]
    moved[:, 3:] = (moved[:, 3:] + np.pi) % (2 * np.pi) - np.pi
    scale = np.repeat([scene.POSITION_SCALE, scene.EULER_SCALE], 3)
    relative = np.clip(moved, -scale, scale) / scale
    return np.concatenate([pose[1:], gripper], axis=1), np.concatenate([relative, gripper], axis=1)


def record_play(pool: Pool, num_steps: int, seed: tuple[int, ...], *, disturbed_share: float) -> Track:
    """Records one episode of play, from a random start.

    Args:
      pool: of scene D, with pictures; its first slot is used.
      num_steps: T.
      seed: the same one gives the same episode.
      disturbed_share: of the attempts, 0 to 1; most of the disturbed ones fail.
    """
    rng = np.random.default_rng((*seed, 1))
    tape = _Tape(pool, str(rng.choice(starts.TASKS)), (*seed, 0))
    activity = _free_motion(rng, tape.now, begun=0)
    attempts: list[Attempt] = []
    for step in range(num_steps):
        if activity.plan.done or step - activity.begun >= activity.limit:
            attempts += activity.attempts(step)
            counts = Counter(a.task for a in attempts)
            activity = _next(rng, tape.now, activity, counts, begun=step, disturbed_share=disturbed_share)
        activity = tape.follow(activity, rng, render=step + 1 < num_steps)
    return tape.track([*attempts, *activity.attempts(num_steps)])


def record_demonstration(pool: Pool, task: str, max_steps: int, seed: tuple[int, ...]) -> Track | None:
    """Records an expert that solves a task from a random start, with noise and a speed of its own.

    Args:
      pool: of scene D, with pictures; its first slot is used.
      task: one of `experts.EXPERTS`.
      max_steps: the longest episode.
      seed: the same one gives the same episode.

    Returns:
      the episode, cut six steps after the first success or at `max_steps`; None where the expert failed.
    """
    rng = np.random.default_rng((*seed, 1))
    tape = _Tape(pool, task, (*seed, 0))
    start = tape.now
    plan = experts.plan(task, start.target[0], start.scene_obs[0], rng)
    activity = _Activity(plan, begun=0, noise=ACTION_NOISE, task=task)
    solved, last = False, max_steps - 1
    for step in itertools.count():
        if not solved and oracle.solved(start.infos[0], tape.now.infos[0], (task,)):
            solved, last = True, min(step + STEPS_AFTER_SUCCESS, max_steps - 1)
        activity = tape.follow(activity, rng, render=step < last)
        if step == last:
            return tape.track(activity.attempts(last + 1)) if solved else None
    raise AssertionError


@dataclasses.dataclass(frozen=True)
class _Activity:
    """What an episode is doing: an attempt at a task, or free motion."""

    plan: Plan
    begun: int  # at this step
    noise: float  # standard deviation on the position entries of the action
    task: str = ""  # its label; empty: none
    is_free: bool = False
    limit: float = math.inf  # steps after which it is broken off

    def attempts(self, end: int) -> tuple[Attempt, ...]:
        """Its label, if it has one and ends at this step."""
        return (Attempt(self.task, self.begun, end),) if self.task else ()


class _Tape:
    """An episode while it is recorded."""

    def __init__(self, pool: Pool, task: str, seed: tuple[int, ...]):
        """Begins in a random start in which the task is possible."""
        self._pool = pool
        self._episodes = pool.draw([task], [seed])
        self._moments = pool.look(self._episodes, [True])
        self._actions: list[np.ndarray] = []

    @property
    def now(self) -> Frames:
        """The present moment."""
        return self._moments[-1]

    def follow(self, activity: _Activity, rng: np.random.Generator, render: bool) -> _Activity:
        """Executes the activity's next action."""
        noise = rng.normal(0, activity.noise, 3)
        plan, action = follower.act(activity.plan, self.now.robot_obs[0], noise)
        self._episodes, frames = self._pool.step(self._episodes, action[None, None], [render])
        self._moments += frames
        self._actions.append(action)
        return dataclasses.replace(activity, plan=plan)

    def track(self, attempts: Sequence[Attempt]) -> Track:
        """What was recorded."""
        fields = ("robot_obs", "scene_obs", "rgb_static", "rgb_gripper")
        arrays = {field: np.concatenate([getattr(m, field) for m in self._moments]) for field in fields}
        return Track(**arrays, actions=np.stack(self._actions), attempts=tuple(attempts))


def _next(
    rng: np.random.Generator, now: Frames, last: _Activity, counts: Counter, *, begun: int, disturbed_share: float
) -> _Activity:
    """Free motion, or an attempt at the possible task that was tried least; a share of them is disturbed."""
    if not last.is_free and rng.uniform() < _FREE_SHARE:
        return _free_motion(rng, now, begun)
    scene_obs = now.scene_obs[0]
    task, is_labelled = _choose_task(rng, last.task, counts, scene_obs)
    total = sum(_DISTURBANCES.values())
    shares = [disturbed_share * weight / total for weight in _DISTURBANCES.values()]
    kind = rng.choice(["clean", *_DISTURBANCES], p=[1 - disturbed_share, *shares])
    return _Activity(
        plan=_disturb(rng, experts.plan(task, now.target[0], scene_obs, rng), kind),
        begun=begun,
        noise=ACTION_NOISE,
        task=task if is_labelled else "",
        limit=int(rng.integers(8, 36)) if kind == "broken off" else math.inf,
    )


def _choose_task(rng: np.random.Generator, previous: str, counts: Counter, scene_obs: np.ndarray) -> tuple[str, bool]:
    """The task to try, and whether it is labelled.

    A task does not follow on itself without a pause, so that labels tell attempts apart. A door that stands where
    neither of its tasks can be solved is moved on by an attempt without a label.
    """
    possible = {task for task, (entry, low, high) in _LABELLED.items() if low < scene_obs[entry] < high}
    in_order = {_LABELLED[task][0] for task in possible}  # fixtures of which a task is possible
    allowed = [t for t in _LABELLED if t != previous and (t in possible or _LABELLED[t][0] not in in_order)]
    scores = [rng.gumbel() - counts[task] for task in allowed]
    task = allowed[int(np.argmax(scores))]
    return task, task in possible


def _disturb(rng: np.random.Generator, plan: Plan, kind: str) -> Plan:
    """Spoils a plan; the waypoints that leave the last place stay as they are."""
    path = plan.waypoints
    first = next(i for i, waypoint in enumerate(path) if not np.isnan(waypoint.euler[0]))
    if kind == "short":
        path = _shorten(path, first, missing=rng.uniform(0.4, 0.85))
    elif kind == "offset":
        angle, size = rng.uniform(0, 2 * np.pi), rng.uniform(0.022, 0.045)
        offset = np.array([size * np.cos(angle), size * np.sin(angle), rng.uniform(-0.01, 0.04)])
        path = (*path[:first], *(_moved(waypoint, offset) for waypoint in path[first:]))
    elif kind == "gripper":
        path = _wrong_gripper(path, first, shift=int(rng.choice(_GRIPPER_SHIFTS)))
    return dataclasses.replace(plan, waypoints=path)


def _shorten(path: tuple[Waypoint, ...], first: int, missing: float) -> tuple[Waypoint, ...]:
    """Lets the pushes lack a share of their way; what follows them is moved alike."""
    shortened, behind = list(path), np.zeros(3)
    for index in range(first, len(path)):
        if not path[index].measured:
            behind = behind - missing * (np.array(path[index].position) - path[index - 1].position)
        shortened[index] = _moved(path[index], behind)
    return tuple(shortened)


def _wrong_gripper(path: tuple[Waypoint, ...], first: int, shift: int) -> tuple[Waypoint, ...]:
    """Commands that come some waypoints early or late, or that are reversed."""
    last = len(path) - 1
    commands = [path[min(max(i + shift, 0), last)].gripper if shift else -w.gripper for i, w in enumerate(path)]
    wrong = [dataclasses.replace(w, gripper=command) for w, command in zip(path, commands, strict=True)]
    return (*path[:first], *wrong[first:])


def _moved(waypoint: Waypoint, offset: np.ndarray) -> Waypoint:
    x, y, z = (np.array(waypoint.position) + offset).tolist()
    return dataclasses.replace(waypoint, position=(x, y, z))


def _free_motion(rng: np.random.Generator, now: Frames, begun: int) -> _Activity:
    """One to three random poses, above the table or among the fixtures, with fingers that open and close at will."""
    is_near = rng.uniform() < _NEAR_SHARE
    low, high = (_NEAR_LOW, _NEAR_HIGH) if is_near else (_FREE_LOW, _FREE_HIGH)
    gripper, waypoints = int(now.robot_obs[0, 14]), []
    for _ in range(rng.integers(1, 4)):
        x, y, z = rng.uniform(low, high).tolist()
        roll, pitch, yaw = (np.array(scene.DOWN) + rng.uniform(-1, 1, 3) * _TURN).tolist()
        gripper = -gripper if rng.uniform() < 0.35 else gripper
        z = max(z, _ABOVE_TABLE) if y > _TABLE_EDGE else z
        hold = int(rng.integers(0, 5))
        waypoints.append(
            Waypoint((x, y, z), (roll, pitch, yaw), gripper, tolerance=0.02, cap=40, hold=hold, measured=False)
        )
    target = now.target[0]
    plan = Plan(tuple(waypoints), float(rng.uniform(0.3, 0.9)), target[:3].copy(), target[3:].copy())
    return _Activity(plan, begun, noise=0.3 if rng.uniform() < 0.3 else ACTION_NOISE, is_free=True)
