"""Diffusion policy on the latents of the world model: DDPM over chunks of actions (Ho et al. 2020; Chi et al. 2023).

The network predicts noise; the chunk x_0 has C actions, step K-1 is the noisiest and step 0 the last. A policy is two
sets of parameters, since PPO fine-tunes only the last F steps: BC's policy is the pair of twice the same. One sampler
serves collection (`explore=True`) and evaluation.

A Gaussian policy (`kind` "gaussian", DPPO's baseline) is the case of one step, K = F = 1, whose network predicts x_0
itself from the state: the cosine schedule of one step has mean x_0 and no variance of its own, so what is left is
`exploration_std` while PPO collects, and no noise in evaluation. Its chain is (zeros, the chunk). Cloning minimises the
squared error of the mean, which is DPPO's likelihood of a fixed deviation up to a factor and a constant.

Keys of `settings` (the papers' values):
    kind "diffusion", or "gaussian" with denoising_steps and finetuned_steps 1
    hidden_dim 512, num_blocks 1, time_dim 16, chunk 4, compute_dtype "float32"
    denoising_steps 20 (K), finetuned_steps 10 (F), exploration_std 0.1, evaluation_std 1e-3, noise_clip 3.0
    learning_rate 1e-4, final_learning_rate 1e-5, warmup_steps, decay_steps, weight_decay 1e-6, ema_decay 0.995
    standardize False, soft_feature False, resample_latent True
    batch_size 256 (per device, counts noised chunks), noise_draws 1 (of each state in a batch)

Where this differs from DPPO's code:
  * The average of the parameters moves at every update; DPPO moves it every tenth epoch with the same decay, so its
    average reaches back much further.
  * The learning rate warms up and decays per update, not per epoch.
  * Executed chunks are clipped to [-1, 1], the range of the actions; DPPO executes them as they come.
  * z is drawn anew from the stored posterior in every update (`resample_latent`), as the policy meets it when it acts.
"""

from typing import Any

import distrax
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax

from wam_jax import specs
from wam_jax.networks import categorical, rssm
from wam_jax.networks.denoiser import ChunkMean, Denoiser
from wam_jax.noise_schedule import cosine_schedule
from wam_jax.optimizers import adamw
from wam_jax.parallel import pmean
from wam_jax.types import Array, LatentState, Metrics, Params

MIN_FEATURE_STD = 0.02  # added, so that entries that hardly move in the demonstrations are not blown up
_CONSTANTS = "standardized"  # the network's parameters that are constants of the demonstrations
_FLOAT32 = (_CONSTANTS, "time_hidden", "time_out")  # and those that are used in float32 whatever the compute dtype
LOG_PROB_MIN, LOG_PROB_MAX = -5.0, 2.0  # element-wise clamp of log-probabilities (DPPO)


@flax.struct.dataclass
class PolicyParams:
    """The parameters of a policy's two networks; they are the same before fine-tuning."""

    base: Params  # predicts steps t >= F
    finetuned: Params  # predicts steps t < F


@flax.struct.dataclass
class PolicyBatch:
    """Latents and the actions that experts took from there on."""

    latent: LatentState  # [B, ...], posterior of the world model
    action: Array  # float32 [B, C, 7], in [-1, 1]


@flax.struct.dataclass
class PolicyBank:
    """All rows that batches are drawn from, on the device; padded, so that banks of several tasks are of one size."""

    rows: PolicyBatch  # [M, ...]
    num_rows: Array  # int32 [], the rows in front of the padding


@flax.struct.dataclass
class PolicyState:
    """Training state of behavioural cloning."""

    params: Params  # float32
    ema_params: Params  # float32, moving average of `params`; this is the policy
    optimizer_state: Any
    step: Array  # int32 [], updates done


def step_std(settings: Any, *, explore: bool) -> Array:
    """Standard deviation of each denoising step's Gaussian, float32 [K].

    Exploration floors it at every step, so that log-probabilities stay finite; evaluation adds no noise at the last.
    """
    std = jnp.sqrt(cosine_schedule(settings.denoising_steps).variance)
    if explore:
        return jnp.maximum(std, settings.exploration_std)
    return jnp.maximum(std, settings.evaluation_std).at[0].set(0.0)


def network(settings: Any, state_dim: int = 2048) -> Denoiser | ChunkMean:
    """The predictor of the noise, or of the chunk; `state_dim` matters to the former's initialisation only."""
    sizes = {
        "hidden_dim": settings.hidden_dim,
        "num_blocks": settings.num_blocks,
        "chunk": settings.chunk,
        "standardize": settings.standardize,
        "dtype": jnp.dtype(settings.compute_dtype),
    }
    if settings.kind == "gaussian":
        return ChunkMean(**sizes)
    return Denoiser(time_dim=settings.time_dim, state_dim=state_dim, **sizes)


def optimizer(settings: Any) -> optax.GradientTransformation:
    """AdamW; the learning rate rises linearly, then falls along a cosine, per update."""
    learning_rate = optax.warmup_cosine_decay_schedule(
        init_value=settings.final_learning_rate,
        peak_value=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        decay_steps=settings.decay_steps,
        end_value=settings.final_learning_rate,
    )
    return adamw(learning_rate, weight_decay=settings.weight_decay, decayed=decayed)


def decayed(params: Params) -> Params:
    """Which parameters decay: all but the constants of `Standardize`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _CONSTANTS not in {key.key for key in path}, params)


def init(rng: Array, state_dim: int, settings: Any) -> PolicyState:
    """Fresh training state for states of `state_dim` entries."""
    example = jnp.zeros((1, settings.chunk, specs.ACTION_DIM)), jnp.zeros(1, jnp.int32), jnp.zeros((1, state_dim))
    params = network(settings, state_dim).init(rng, *example, method="denoise")
    return PolicyState(
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        optimizer_state=optimizer(settings).init(params),
        step=jnp.zeros((), jnp.int32),
    )


def features(latent: LatentState, *, settings: Any) -> Array:
    """What the policy sees of a latent: [..., state_dim], sampled or, with `soft_feature`, expected z."""
    return rssm.feature(latent, soft=settings.soft_feature)


def set_statistics(state: PolicyState, demonstrated: LatentState, *, settings: Any) -> PolicyState:
    """Sets the constants of `Standardize` from demonstrated latents [M, ...]; without `standardize` changes nothing.

    Features differ in scale by orders of magnitude, and a centimetre of the hand is a small part of each.
    """
    if not settings.standardize:
        return state
    rows = features(demonstrated, settings=settings).astype(jnp.float32)
    constants = {"mean": jnp.mean(rows, axis=0), "std": jnp.std(rows, axis=0) + MIN_FEATURE_STD}

    def with_constants(params):
        return {"params": {**params["params"], _CONSTANTS: constants}}

    return state.replace(params=with_constants(state.params), ema_params=with_constants(state.ema_params))


def loss(params: Params, batch: PolicyBatch, rng: Array, *, settings: Any) -> tuple[Array, Metrics]:
    """Mean squared error of the predicted noise at uniformly drawn steps (Ho et al. 2020, eq. 14), or of the chunk.

    Each chunk is noised `noise_draws` times, so that one product with its state serves all (arXiv 2406.11838).

    Args:
      params: of the network.
      batch: B latents and chunks.
      rng: one key.
      settings: see the module.

    Returns:
      float32 scalar, mean over draws, batch, chunk and action entries; and metrics.
    """
    latent_rng, step_rng, noise_rng = jax.random.split(rng, 3)
    latent = batch.latent
    if settings.resample_latent:
        latent = latent.replace(stochastic=categorical.sample_one_hot(latent.logits, latent_rng))
    action = jnp.tile(batch.action, (settings.noise_draws, 1, 1))
    step = jax.random.randint(step_rng, action.shape[:1], 0, settings.denoising_steps)
    noise = jax.random.normal(noise_rng, action.shape)
    alpha_bar = cosine_schedule(settings.denoising_steps).alpha_bar[step][:, None, None]
    noisy_chunk = jnp.sqrt(alpha_bar) * action + jnp.sqrt(1 - alpha_bar) * noise
    state = features(latent, settings=settings)
    predicted = network(settings).apply(params, noisy_chunk, step, state, method="denoise")
    error = jnp.mean(jnp.square(predicted - (action if settings.kind == "gaussian" else noise)))
    return error, {"bc_loss": error}


def update(
    state: PolicyState, batch: PolicyBatch, rng: Array, *, settings: Any, axis_name: str | None = None
) -> tuple[PolicyState, Metrics]:
    """One step of AdamW, and of the parameters' average, on a batch."""
    grads, metrics = jax.grad(loss, has_aux=True)(state.params, batch, rng, settings=settings)
    grads, metrics = pmean(grads, axis_name), pmean(metrics, axis_name)
    updates, optimizer_state = optimizer(settings).update(grads, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = PolicyState(
        params=params,
        ema_params=optax.incremental_update(params, state.ema_params, 1 - settings.ema_decay),
        optimizer_state=optimizer_state,
        step=state.step + 1,
    )
    return state, {**metrics, "gradient_norm": optax.tree.norm(grads)}


def update_from_bank(
    state: PolicyState, bank: PolicyBank, rng: Array, *, settings: Any, axis_name: str | None = None
) -> tuple[PolicyState, Metrics]:
    """`update` on rows drawn uniformly, with replacement, from a bank on the device; noised they make up the batch."""
    draw_rng, update_rng = jax.random.split(rng)
    rows = jax.random.randint(draw_rng, (settings.batch_size // settings.noise_draws,), 0, bank.num_rows)
    batch = jax.tree.map(lambda x: x[rows], bank.rows)
    return update(state, batch, update_rng, settings=settings, axis_name=axis_name)


def in_compute_dtype(params: Any, *, settings: Any) -> Any:
    """Parameters of networks as their layers use them: for loops, out of which compilers do not take the conversion."""

    def cast(path, x):
        return x if any(getattr(key, "key", None) in _FLOAT32 for key in path) else x.astype(settings.compute_dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def condition(params: Params, feature: Array, *, settings: Any) -> Array:
    """What the network needs of the state, once a decision: [..., state_dim] -> [..., hidden]."""
    return network(settings).apply(params, feature, method="condition")


def at_steps(params: Params, conditioned: Array, step: Array, *, settings: Any) -> Array:
    """Adds to `condition` [..., hidden] what the network needs of denoising steps, int [...]; their axes broadcast."""
    return conditioned + network(settings).apply(params, step, method="time")


def transition(
    params: Params, conditioned: Array, noisy_chunk: Array, step: Array, *, explore: bool, settings: Any
) -> distrax.Normal:
    """The Gaussian that a denoising step draws x_{t-1} from (Ho et al. 2020, eq. 7, with x_0 clipped to [-1, 1]).

    Args:
      params: of the network.
      conditioned: [..., hidden], from `condition`, then `at_steps` t.
      noisy_chunk: [..., C, A], x_t.
      step: int [...], t; leading axes broadcast.
      explore: whether the standard deviation is floored for exploration.
      settings: see the module.

    Returns:
      element-wise normal distribution over [..., C, A], float32.
    """
    schedule = cosine_schedule(settings.denoising_steps)

    def at_step(values):
        return values[step][..., None, None]

    predicted = network(settings).apply(params, noisy_chunk, conditioned)
    if settings.kind == "gaussian":
        clean = predicted
    else:
        clean = at_step(lax.rsqrt(schedule.alpha_bar)) * noisy_chunk
        clean = clean - at_step(jnp.sqrt(1 / schedule.alpha_bar - 1)) * predicted
    mean = at_step(schedule.clean_weight) * jnp.clip(clean, -1, 1) + at_step(schedule.noisy_weight) * noisy_chunk
    return distrax.Normal(mean, at_step(step_std(settings, explore=explore)))


def finetuned_steps(settings: Any) -> Array:
    """The last F denoising steps in the order they are taken, F-1 ... 0: int32 [F]."""
    return jnp.arange(settings.finetuned_steps - 1, -1, -1)


def sample(params: PolicyParams, feature: Array, rng: Array, *, explore: bool, settings: Any) -> tuple[Array, Array]:
    """Draws a chunk of actions: the base denoises steps t >= F, the fine-tuned network the rest.

    Args:
      params: base and fine-tuned parameters.
      feature: [B, state_dim], [h; z] of the latent.
      rng: one key.
      explore: floors the noise at `exploration_std` at every step; otherwise at `evaluation_std`, and none at the last.
      settings: see the module.

    Returns:
      the chunk to execute, float32 [B, C, A], clipped to [-1, 1]; and the chain of the fine-tuned steps, unclipped,
      float32 [B, F+1, C, A]: the input of step F-1, then the output of each.
    """
    shape = (settings.denoising_steps + 1, feature.shape[0], settings.chunk, specs.ACTION_DIM)
    noise = jax.random.normal(rng, shape)
    first, noise = noise[0], jnp.clip(noise[1:], -settings.noise_clip, settings.noise_clip)
    first = jnp.zeros_like(first) if settings.kind == "gaussian" else first
    steps = jnp.arange(settings.denoising_steps - 1, -1, -1)
    num_base = settings.denoising_steps - settings.finetuned_steps

    def denoise(network_params, noisy_chunk, part):
        conditioned = condition(network_params, feature, settings=settings)
        return _denoise(network_params, conditioned, noisy_chunk, (steps[part], noise[part]), explore, settings)

    base_outputs = denoise(params.base, first, slice(0, num_base))
    start = jnp.concatenate([first[None], base_outputs])[-1]
    outputs = denoise(params.finetuned, start, slice(num_base, None))
    chain = jnp.concatenate([start[None], outputs])
    return jnp.clip(chain[-1], -1, 1), jnp.moveaxis(chain, 0, 1)


def redraw(params: Params, conditioned: Array, start: Array, rng: Array, *, settings: Any) -> Array:
    """Draws the last F steps of chains anew, by one network, as `sample` with `explore=True` does.

    Args:
      params: of the network.
      conditioned: [B, hidden], from `condition` with the same parameters.
      start: float32 [B, C, A], the input of step F-1.
      rng: one key.
      settings: see the module.

    Returns:
      float32 [B, F+1, C, A], the start in front.
    """
    steps = finetuned_steps(settings)
    noise = jax.random.normal(rng, (steps.shape[0], *start.shape))
    noise = jnp.clip(noise, -settings.noise_clip, settings.noise_clip)
    outputs = _denoise(params, conditioned, start, (steps, noise), True, settings)
    return jnp.moveaxis(jnp.concatenate([start[None], outputs]), 0, 1)


def _denoise(params, conditioned, noisy_chunk, steps_and_noise, explore, settings) -> Array:
    """The output of each denoising step of one network, [J, B, C, A], for steps [J] and noise [J, B, C, A].

    What the network takes of state and step is computed before the loop, a third of a step on a GPU.
    """
    steps, noise = steps_and_noise
    conditioned = at_steps(params, conditioned, steps[:, None], settings=settings)
    in_loop = in_compute_dtype(params, settings=settings)

    def body(noisy_chunk, x):
        conditioned, step, noise = x
        normal = transition(in_loop, conditioned, noisy_chunk, step, explore=explore, settings=settings)
        noisy_chunk = normal.loc + normal.scale * noise
        return noisy_chunk, noisy_chunk

    return lax.scan(body, noisy_chunk, (conditioned, steps, noise))[1]


def act(params: PolicyParams, feature: Array, rng: Array, *, settings: Any) -> Array:
    """The chunk that evaluation executes: features [B, state_dim] -> float32 [B, C, 7] in [-1, 1]."""
    return sample(params, feature, rng, explore=False, settings=settings)[0]


def log_prob(params: Params, conditioned: Array, chain: Array, *, settings: Any) -> Array:
    """Log-probability of each fine-tuned step of a chain, as DPPO scores it.

    Every element's log-density is clamped to [-5, 2], then averaged (not summed) over the chunk. That the sampler
    truncates its noise is ignored, as in DPPO.

    Args:
      params: of the fine-tuned network.
      conditioned: [B, hidden], from `condition` with the same parameters.
      chain: [..., B, F+1, C, A], from `sample` with `explore=True`; several chains may share their states.
      settings: see the module.

    Returns:
      float32 [..., B, F], for steps F-1 ... 0.
    """
    noisy, cleaner = chain[..., :-1, :, :], chain[..., 1:, :, :]
    steps = finetuned_steps(settings)
    conditioned = at_steps(params, conditioned[:, None], steps, settings=settings)
    normal = transition(params, conditioned, noisy, steps, explore=True, settings=settings)
    element = jnp.clip(normal.log_prob(cleaner), LOG_PROB_MIN, LOG_PROB_MAX)
    return jnp.mean(element, axis=(-2, -1))


def executed(chunk: Array) -> Array:
    """Actions as the robot carries them out: the gripper opens (+1) where its entry is > 0, else closes (-1).

    The world model has only seen those two commands; environments apply the same rule themselves.
    """
    gripper = jnp.where(chunk[..., -1:] > 0, specs.GRIPPER_OPEN, specs.GRIPPER_CLOSE)
    return jnp.concatenate([jnp.clip(chunk[..., :-1], -1, 1), gripper], axis=-1)
