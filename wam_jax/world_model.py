"""The world model: observe, imagine, loss, update.

Encoder, RSSM and decoder are DreamerV2's in LUMOS' sizes; WAM adds the inverse-dynamics head. `action_weight` 1000 is
WAM, 0 is the DreamerV2 baseline: the same code.

Where this departs knowingly from the public LUMOS implementation:
  - every window starts from the learned initial state with a neutral previous action; LUMOS carries the last state
    of one window into the next batch and so leaks it over most episode boundaries;
  - gradients are clipped at their true norm; LUMOS clips them while still multiplied by its loss scale;
  - images are averaged over batch and time and summed over pixels and channels, the KL is summed over latents.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from wam_jax import inverse_dynamics, specs
from wam_jax.networks import recurrence
from wam_jax.networks.decoder import Decoder
from wam_jax.networks.encoder import Encoder, normalize_image
from wam_jax.networks.layers import MLP
from wam_jax.networks.rssm import RSSM, categorical_kl, feature, sample_stochastic
from wam_jax.optimizers import adamw
from wam_jax.parallel import pmean
from wam_jax.types import Array, LatentState, Metrics, Observation, Params, StepBatch


@dataclasses.dataclass(frozen=True)
class WorldModel:
    """The modules and settings of one world model: static, hashable, without parameters."""

    encoder: Encoder
    rssm: RSSM
    decoder: Decoder
    inverse_dynamics: MLP
    proprioception_decoder: MLP
    scene_decoder: MLP
    settings: Any  # FrozenConfigDict, config.world_model


@flax.struct.dataclass
class WorldModelState:
    """Everything a world-model update changes."""

    params: Params  # float32, one subtree per module of WorldModel
    optimizer_state: optax.OptState
    step: Array  # int32 [], updates done


def build(settings: Any) -> WorldModel:
    """Builds the modules from `config.world_model`.

    Raises:
      ValueError: an unknown kind of encoder or compute dtype.
    """
    if settings.kind not in ("conv", "patch"):
        raise ValueError(f"world_model.kind={settings.kind!r}; expected 'conv' or 'patch'")
    if settings.compute_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"world_model.compute_dtype={settings.compute_dtype!r}; expected 'float32' or 'bfloat16'")
    dtype = jnp.dtype(settings.compute_dtype)
    return WorldModel(
        encoder=Encoder(
            settings.kind, settings.encoder_width, settings.fused_dim, settings.proprioception_input, dtype
        ),
        rssm=RSSM(
            settings.deterministic_dim,
            settings.num_latents,
            settings.num_classes,
            settings.rssm_hidden_dim,
            _robot_dim(settings),
            dtype,
        ),
        decoder=Decoder(settings.kind, settings.decoder_width, settings.decoder_dim, dtype),
        inverse_dynamics=inverse_dynamics.build(tuple(settings.inverse_dynamics_dims), dtype),
        proprioception_decoder=MLP(tuple(settings.proprioception_dims), specs.PROPRIOCEPTION_DIM, dtype),
        scene_decoder=MLP(tuple(settings.scene_dims), specs.NUM_MECHANISMS, dtype),
        settings=settings,
    )


def feature_dim(settings: Any) -> int:
    """Size of [h; z]: D + S*V, and P more with the robot's own state."""
    return settings.deterministic_dim + settings.num_latents * settings.num_classes + _robot_dim(settings)


def _robot_dim(settings: Any) -> int:
    return specs.PROPRIOCEPTION_DIM * settings.robot_state


def embedding_dim(settings: Any) -> int:
    """Size of an embedding, E."""
    return settings.fused_dim + settings.proprioception_input * specs.PROPRIOCEPTION_DIM


def init(model: WorldModel, rng: Array) -> Params:
    """Initial parameters, float32. Heads of weight 0 have none."""
    settings = model.settings
    rngs = jax.random.split(rng, 5)
    image = jnp.zeros((1, specs.IMAGE_SIZE, specs.IMAGE_SIZE, 3), jnp.uint8)
    embedding = jnp.zeros((1, embedding_dim(settings)))
    latent_feature = jnp.zeros((1, feature_dim(settings)))
    params = {
        "encoder": model.encoder.init(rngs[0], image, image, jnp.zeros((1, specs.PROPRIOCEPTION_DIM))),
        "rssm": model.rssm.init(rngs[1], jnp.zeros((1, specs.ACTION_DIM)), embedding),
        "decoder": model.decoder.init(rngs[2], latent_feature),
    }
    if settings.action_weight:
        frame = embedding if settings.action_input == "embeddings" else latent_feature
        pair = jnp.zeros((1, inverse_dynamics.input_dim(frame.shape[-1], settings.action_steps)))
        params["inverse_dynamics"] = model.inverse_dynamics.init(rngs[3], pair)
    if settings.proprioception_weight and not settings.robot_state:
        params["proprioception_decoder"] = model.proprioception_decoder.init(rngs[4], latent_feature)
    if settings.scene_weight:
        params["scene_decoder"] = model.scene_decoder.init(jax.random.fold_in(rng, 5), latent_feature)
    return {name: variables["params"] for name, variables in params.items()}


# --- Observing and imagining ---


def _rssm(model: WorldModel, params: Params, method: str, *args):
    return model.rssm.apply({"params": params["rssm"]}, *args, method=method)


def embed(model: WorldModel, params: Params, observation: Observation) -> Array:
    """Encodes frames of any leading axes [...]; returns embeddings [..., E]."""
    leading = observation.robot_obs.shape[:-1]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(leading) :]), observation)
    proprioception = specs.proprioception(flat.robot_obs)
    embedding = model.encoder.apply({"params": params["encoder"]}, flat.rgb_static, flat.rgb_gripper, proprioception)
    return embedding.reshape(*leading, -1)


def initial(model: WorldModel, params: Params, batch_size: int) -> LatentState:
    """The state before the first frame of B episodes."""
    return _rssm(model, params, "initial", batch_size)


def observe_step(
    model: WorldModel, params: Params, latent: LatentState, action: Array, observation: Observation, rng: Array
) -> LatentState:
    """One filtering step: the state after `action` led to `observation`.

    Args:
      model, params: the world model.
      latent: B states.
      action: float32 [B, 7], the action before the observation; specs.NEUTRAL_ACTION before the first frame.
      observation: B frames.
      rng: key for z.

    Returns:
      B posterior states.
    """
    projected_action = _project_action(model, params, action, latent.robot)
    embedding = embed(model, params, observation)
    projected_embedding = _rssm(model, params, "project_embedding", embedding)
    robot = _measured_robot(model, embedding)
    return _posterior_step(model, params, latent, projected_action, projected_embedding, robot, rng)


def _project_action(model, params, action, robot) -> Array:
    projected = _rssm(model, params, "project_action", action)
    return projected if robot is None else projected + _rssm(model, params, "project_robot", robot)


def _measured_robot(model, embedding) -> Array | None:
    """The proprioception that every embedding ends with, for models whose state has the robot's own."""
    return embedding[..., -specs.PROPRIOCEPTION_DIM :].astype(jnp.float32) if model.settings.robot_state else None


def _posterior_step(model, params, latent, projected_action, projected_embedding, robot, rng) -> LatentState:
    hidden = _rssm(model, params, "recurrent", latent.deterministic, latent.stochastic, projected_action)
    logits = _rssm(model, params, "posterior_logits", hidden, projected_embedding)
    return LatentState(hidden, logits, sample_stochastic(logits, rng), robot)


def imagine_step(model: WorldModel, params: Params, latent: LatentState, action: Array, rng: Array) -> LatentState:
    """One prior step: the state that the model expects after `action` [B, 7] from B states.

    z is sampled; with `settings.soft_prior` it is the prior's probabilities, its expectation, and `rng` has no effect.
    """
    return _prior_step(model, params, latent, _rssm(model, params, "project_action", action), rng)


def _prior_step(model, params, latent, projected_action, rng) -> LatentState:
    robot = latent.robot
    if robot is not None:
        projected_action = projected_action + _rssm(model, params, "project_robot", robot)
    hidden = _rssm(model, params, "recurrent", latent.deterministic, latent.stochastic, projected_action)
    if robot is not None:
        robot = robot + _rssm(model, params, "robot_change", hidden)
    logits = _rssm(model, params, "prior_logits", hidden)
    soft = model.settings.soft_prior
    return LatentState(hidden, logits, jax.nn.softmax(logits) if soft else sample_stochastic(logits, rng), robot)


def observe(model: WorldModel, params: Params, embedding: Array, action: Array, rng: Array) -> LatentState:
    """Filters whole windows from the initial state.

    Args:
      model, params: the world model.
      embedding: [B, T, E].
      action: float32 [B, T, 7], action[t] is taken at frame t; the last one is not used.
      rng: key for z.

    Returns:
      posterior states [B, T, ...].
    """
    batch_size, length = embedding.shape[:2]
    neutral = jnp.broadcast_to(jnp.asarray(specs.NEUTRAL_ACTION), (batch_size, 1, specs.ACTION_DIM))
    previous_action = jnp.concatenate([neutral, action[:, :-1]], axis=1)
    robot = _measured_robot(model, embedding)
    previous_robot = None if robot is None else jnp.pad(robot[:, :-1], ((0, 0), (1, 0), (0, 0)))
    # Both products are independent of the recurrence: one matrix product for all steps, outside the scan.
    projected_action = _project_action(model, params, previous_action, previous_robot)
    projected_embedding = _rssm(model, params, "project_embedding", embedding)

    def step(rssm_params, latent, inputs, rng):
        latent = _posterior_step(model, {"rssm": rssm_params}, latent, *inputs, rng)
        return latent, latent

    time_major = jax.tree.map(lambda x: x.swapaxes(0, 1), (projected_action, projected_embedding, robot))
    start = initial(model, params, batch_size)
    _, latents = recurrence.scan(step, params["rssm"], start, time_major, jax.random.split(rng, length))
    return jax.tree.map(lambda x: x.swapaxes(0, 1), latents)


def imagine(model: WorldModel, params: Params, latent: LatentState, action: Array, rng: Array) -> LatentState:
    """Open loop: imagines H steps under given actions.

    Args:
      model, params: the world model.
      latent: B start states.
      action: float32 [B, H, 7]; action[0] is taken in the start state.
      rng: key for z.

    Returns:
      prior states after each action, [B, H, ...].
    """

    def step(latent, inputs):
        latent = _prior_step(model, params, latent, *inputs)
        return latent, latent

    projected_action = _rssm(model, params, "project_action", action).swapaxes(0, 1)  # of all steps, outside the scan
    _, latents = lax.scan(step, latent, (projected_action, jax.random.split(rng, action.shape[1])))
    return jax.tree.map(lambda x: x.swapaxes(0, 1), latents)


def decode(model: WorldModel, params: Params, latent: LatentState) -> tuple[Array, Array]:
    """Decodes states [...] into images (static, gripper), uint8 [..., 64, 64, 3]."""
    features = feature(latent)
    images = model.decoder.apply({"params": params["decoder"]}, features.reshape(-1, features.shape[-1]))
    static, gripper = (
        jnp.clip((x + 1) * 127.5, 0, 255).round().astype(jnp.uint8).reshape(*features.shape[:-1], *x.shape[1:])
        for x in images
    )
    return static, gripper


# --- Loss and update ---


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
    embedding = embed(model, params, batch.observation)
    posterior = observe(model, params, embedding, batch.action, observe_rng)
    features = feature(posterior)

    terms = {
        "reconstruction": _reconstruction(model, params, features, batch.observation),
        "kl": _balanced_kl(
            posterior.logits,
            _prior_logits(model, params, posterior),
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
    expected_robot = _expected_robot(model, params, posterior)
    for name, error in _state_errors(model, params, features, expected_robot, batch.observation).items():
        terms[name], weights[name] = error, settings[f"{name}_weight"]
    if settings.open_loop_weight:
        terms["open_loop"], open_loop_metrics = _open_loop(model, params, posterior, batch, open_loop_rng)
        weights["open_loop"] = settings.open_loop_weight
        metrics = metrics | open_loop_metrics
    total = sum(weights[name] * term for name, term in terms.items())
    return total, {"loss": total} | terms | metrics


def _prior_logits(model, params, latents: LatentState) -> Array:
    return _rssm(model, params, "prior_logits", latents.deterministic)


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


def _expected_robot(model, params, posterior: LatentState) -> Array | None:
    """The robot's state as each h expects it from the measured one before [B, T, P]; a first frame's as measured."""
    if posterior.robot is None:
        return None
    change = _rssm(model, params, "robot_change", posterior.deterministic[:, 1:])
    return jnp.concatenate([posterior.robot[:, :1], posterior.robot[:, :-1] + change], axis=1)


def _state_errors(model, params, features: Array, robot: Array | None, observation: Observation) -> Metrics:
    """Half the squared error of the robot's and of the scene's state, of those that have a weight.

    The robot's is `robot`, where the model carries it, else what is decoded from the features, as the scene's.
    """
    errors = {}
    if model.settings.proprioception_weight:
        predicted = robot
        if robot is None:
            predicted = model.proprioception_decoder.apply({"params": params["proprioception_decoder"]}, features)
        errors["proprioception"] = predicted - specs.proprioception(observation.robot_obs)
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
    imagined = imagine(model, params, start, segments(batch.action)[:, :-1], rng)
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
    params = init(model, rng)
    return WorldModelState(params, make_optimizer(model.settings).init(params), jnp.zeros((), jnp.int32))


def update(
    state: WorldModelState, batch: StepBatch, rng: Array, *, model: WorldModel, axis_name: str | None = None
) -> tuple[WorldModelState, Metrics]:
    """One gradient step of `loss`, averaged over the devices of `axis_name`."""
    gradients, metrics = jax.grad(functools.partial(loss, model=model), has_aux=True)(state.params, batch, rng)
    gradients = pmean(gradients, axis_name)
    metrics = pmean(metrics | {"gradient_norm": optax.global_norm(gradients)}, axis_name)
    updates, optimizer_state = make_optimizer(model.settings).update(gradients, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return WorldModelState(params, optimizer_state, state.step + 1), metrics
