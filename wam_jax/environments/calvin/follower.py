"""A closed-loop follower of waypoints: it sums up what it commands, as the environment does, and steers that target."""

import dataclasses

import numpy as np

from wam_jax.environments.calvin import scene

AS_IS = (np.nan, np.nan, np.nan)  # an orientation that stays what it is
_ANGLE_TOLERANCE = 0.06  # rad
_MEASURED_SHARE = 0.8  # of the measured distance, that must be within the tolerance as well


@dataclasses.dataclass(frozen=True)
class Waypoint:
    """A place for the hand."""

    position: tuple[float, float, float]  # m
    euler: tuple[float, float, float]  # rad; AS_IS: not turned
    gripper: int = scene.GRIPPER_CLOSE
    tolerance: float = 0.012  # m
    speed: float = np.inf  # in units of action, at most the plan's
    hold: int = 0  # steps it is held after it was reached
    cap: int = 60  # steps after which it is given up
    measured: bool = True  # whether the hand itself must arrive; False where it pushes against something


@dataclasses.dataclass(frozen=True)
class Plan:
    """Waypoints, and how far along them the follower is."""

    waypoints: tuple[Waypoint, ...]
    speed: float
    position: np.ndarray  # [3], m, the target that the environment adds the actions to
    euler: np.ndarray  # [3], rad
    index: int = 0
    age: int = 0  # steps spent on this waypoint
    held: int = 0  # of those, since it was reached

    @property
    def done(self) -> bool:
        """Whether all waypoints lie behind."""
        return self.index >= len(self.waypoints)


def act(plan: Plan, robot_obs: np.ndarray, noise: np.ndarray | float = 0.0) -> tuple[Plan, np.ndarray]:
    """The next action; a finished plan stays where it is.

    Args:
      plan: where the follower is.
      robot_obs: [15], measured now.
      noise: added to dx, dy, dz, in units of action; corrected in the next steps.

    Returns:
      the plan after it, and the action, float64 [7], exact in float32.
    """
    plan = _advance(plan, robot_obs)
    waypoint = plan.waypoints[min(plan.index, len(plan.waypoints) - 1)]
    action = np.zeros(7, np.float32)
    action[6] = waypoint.gripper
    if not plan.done:
        action[:3] = np.clip(_limit(_offset(waypoint, plan), min(plan.speed, waypoint.speed)) + noise, -1, 1)
        action[3:6] = _limit(_turn(waypoint, plan) / scene.EULER_SCALE, 1.0)
    action = action.astype(np.float64)
    plan = dataclasses.replace(
        plan,
        position=plan.position + action[:3] * scene.POSITION_SCALE,
        euler=plan.euler + action[3:6] * scene.EULER_SCALE,
        age=plan.age + 1,
    )
    return plan, action


def _advance(plan: Plan, robot_obs: np.ndarray) -> Plan:
    """Goes on to the first waypoint that is neither reached and held nor given up."""
    while not plan.done:
        waypoint = plan.waypoints[plan.index]
        reached = plan.held > 0 or _reached(waypoint, plan, robot_obs)
        if plan.age < waypoint.cap and not reached:
            return plan
        if reached and plan.held < waypoint.hold:
            return dataclasses.replace(plan, held=plan.held + 1)
        plan = dataclasses.replace(plan, index=plan.index + 1, age=0, held=0)
    return plan


def _reached(waypoint: Waypoint, plan: Plan, robot_obs: np.ndarray) -> bool:
    place = np.array(waypoint.position)
    distance = np.abs(place - plan.position).max()
    if waypoint.measured:
        distance = max(distance, _MEASURED_SHARE * np.abs(place - robot_obs[:3]).max())
    return bool(distance < waypoint.tolerance and np.abs(_turn(waypoint, plan)).max() < _ANGLE_TOLERANCE)


def _offset(waypoint: Waypoint, plan: Plan) -> np.ndarray:
    return (np.array(waypoint.position) - plan.position) / scene.POSITION_SCALE


def _turn(waypoint: Waypoint, plan: Plan) -> np.ndarray:
    """Angles from the target to the waypoint's orientation, wrapped."""
    difference = np.nan_to_num(np.array(waypoint.euler) - plan.euler)
    return (difference + np.pi) % (2 * np.pi) - np.pi


def _limit(vector: np.ndarray, largest: float) -> np.ndarray:
    """Scales a vector so that no entry exceeds `largest`: paths stay straight."""
    return vector * min(1.0, largest / max(np.abs(vector).max(), 1e-12))
