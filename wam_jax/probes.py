"""Linear probes: what of the robot, the table and the action can be read off latents by ridge regression.

A probe is fitted in closed form on latents of the play dataset, whose states of the table the world model never saw.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from wam_jax import specs
from wam_jax.types import Observation

PENALTIES = (1e-8, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # on standardised features, per row
_MIN_SCALE = 0.01  # added to a feature's deviation, so that what hardly moves is not blown up
_HELD_OUT = 5  # one row in so many chooses the penalty
_MIN_STD = 1e-6  # of a target, in its own unit; what moves less is a constant


@dataclasses.dataclass(frozen=True)
class Quantity:
    """Something that probes decode: consecutive columns of the targets."""

    name: str
    start: int
    stop: int
    unit: str


def _quantities(sizes: Sequence[tuple[str, int, str]]) -> tuple[Quantity, ...]:
    ends = np.cumsum([size for _, size, _ in sizes])
    return tuple(
        Quantity(name, int(end) - size, int(end), unit) for (name, size, unit), end in zip(sizes, ends, strict=True)
    )


STATE = _quantities(
    (
        ("hand", 3, "cm"),
        ("opening", 1, "cm"),
        ("slider", 1, "cm"),
        ("drawer", 1, "cm"),
        ("button", 1, "cm"),
        ("switch", 1, "cm"),
        ("lightbulb", 1, "0 or 1"),
        ("led", 1, "0 or 1"),
        ("block 1", 3, "cm"),
        ("block 2", 3, "cm"),
        ("block 3", 3, "cm"),
    )
)
ACTION = _quantities((("translation", 3, "of 1"), ("rotation", 3, "of 1"), ("gripper", 1, "-1 or 1")))
_MECHANISMS = ("slider", "drawer", "button", "switch", "lightbulb", "led")  # in the order of scene_obs
_CENTIMETRES = 100.0


def state_targets(observation: Observation) -> np.ndarray:
    """The columns that STATE names, float64 [..., 19], lengths in cm."""
    robot, scene = (np.asarray(x, np.float64) for x in (observation.robot_obs, observation.scene_obs))
    blocks = [_CENTIMETRES * scene[..., i : i + 3] for i in range(specs.BLOCKS, specs.SCENE_OBS_DIM, 6)]
    lengths = [_CENTIMETRES * x for x in (robot[..., :3], robot[..., 6:7], scene[..., : specs.LIGHTBULB])]
    return np.concatenate([*lengths, scene[..., specs.LIGHTBULB : specs.BLOCKS], *blocks], axis=-1)


def quantity(name: str) -> Quantity:
    """A quantity of STATE by its name."""
    return next(found for found in STATE if found.name == name)


def task_quantity(task: str) -> Quantity:
    """What the oracle looks at for a task."""
    return quantity(_MECHANISMS[specs.task_mechanism(task)])


@dataclasses.dataclass(frozen=True)
class Probe:
    """A linear map from features to targets."""

    weights: np.ndarray  # float64 [F, K]
    bias: np.ndarray  # float64 [K]
    penalty: np.ndarray  # float64 [K], of each target's own fit

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Decodes [..., F] to float64 [..., K]."""
        return np.asarray(features, np.float64) @ self.weights + self.bias


def fit(features: np.ndarray, targets: np.ndarray) -> Probe:
    """Ridge regression, (X'X / n + penalty) w = X'y / n on standardised features, in closed form.

    Each target's penalty is the one of PENALTIES that errs least on every fifth stretch of rows, which the fit does not
    see: what one feature says outright needs none, what all of them say together needs much.

    Args:
      features: [N, F], rows in their order in time.
      targets: [N, K].

    Raises:
      ValueError: too few rows to hold some out, or a number that is not finite.
    """
    features, targets = np.asarray(features, np.float64), np.asarray(targets, np.float64)
    if len(features) < 2 * _HELD_OUT:
        raise ValueError(f"{len(features)} rows are too few for a probe; give it at least {2 * _HELD_OUT}")
    stretch = (
        np.arange(len(features)) * 10 * _HELD_OUT // len(features)
    )  # neighbours in time are alike: keep them together
    held = stretch % _HELD_OUT == 0
    mean, target_mean = features[~held].mean(axis=0), targets[~held].mean(axis=0)
    scale = features[~held].std(axis=0) + _MIN_SCALE
    rows, centred = (features[~held] - mean) / scale, targets[~held] - target_mean
    gram, moment = rows.T @ rows / len(rows), rows.T @ centred / len(rows)
    held_rows, held_targets = (features[held] - mean) / scale, targets[held] - target_mean
    weights = np.stack([np.linalg.solve(gram + penalty * np.eye(len(gram)), moment) for penalty in PENALTIES])
    error = np.square(held_rows @ weights - held_targets).mean(axis=1)  # [penalties, K]
    if not np.isfinite(error).all():
        raise ValueError(
            f"a probe erred by {error.max()}: its features or targets hold numbers that are not finite; look for them "
            "in the dataset and in the world model's losses"
        )
    best = error.argmin(axis=0)
    chosen = weights[best, :, np.arange(len(best))].T / scale[:, None]
    return Probe(chosen, target_mean - mean @ chosen, np.array(PENALTIES)[best])


def squared_error(decoded: np.ndarray, targets: np.ndarray, quantities: Sequence[Quantity]) -> np.ndarray:
    """Squared Euclidean error of each quantity, in its unit squared: [..., K] -> [..., len(quantities)]."""
    square = np.square(np.asarray(decoded, np.float64) - targets)
    return np.stack([square[..., q.start : q.stop].sum(axis=-1) for q in quantities], axis=-1)


def r2(error: np.ndarray, targets: np.ndarray, quantities: Sequence[Quantity]) -> list[float]:
    """Share of each quantity's variance that is explained.

    Args:
      error: [N, Q], from `squared_error`.
      targets: [N, K].
      quantities: Q of them.

    Returns:
      Q numbers, at most 1; NaN for what does not move.
    """
    variance = [targets[:, q.start : q.stop].var(axis=0).sum() for q in quantities]
    return [
        float(1 - e / v) if v > _MIN_STD**2 else float("nan") for e, v in zip(error.mean(axis=0), variance, strict=True)
    ]
