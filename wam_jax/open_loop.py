"""What probes decode while the world model filters real frames, and while it imagines with true actions."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wam_jax import diffusion_policy, intervals, probes, world_model
from wam_jax.probes import Probe, Quantity
from wam_jax.types import Array, Params, StepBatch
from wam_jax.world_model import WorldModel

_BATCH = 32  # windows at a time, always that many: one program serves all


class Windows(NamedTuple):
    """Encoded steps of W windows, without their images; numpy."""

    embedding: np.ndarray  # [W, T, E]
    action: np.ndarray  # float32 [W, T, 7], action[t] is taken at frame t
    state: np.ndarray  # float64 [W, T, K], see probes.STATE


class Probes(NamedTuple):
    """Fitted on the latents of training windows."""

    state: Probe  # of the latent
    latent_action: Probe  # of two latents in a row; their recurrent part has met the action
    embedding_action: Probe  # of two embeddings in a row, as the inverse dynamics


def encode(model: WorldModel, params: Params, batches: Iterable[StepBatch]) -> Windows:
    """Encodes batches of windows [B, T, ...] one after another; their images are let go."""
    embed = _embed(model)
    parts = []
    for batch in batches:
        embedding = _in_batches(functools.partial(embed, params), batch.observation)
        parts.append(Windows(embedding, np.asarray(batch.action), probes.state_targets(batch.observation)))
    return Windows(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def filtered(model: WorldModel, params: Params, windows: Windows, rng: Array, *, settings: Any) -> np.ndarray:
    """What policy and classifier see of the posterior at each frame: [W, T, state_dim].

    Args:
      model, params: the world model.
      windows: filtered from the initial state, each from its first frame.
      rng: key for z.
      settings: of the diffusion policy.
    """
    return _in_batches(functools.partial(_filter(model, settings), params, rng), windows.embedding, windows.action)


def imagined(
    model: WorldModel,
    params: Params,
    windows: Windows,
    rng: Array,
    *,
    settings: Any,
    first: int,
    context: int,
    horizon: int,
    recorded_robot: bool = False,
) -> np.ndarray:
    """What they see while the model imagines with the true actions.

    Args:
      model, params: the world model.
      windows: whose actions are taken.
      rng: key for z.
      settings: of the diffusion policy.
      first: the last frame that is seen; imagination begins after it.
      context: frames that are filtered, up to that one.
      horizon: H, steps to imagine.
      recorded_robot: the robot moves as recorded, in a model that carries its state: see `world_model.imagine`.

    Returns:
      features [W, H + 1, state_dim]: the posterior of frame `first`, then of each imagined step.

    Raises:
      ValueError: `recorded_robot` for a model that does not carry the robot's state.
    """
    if recorded_robot and not model.settings.robot_state:
        raise ValueError("world_model.robot_state=False: this model carries no state of the robot to replace")
    imagine = functools.partial(_imagine(model, settings), params, rng)
    seen, taken = slice(first + 1 - context, first + 1), slice(first, first + horizon)
    inputs = [windows.embedding[:, seen], windows.action[:, seen], windows.action[:, taken]]
    if recorded_robot:
        inputs.append(windows.embedding[:, first + 1 : first + 1 + horizon])
    return _in_batches(imagine, *inputs)


def fit_probes(windows: Windows, features: np.ndarray) -> Probes:
    """Fits all probes on training windows and their filtered features."""
    action = _rows(windows.action[:, :-1])
    return Probes(
        state=probes.fit(_rows(features), _rows(windows.state)),
        latent_action=probes.fit(_rows(pairs(features)), action),
        embedding_action=probes.fit(_rows(pairs(windows.embedding)), action),
    )


def pairs(features: np.ndarray) -> np.ndarray:
    """Each step beside the next: [W, T, F] -> [W, T - 1, 2F]."""
    return np.concatenate([features[:, :-1], features[:, 1:]], axis=-1)


def held_out(fitted: Probes, windows: Windows, features: np.ndarray) -> dict[str, Any]:
    """The probes' error on all frames of held-out windows, by what they decode from, with intervals over windows."""
    action = windows.action[:, :-1].astype(np.float64)
    return {
        "state from latents": _figures(fitted.state(features), windows.state, probes.STATE),
        "action from latents": _figures(fitted.latent_action(pairs(features)), action, probes.ACTION),
        "action from embeddings": _figures(fitted.embedding_action(pairs(windows.embedding)), action, probes.ACTION),
        "penalties": {name: probe.penalty.tolist() for name, probe in fitted._asdict().items()},
    }


def curves(
    fitted: Probes, features: np.ndarray, windows: Windows, *, first: int, horizons: Sequence[int]
) -> dict[str, Any]:
    """Errors against the horizon.

    Args:
      fitted: the probes.
      features: [W, H + 1, state_dim], at the frames from `first` on.
      windows: what was true.
      first: the frame before the first step.
      horizons: in steps, up to H.

    Returns:
      by quantity: unit, and rmse, low, high (95 %, over windows) and r2, one number for each horizon.
    """
    state = fitted.state(features[:, horizons])
    action = fitted.latent_action(np.concatenate([features[:, [h - 1 for h in horizons]], features[:, horizons]], -1))
    frames = [first + h for h in horizons]
    true_action = windows.action[:, [frame - 1 for frame in frames]].astype(np.float64)
    return state_curves(state, windows, frames) | _by_horizon(action, true_action, probes.ACTION)


def state_curves(decoded: np.ndarray, windows: Windows, frames: Sequence[int]) -> dict[str, Any]:
    """The same for states [W, len(frames), K], however they were predicted."""
    return _by_horizon(decoded, windows.state[:, frames], probes.STATE)


def _by_horizon(decoded: np.ndarray, true: np.ndarray, quantities: Sequence[Quantity]) -> dict[str, Any]:
    error = probes.squared_error(decoded, true, quantities)  # [W, horizons, Q]
    low, high = intervals.of_mean(error)
    explained = [probes.r2(error[:, i], true[:, i], quantities) for i in range(true.shape[1])]
    return {
        quantity.name: {
            "unit": quantity.unit,
            "rmse": np.sqrt(error[..., q].mean(axis=0)).tolist(),
            "low": np.sqrt(low[:, q]).tolist(),
            "high": np.sqrt(high[:, q]).tolist(),
            "r2": [of_horizon[q] for of_horizon in explained],
        }
        for q, quantity in enumerate(quantities)
    }


def _figures(decoded: np.ndarray, true: np.ndarray, quantities: Sequence[Quantity]) -> dict[str, Any]:
    error = probes.squared_error(decoded, true, quantities)  # [W, T, Q]
    low, high = intervals.of_mean(error.mean(axis=1))
    explained = probes.r2(_rows(error), _rows(true), quantities)
    rmse = np.sqrt(error.mean(axis=(0, 1)))
    return {
        quantity.name: {
            "unit": quantity.unit,
            "rmse": float(rmse[q]),
            "low": float(np.sqrt(low[q])),
            "high": float(np.sqrt(high[q])),
            "r2": explained[q],
        }
        for q, quantity in enumerate(quantities)
    }


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def _in_batches(function: Callable, *inputs: Any) -> np.ndarray:
    """Applies a compiled function to `_BATCH` rows at a time; the last batch is filled up and cut again."""
    size = len(jax.tree.leaves(inputs)[0])
    parts = []
    for start in range(0, size, _BATCH):
        rows = np.minimum(np.arange(start, start + _BATCH), size - 1)
        batch = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], inputs)
        parts.append(np.asarray(function(*batch), np.float32)[: size - start])
    return np.concatenate(parts)


@functools.lru_cache(maxsize=4)
def _embed(model: WorldModel):
    return jax.jit(functools.partial(world_model.embed, model))


@functools.lru_cache(maxsize=4)
def _filter(model: WorldModel, settings: Any):
    @jax.jit
    def run(params, rng, embedding, action):
        return diffusion_policy.features(world_model.observe(model, params, embedding, action, rng), settings=settings)

    return run


@functools.lru_cache(maxsize=8)
def _imagine(model: WorldModel, settings: Any):
    @jax.jit
    def run(params, rng, embedding, seen_action, action, following=None):
        observe_rng, imagine_rng = jax.random.split(rng)
        posterior = world_model.observe(model, params, embedding, seen_action, observe_rng)
        start = jax.tree.map(lambda x: x[:, -1], posterior)
        robot = None if following is None else world_model.measured_robot(model, following)
        steps = world_model.imagine(model, params, start, action, imagine_rng, robot)
        film = jax.tree.map(lambda x, y: jnp.concatenate([x[:, None], y], axis=1), start, steps)
        return diffusion_policy.features(film, settings=settings)

    return run
