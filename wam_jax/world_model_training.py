"""The world model's training: loss and update.

Where this departs knowingly from the public LUMOS implementation:
  - every window starts from the learned initial state with a neutral previous action; LUMOS carries the last state
    of one window into the next batch and so leaks it over most episode boundaries;
  - gradients are clipped at their true norm; LUMOS clips them while still multiplied by its loss scale;
  - images are averaged over batch and time and summed over pixels and channels, the KL is summed over latents.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from wam_jax import inverse_dynamics, specs, world_model
from wam_jax.networks.encoder import normalize_image
from wam_jax.networks.rssm import categorical_kl, feature
from wam_jax.optimizers import adamw
from wam_jax.parallel import pmean
from wam_jax.types import Array, LatentState, Metrics, Observation, Params, StepBatch
from wam_jax.world_model import WorldModel


@flax.struct.dataclass
class WorldModelState:
    """Everything a world-model update changes."""

    params: Params  # float32, one subtree per module of WorldModel
    optimizer_state: optax.OptState
    step: Array  # int32 [], updates done


def loss(params: Params, batch: StepBatch, rng: Array, *, model: WorldModel) -> tuple[Array, Metrics]:
    """WAM's loss: KL + reconstruction + inverse dynamics, each times its weight (WAM eq. of section III).

    Args:
      params: of `model`.
      batch: windows [B, T, ...].
      rng: key for z.
      model: from `build`; `model.settings` holds the weights. Reductions: every term is a mean over batch and time;
        the reconstruction is half the squared error summed over pixels and channels of both cameras, the KL is in nats
        summed over latents, that of a window's first frame times `first_kl_weight`, the action term is the absolute
        error averaged over the 7 dims.

    Returns:
      the weighted sum and every unweighted term as a metric.
    """
    settings = model.settings
    observe_rng, open_loop_rng = jax.random.split(rng)
    embedding = world_model.embed(model, params, batch.observation)
    posterior = world_model.observe(model, params, embedding, batch.action, observe_rng)
    features = feature(posterior)

    terms = {
        "reconstruction": _reconstruction(model, params, features, batch.observation),
        "kl": _balanced_kl(
            posterior.logits,
            world_model.prior_logits(model, params, posterior),
            settings.kl_balance,
            _frame_weights(batch.action.shape[1], settings.first_kl_weight),
        ),
    }
    weights = {"reconstruction": 1.0, "kl": settings.kl_weight}
    metrics: Metrics = {}
    if settings.action_weight:
        frames = embedding if settings.action_input == "embeddings" else features
        terms["inverse_dynamics"], metrics = inverse_dynamics.loss(
            params["inverse_dynamics"],
            (frames.astype(jnp.float32), batch.action),
            jax.random.fold_in(rng, 2),  # its own: `split` has used 0 and 1
            head=model.inverse_dynamics,
            max_steps=settings.action_steps,
            shuffled=settings.action_target == "shuffled",
        )
        weights["inverse_dynamics"] = settings.action_weight
    expected_robot = world_model.expected_robot(model, params, posterior, batch.action)
    for name, error in _state_errors(model, params, features, expected_robot, batch.observation).items():
        terms[name], weights[name] = error, settings[f"{name}_weight"]
    if settings.open_loop_weight:
        terms["open_loop"], open_loop_metrics = _open_loop(model, params, posterior, batch, open_loop_rng)
        weights["open_loop"] = settings.open_loop_weight
        metrics = metrics | open_loop_metrics
    total = sum(weights[name] * term for name, term in terms.items())
    return total, {"loss": total} | terms | metrics


def _reconstruction(model, params, features: Array, observation: Observation) -> Array:
    images = model.decoder.apply({"params": params["decoder"]}, features.reshape(-1, features.shape[-1]))
    targets = [normalize_image(x).reshape(-1, *x.shape[-3:]) for x in (observation.rgb_static, observation.rgb_gripper)]
    static, gripper = (0.5 * jnp.square(x - y).sum(axis=(1, 2, 3)) for x, y in zip(images, targets, strict=True))
    return jnp.mean(static + gripper)


def _balanced_kl(posterior_logits: Array, prior_logits: Array, balance: float, frame_weights: Array) -> Array:
    """DreamerV2 eq. 6: the prior moves towards the posterior with weight `balance`, the posterior with the rest."""
    train_prior = (frame_weights * categorical_kl(lax.stop_gradient(posterior_logits), prior_logits)).mean()
    train_posterior = (frame_weights * categorical_kl(posterior_logits, lax.stop_gradient(prior_logits))).mean()
    return balance * train_prior + (1 - balance) * train_posterior


def _frame_weights(length: int, first: float) -> np.ndarray:
    """Weights of a window's frames in the KL [T]: `first`, then 1. At 0 both sides of the first KL go untrained.

    The prior of a first frame knows nothing of the scene and is never used: imagination starts from a posterior.
    """
    return np.where(np.arange(length) == 0, np.float32(first), np.float32(1))


def _state_errors(model, params, features: Array, robot: Array | None, observation: Observation) -> Metrics:
    """Half the squared error of the robot's and of the scene's state, of those that have a weight.

    The robot's is `robot`, where the model carries it, else what is decoded from the features, as the scene's.
    """
    errors = {}
    if model.settings.proprioception_weight:
        if robot is None:
            robot = model.proprioception_decoder.apply({"params": params["proprioception_decoder"]}, features)
        errors["proprioception"] = robot - specs.proprioception(observation.robot_obs)
    if model.settings.scene_weight:
        predicted = model.scene_decoder.apply({"params": params["scene_decoder"]}, features)
        errors["scene"] = predicted - specs.scaled_mechanisms(observation.scene_obs)
    return {name: 0.5 * jnp.square(error).sum(-1).mean() for name, error in errors.items()}


def _open_loop(model, params, posterior: LatentState, batch: StepBatch, rng: Array) -> tuple[Array, Metrics]:
    """Multi-step open-loop loss (latent overshooting, PlaNet eq. 6): imagined priors against the posteriors.

    Each window is cut into segments of `open_loop_steps`; from the posterior at each segment's start the model imagines
    the rest of the segment with the true actions. KL(sg(posterior) || imagined prior), averaged over the steps, plus
    the error of the states that are decoded from the imagined features, of the decoders that are used.
    """
    steps = model.settings.open_loop_steps
    num_segments = batch.action.shape[1] // steps
    if num_segments == 0:
        raise ValueError(f"world_model.open_loop_steps={steps} exceeds the window of {batch.action.shape[1]} steps")

    def segments(x):
        return x[:, : num_segments * steps].reshape(-1, steps, *x.shape[2:])

    posterior = jax.tree.map(segments, posterior)
    start = jax.tree.map(lambda x: x[:, 0], posterior)
    imagined = world_model.imagine(model, params, start, segments(batch.action)[:, :-1], rng)
    kl = categorical_kl(lax.stop_gradient(posterior.logits[:, 1:]), imagined.logits).mean()
    total = model.settings.kl_weight * kl
    observation = jax.tree.map(lambda x: segments(x)[:, 1:], batch.observation)
    errors = _state_errors(model, params, feature(imagined), imagined.robot, observation)
    for name, error in errors.items():
        total = total + model.settings[f"{name}_weight"] * error
    return total, {"open_loop_kl": kl} | {f"open_loop_{name}": error for name, error in errors.items()}


def make_optimizer(settings: Any) -> optax.GradientTransformation:
    """AdamW as in LUMOS and WAM: weight decay on every parameter, epsilon 1e-5, true gradients clipped."""
    final_share = settings.final_learning_rate / settings.learning_rate
    return adamw(
        optax.cosine_decay_schedule(settings.learning_rate, settings.num_steps, alpha=final_share),
        weight_decay=settings.weight_decay,
        epsilon=settings.adam_epsilon,
        max_gradient_norm=settings.max_gradient_norm,
    )


def create_state(model: WorldModel, rng: Array) -> WorldModelState:
    """The state before the first update."""
    return first_state(world_model.init(model, rng), model.settings)


def first_state(params: Params, settings: Any) -> WorldModelState:
    """The state before the first update, of given parameters."""
    return WorldModelState(params, make_optimizer(settings).init(params), jnp.zeros((), jnp.int32))


def update(
    state: WorldModelState, batch: StepBatch, rng: Array, *, model: WorldModel, axis_name: str | None = None
) -> tuple[WorldModelState, Metrics]:
    """One gradient step of `loss`, averaged over the devices of `axis_name`."""
    gradients, metrics = jax.grad(functools.partial(loss, model=model), has_aux=True)(state.params, batch, rng)
    gradients = pmean(gradients, axis_name)
    metrics = pmean(metrics | {"gradient_norm": optax.tree.norm(gradients)}, axis_name)
    updates, optimizer_state = make_optimizer(model.settings).update(gradients, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return WorldModelState(params, optimizer_state, state.step + 1), metrics
