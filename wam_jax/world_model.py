"""The world model: embed, observe, imagine, decode. How it is trained: world_model_training.py.

Encoder, RSSM and decoder are DreamerV2's in LUMOS' sizes; WAM adds the inverse-dynamics head. `action_weight` 1000 is
WAM, 0 is the DreamerV2 baseline: the same code.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from wam_jax import inverse_dynamics, prior_ensemble, specs
from wam_jax.networks import recurrence
from wam_jax.networks.decoder import Decoder
from wam_jax.networks.encoder import Encoder
from wam_jax.networks.layers import MLP
from wam_jax.networks.rssm import RSSM, feature, sample_stochastic, stochastic_noise
from wam_jax.prior_ensemble import PriorEnsemble
from wam_jax.types import Array, LatentState, Observation, Params


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
    prior_ensemble: PriorEnsemble | None = None  # imagination's prior is its mixture; None: the RSSM's own


def build(settings: Any) -> WorldModel:
    """Builds the modules from `config.world_model`.

    Raises:
      ValueError: an unknown kind of encoder or compute dtype, or the robot's own state without seeing it.
    """
    if settings.kind not in ("conv", "patch"):
        raise ValueError(f"world_model.kind={settings.kind!r}; expected 'conv' or 'patch'")
    if settings.compute_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"world_model.compute_dtype={settings.compute_dtype!r}; expected 'float32' or 'bfloat16'")
    if settings.robot_state and not settings.proprioception_input:
        raise ValueError("world_model.robot_state=True needs proprioception_input=True, to see the robot's state")
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
    robot = measured_robot(model, embedding)
    noise = _noise(model, rng, len(action))
    return _posterior_step(model, params, latent, projected_action, projected_embedding, robot, noise)


def _noise(model, rng, batch_size: int) -> Array:
    """For z of one step, [B, S]."""
    return stochastic_noise(rng, (batch_size, model.settings.num_latents))


def _noise_of_steps(model, rng, length: int, batch_size: int) -> Array:
    """For z of T steps, each from a key of its own, [T, B, S]: drawn before a loop, where it is one kernel, not T."""
    return jax.vmap(lambda key: _noise(model, key, batch_size))(jax.random.split(rng, length))


def _project_action(model, params, action, robot) -> Array:
    projected = _rssm(model, params, "project_action", action)
    return projected if robot is None else projected + _rssm(model, params, "project_robot", robot)


def measured_robot(model: WorldModel, embedding: Array) -> Array | None:
    """The proprioception that every embedding [..., E] ends with, [..., P], for models whose state has the robot's own.

    It was rounded to the compute dtype there: in bfloat16 by about a thousandth of the range.
    """
    return embedding[..., -specs.PROPRIOCEPTION_DIM :].astype(jnp.float32) if model.settings.robot_state else None


def _posterior_step(model, params, latent, projected_action, projected_embedding, robot, noise) -> LatentState:
    hidden = _rssm(model, params, "recurrent", latent.deterministic, latent.stochastic, projected_action)
    logits = _rssm(model, params, "posterior_logits", hidden, projected_embedding)
    return LatentState(hidden, logits, sample_stochastic(logits, noise), robot)


def imagine_step(model: WorldModel, params: Params, latent: LatentState, action: Array, rng: Array) -> LatentState:
    """One prior step: the state that the model expects after `action` [B, 7] from B states.

    z is sampled; with `settings.soft_prior` it is the prior's probabilities, its expectation, and `rng` has no effect.
    """
    noise = _noise(model, rng, len(action))
    return _prior_step(model, params, latent, _rssm(model, params, "project_action", action), noise)


def _prior_step(model, params, latent, projected_action, noise) -> LatentState:
    robot = latent.robot
    if robot is not None:
        projected_action = projected_action + _rssm(model, params, "project_robot", robot)
    hidden = _rssm(model, params, "recurrent", latent.deterministic, latent.stochastic, projected_action)
    if robot is not None:
        robot = robot + _rssm(model, params, "robot_change", hidden, projected_action)
    logits = _imagined_logits(model, params, hidden)
    soft = model.settings.soft_prior
    return LatentState(hidden, logits, jax.nn.softmax(logits) if soft else sample_stochastic(logits, noise), robot)


def _imagined_logits(model, params, hidden) -> Array:
    if model.prior_ensemble is None:
        return _rssm(model, params, "prior_logits", hidden)
    log_p = prior_ensemble.log_probabilities(model.prior_ensemble, params["prior_ensemble"], hidden)
    return prior_ensemble.mixture(log_p)


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
    robot = measured_robot(model, embedding)
    previous_robot = None if robot is None else jnp.pad(robot[:, :-1], ((0, 0), (1, 0), (0, 0)))
    # Both products are independent of the recurrence: one matrix product for all steps, outside the scan.
    projected_action = _project_action(model, params, previous_action, previous_robot)
    projected_embedding = _rssm(model, params, "project_embedding", embedding)

    def step(rssm_params, latent, inputs, noise):
        return _posterior_step(model, {"rssm": rssm_params}, latent, *inputs, noise)

    time_major = jax.tree.map(lambda x: x.swapaxes(0, 1), (projected_action, projected_embedding, robot))
    noise = _noise_of_steps(model, rng, length, batch_size)
    return _states_after(model, params, step, initial(model, params, batch_size), time_major, noise)


def imagine(
    model: WorldModel, params: Params, latent: LatentState, action: Array, rng: Array, robot: Array | None = None
) -> LatentState:
    """Open loop: imagines H steps under given actions.

    Args:
      model, params: the world model.
      latent: B start states.
      action: float32 [B, H, 7]; action[0] is taken in the start state.
      rng: key for z.
      robot: float32 [B, H, P], recorded states of the robot after the actions in place of imagined ones, for a replay
        of recordings that imagines h and z alone, by a model that carries them; None where the robot is imagined, too.

    Returns:
      prior states after each action, [B, H, ...].
    """

    def step(rssm_params, latent, inputs, noise):
        projected_action, robot = inputs
        latent = _prior_step(model, {**params, "rssm": rssm_params}, latent, projected_action, noise)
        return latent if robot is None else latent.replace(robot=robot)

    projected_action = _rssm(model, params, "project_action", action)  # of all steps, outside the scan
    inputs = jax.tree.map(lambda x: x.swapaxes(0, 1), (projected_action, robot))
    noise = _noise_of_steps(model, rng, action.shape[1], action.shape[0])
    other_layers = model.prior_ensemble is not None
    return _states_after(model, params, step, latent, inputs, noise, other_layers=other_layers)


def _states_after(model, params, step, start: LatentState, inputs, noise, *, other_layers=False) -> LatentState:
    """The states [B, T, ...] that `step(rssm_params, latent, input, noise) -> latent` makes one after another of B."""
    # Products read z in their own dtype, in which one-hot z is exact, and probabilities are not.
    z_dtype = jnp.float32 if model.settings.soft_prior else model.rssm.dtype

    def carried(latent: LatentState) -> LatentState:
        return latent.replace(logits=None, stochastic=latent.stochastic.astype(z_dtype))

    def carry_and_logits(rssm_params, latent, inputs, noise):
        latent = step(rssm_params, latent, inputs, noise)
        return carried(latent), latent.logits

    states, logits = recurrence.scan(
        carry_and_logits, params["rssm"], carried(start), inputs, noise, dtype=model.rssm.dtype,
        other_layers=other_layers,
    )  # fmt: skip
    latents = states.replace(logits=logits, stochastic=states.stochastic.astype(jnp.float32))
    return jax.tree.map(lambda x: x.swapaxes(0, 1), latents)


def imagination_params(model: WorldModel, params: Params) -> Params:
    """What `imagine_step` reads of a frozen model's parameters, kernels in the dtype that they are used in."""

    def cast(path, x):
        return x.astype(model.rssm.dtype) if path[-1].key == "kernel" else x

    read = {name: params[name] for name in ("rssm", "prior_ensemble") if name in params}
    return jax.tree_util.tree_map_with_path(cast, read)


def prior_logits(model: WorldModel, params: Params, latent: LatentState) -> Array:
    """Logits of p(z_t | h_t) of states [...]: float32 [..., S, V]."""
    return _rssm(model, params, "prior_logits", latent.deterministic)


def expected_robot(model: WorldModel, params: Params, posterior: LatentState, action: Array) -> Array | None:
    """The robot's state as each h expects it from the measured one before, [B, T, P]; a first frame's as measured.

    None where the model does not carry it.
    """
    if posterior.robot is None:
        return None
    projected_action = _project_action(model, params, action[:, :-1], posterior.robot[:, :-1])
    change = _rssm(model, params, "robot_change", posterior.deterministic[:, 1:], projected_action)
    return jnp.concatenate([posterior.robot[:, :1], posterior.robot[:, :-1] + change], axis=1)


def decode(model: WorldModel, params: Params, latent: LatentState) -> tuple[Array, Array]:
    """Decodes states [...] into images (static, gripper), uint8 [..., 64, 64, 3]."""
    features = feature(latent)
    images = model.decoder.apply({"params": params["decoder"]}, features.reshape(-1, features.shape[-1]))
    static, gripper = (
        jnp.clip((x + 1) * 127.5, 0, 255).round().astype(jnp.uint8).reshape(*features.shape[:-1], *x.shape[1:])
        for x in images
    )
    return static, gripper
