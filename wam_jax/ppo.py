"""PPO over the denoising steps of a diffusion policy (DPPO, Ren et al. 2024), entirely inside the frozen world model.

One `iteration` collects rollouts, estimates advantages and takes every gradient step; it compiles to one call. All
arrays that it reads and does not train (start latents, world model, reward, base policy) are arguments, in one struct.
`learn` is its second half, for rollouts of the environment itself (environment_rollouts.py).

Keys of `settings` (the papers' values), besides those of imagination.py:
    critic_hidden_dim 256, critic_num_blocks 1
    discount 0.999, gae_lambda 0.95 (both per decision), denoising_discount 0.99 (per denoising step)
    bootstrap_at_limit True: an episode that the time limit ends is worth what its last state is worth; False: 0. With
        discounts near 1 and success as the only other end, True lets values drift up to that of success, and failing
        comes to cost little (docs/results/playtable_transfer). The critic does not see the time, either way
    clip_noisiest 0.001, clip_last 0.01, clip_rate 3.0: half-width of the ratio's clip, from step F-1 to step 0
    value_weight 0.5, bc_weight 0.025, target_kl 1.0
    actor_learning_rate 1e-5, critic_learning_rate 1e-3, weight_decay 0.0
    actor_max_gradient_norm inf (no clipping)
    min_advantage_std 0.0: advantages (in scaled reward) are divided by their standard deviation, or by this if more.
        Where nearly every rollout succeeds, advantages are the critic's errors (docs/results/playtable measures it)
    epochs 10, batch_size 7500 (decisions per device and gradient step; all of them where there are fewer)
    ema_decay 0.0: the policy is the actor's moving average, updated once an iteration and begun at the cloned policy;
        0: the actor as it is. Rollouts are always the actor's
    critic_warmup 2 (iterations in which only the critic learns), reward_clip 10.0

Where this differs from DPPO's code, on purpose:
  * Truncation ends a trace and bootstraps from the last state of the same episode, or not at all; DPPO bootstraps from
    the first state of the next one and lets the trace run across the reset.
  * The return that scales the rewards is discounted with `discount`; DPPO has 0.99 there whatever the discount is.
  * Advantages are normalised once per iteration over all valid decisions of all devices; DPPO does so per minibatch
    (the same where a minibatch is everything, as in the papers).
  * Episodes end at success and are not replaced within an iteration; decisions after the end weigh nothing.
  * The regulariser's chains begin at the x_F that the base policy drew while collecting, and only the last F steps are
    drawn anew at every gradient step; DPPO draws all K anew. Each chain has the same distribution, for half the work.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax

from wam_jax import diffusion_policy, imagination
from wam_jax.advantages import RewardScale, gae, scale_reward, valid_moments
from wam_jax.diffusion_policy import PolicyParams
from wam_jax.imagination import ImaginationInputs, ImagineStep, RewardRule, Rollout
from wam_jax.networks.denoiser import Critic
from wam_jax.optimizers import adamw
from wam_jax.parallel import pmean
from wam_jax.types import Array, Metrics, Params


@flax.struct.dataclass
class ActorCritic:
    """The trained parameters, float32."""

    actor: Params  # noise predictor of steps t < F
    critic: Params


@flax.struct.dataclass
class PPOState:
    """Training state of PPO; everything that an iteration changes."""

    params: ActorCritic
    ema_actor: Params  # moving average of the actor over the iterations; this is the policy
    actor_optimizer_state: Any
    critic_optimizer_state: Any
    reward_scale: RewardScale
    iteration: Array  # int32 [], iterations done


@flax.struct.dataclass
class Decisions:
    """Decisions to learn from, in any order."""

    feature: Array  # [B, state_dim], [h; z] before the decision
    chain: Array  # float32 [B, F+1, C, A]; its first entry is the base policy's
    base_condition: Array  # [B, hidden], of the frozen base policy, for the regulariser
    log_prob: Array  # float32 [B, F], when the chain was drawn
    advantage: Array  # float32 [B], normalised
    value_target: Array  # float32 [B], in scaled reward
    valid: Array  # bool [B]; the others weigh nothing


def critic(settings: Any) -> Critic:
    """The value network."""
    return Critic(settings.critic_hidden_dim, settings.critic_num_blocks)


def optimizers(settings: Any) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """AdamW at constant learning rates, for actor and critic; the actor's gradient is clipped by its global norm."""
    return (
        adamw(
            settings.actor_learning_rate,
            weight_decay=settings.weight_decay,
            max_gradient_norm=settings.actor_max_gradient_norm,
            decayed=diffusion_policy.decayed,
        ),
        adamw(settings.critic_learning_rate, weight_decay=settings.weight_decay),
    )


def init(rng: Array, base_policy_params: Params, state_dim: int, settings: Any) -> PPOState:
    """Fresh training state: the actor starts as a copy of the cloned policy, the critic is new."""
    actor = jax.tree.map(jnp.copy, base_policy_params)
    critic_params = critic(settings).init(rng, jnp.zeros((1, state_dim)))
    actor_optimizer, critic_optimizer = optimizers(settings)
    return PPOState(
        params=ActorCritic(actor, critic_params),
        ema_actor=jax.tree.map(jnp.copy, actor),
        actor_optimizer_state=actor_optimizer.init(actor),
        critic_optimizer_state=critic_optimizer.init(critic_params),
        reward_scale=RewardScale(*jnp.array([0.0, 1e-4, 1e-4])),  # DPPO's prior: variance 1, seen 1e-4 times
        iteration=jnp.zeros((), jnp.int32),
    )


def clip_width(settings: Any, num_steps: int) -> Array:
    """Half-width of the ratio's clip for denoising steps F-1 ... 0, exponentially wider to the last: float32 [F]."""
    progress = 1 - jnp.arange(num_steps - 1, -1, -1) / max(num_steps - 1, 1)
    growth = jnp.expm1(settings.clip_rate * progress) / jnp.expm1(settings.clip_rate)
    return settings.clip_noisiest + (settings.clip_last - settings.clip_noisiest) * growth


def loss(
    params: ActorCritic,
    batch: Decisions,
    base_chain: Array,
    *,
    policy_settings: Any,
    settings: Any,
    axis_name: str | None = None,
) -> tuple[Array, Metrics]:
    """Clipped surrogate over (decision, denoising step) pairs, value error and BC regulariser; nothing in it is random.

    The surrogate is DPPO's: advantages discounted towards noisier steps, a clip width of its own for each step. The
    regulariser is minus the fine-tuned actor's mean clamped log-probability of chains that the frozen base policy drew
    at the same states. All means are over the valid decisions of all devices, so `pmean` of the gradients is exact.

    Args:
      params: actor and critic.
      batch: B decisions.
      base_chain: float32 [B, F+1, C, A], chains of the base policy; not looked at where `bc_weight` is 0.
      policy_settings, settings: see diffusion_policy and the module.
      axis_name: devices that the mean runs over.

    Returns:
      float32 scalar and metrics.
    """
    weight = batch.valid / jnp.maximum(pmean(jnp.sum(batch.valid.astype(jnp.float32)), axis_name), 1.0)

    def mean(x):  # over valid decisions; [B] or [B, F]
        x = x if x.ndim == 1 else jnp.mean(x, axis=-1)
        return jnp.sum(jnp.where(batch.valid, x, 0.0) * weight)

    conditioned = diffusion_policy.condition(params.actor, batch.feature, settings=policy_settings)
    chains = jnp.stack([batch.chain, base_chain] if settings.bc_weight else [batch.chain])
    log_prob, *base_log_prob = diffusion_policy.log_prob(params.actor, conditioned, chains, settings=policy_settings)
    num_steps = batch.log_prob.shape[1]
    width = clip_width(settings, num_steps)
    advantage = batch.advantage[:, None] * settings.denoising_discount ** jnp.arange(num_steps - 1, -1, -1)
    log_ratio = log_prob - batch.log_prob
    ratio = jnp.exp(log_ratio)
    policy_loss = mean(-jnp.minimum(advantage * ratio, advantage * jnp.clip(ratio, 1 - width, 1 + width)))
    value = critic(settings).apply(params.critic, batch.feature)
    value_loss = mean(0.5 * jnp.square(value - batch.value_target))
    metrics = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "approx_kl": mean(ratio - 1 - log_ratio),
        "clip_fraction": mean((jnp.abs(ratio - 1) > width).astype(jnp.float32)),
        "ratio_error": mean(jnp.abs(ratio - 1)),
    }
    total = policy_loss + settings.value_weight * value_loss
    if settings.bc_weight:
        metrics["bc_loss"] = -mean(base_log_prob[0])
        total = total + settings.bc_weight * metrics["bc_loss"]
    return total, metrics


def _select(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def _apply(optimizer: optax.GradientTransformation, grads: Any, params: Any, optimizer_state: Any) -> tuple[Any, Any]:
    updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state


def _gradient_step(
    state: PPOState,
    batch: Decisions,
    base_policy_params: Params,
    rng: Array,
    *,
    policy_settings: Any,
    settings: Any,
    axis_name: str | None,
) -> tuple[PPOState, Metrics]:
    """One step of both optimisers on one minibatch; the actor's waits until the critic has warmed up."""
    base_chain = diffusion_policy.redraw(  # the compiler drops it where `bc_weight` is 0
        base_policy_params, batch.base_condition, batch.chain[:, 0], rng, settings=policy_settings
    )
    grads, metrics = jax.grad(loss, has_aux=True)(
        state.params, batch, base_chain, policy_settings=policy_settings, settings=settings, axis_name=axis_name
    )
    grads, metrics = pmean(grads, axis_name), pmean(metrics, axis_name)
    actor_optimizer, critic_optimizer = optimizers(settings)
    old = (state.params.actor, state.actor_optimizer_state)
    new = _apply(actor_optimizer, grads.actor, *old)
    actor, actor_optimizer_state = _select(state.iteration >= settings.critic_warmup, new, old)
    critic_params, critic_optimizer_state = _apply(
        critic_optimizer, grads.critic, state.params.critic, state.critic_optimizer_state
    )
    state = state.replace(
        params=ActorCritic(actor, critic_params),
        actor_optimizer_state=actor_optimizer_state,
        critic_optimizer_state=critic_optimizer_state,
    )
    return state, {**metrics, "actor_gradient_norm": optax.tree.norm(grads.actor)}


def _minibatch_rows(rng: Array, num_decisions: int, settings: Any) -> Array:
    """Rows of every minibatch of every epoch, reshuffled each epoch, the remainder left out: int32 [updates, size]."""
    size = min(settings.batch_size, num_decisions)
    per_epoch = num_decisions // size
    rows = jax.vmap(lambda key: jax.random.permutation(key, num_decisions))(jax.random.split(rng, settings.epochs))
    return rows[:, : per_epoch * size].reshape(settings.epochs * per_epoch, size)


def update(
    state: PPOState,
    decisions: Decisions,
    base_policy_params: Params,
    rng: Array,
    *,
    policy_settings: Any,
    settings: Any,
    axis_name: str | None = None,
) -> tuple[PPOState, Metrics]:
    """All epochs of gradient steps on the decisions of one iteration.

    Once a step's approximate KL exceeds `target_kl`, the steps after it change nothing.

    Args:
      state: training state.
      decisions: B decisions of this device.
      base_policy_params: of the frozen base policy.
      rng: one key.
      policy_settings, settings: see diffusion_policy and the module.
      axis_name: devices to average gradients over.

    Returns:
      the state, and metrics averaged over the steps that counted; `first_approx_kl` and `first_ratio_error` are the
      first step's, which are zero unless old and new log-probabilities come from different functions.
    """
    static = {"policy_settings": policy_settings, "settings": settings, "axis_name": axis_name}
    row_rng, step_rng = jax.random.split(rng)
    rows = _minibatch_rows(row_rng, decisions.valid.shape[0], settings)

    def body(carry, rows_and_rng):
        state, stopped = carry
        rows, rng = rows_and_rng
        batch = jax.tree.map(lambda x: x[rows], decisions)
        new_state, metrics = _gradient_step(state, batch, base_policy_params, rng, **static)
        state = _select(~stopped, new_state, state)
        return (state, stopped | (metrics["approx_kl"] > settings.target_kl)), (metrics, ~stopped)

    keys = jax.random.split(step_rng, rows.shape[0])
    (state, _), (metrics, counted) = lax.scan(body, (state, jnp.zeros((), bool)), (rows, keys))
    first = {"first_approx_kl": metrics["approx_kl"][0], "first_ratio_error": metrics["ratio_error"][0]}
    averaged = {name: jnp.sum(jnp.where(counted, x, 0)) / jnp.sum(counted) for name, x in metrics.items()}
    return state, {**averaged, **first, "gradient_steps": jnp.sum(counted, dtype=jnp.float32)}


def prepare(
    state: PPOState,
    episodes: Rollout,
    base_policy_params: Params,
    *,
    policy_settings: Any,
    settings: Any,
    axis_name: str | None = None,
) -> tuple[Decisions, RewardScale, Metrics]:
    """Turns rollouts into decisions to learn from: scaled rewards, values, advantages and old log-probabilities.

    Args:
      state: training state before the update.
      episodes: H decisions of B episodes.
      base_policy_params: of the frozen base policy.
      policy_settings, settings: see diffusion_policy and the module.
      axis_name: devices that statistics run over.

    Returns:
      H*B decisions, the reward statistics with these episodes in them, and metrics.
    """
    reward, scale = scale_reward(
        state.reward_scale, episodes.reward, episodes.valid, settings=settings, axis_name=axis_name
    )
    feature = jnp.concatenate([episodes.feature, episodes.last_feature[None]])
    value = critic(settings).apply(state.params.critic, feature)
    terminated, truncated = episodes.terminated, episodes.truncated
    if not settings.bootstrap_at_limit:
        terminated, truncated = terminated | truncated, jnp.zeros_like(truncated)
    advantage, target = gae(
        reward, value[:-1], value[1:], terminated, truncated, discount=settings.discount, gae_lambda=settings.gae_lambda
    )
    mean, variance, count = valid_moments(advantage, episodes.valid, axis_name)
    normalised = (advantage - mean) / (jnp.maximum(jnp.sqrt(variance), settings.min_advantage_std) + 1e-8)
    flat_feature, chain, normalised, flat_target, valid = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), (episodes.feature, episodes.chain, normalised, target, episodes.valid)
    )
    conditioned = diffusion_policy.condition(state.params.actor, flat_feature, settings=policy_settings)
    log_prob = diffusion_policy.log_prob(state.params.actor, conditioned, chain, settings=policy_settings)
    base_condition = diffusion_policy.condition(base_policy_params, flat_feature, settings=policy_settings)
    decisions = Decisions(flat_feature, chain, base_condition, log_prob, normalised, flat_target, valid)
    target_variance = valid_moments(target, episodes.valid, axis_name)[1]
    metrics = {
        "success": pmean(imagination.success_rate(episodes), axis_name),
        "reward": valid_moments(episodes.reward, episodes.valid, axis_name)[0],
        "valid_decisions": count,
        "advantage_std": jnp.sqrt(variance),
        "explained_variance": 1 - variance / jnp.maximum(target_variance, 1e-8),
    }
    return decisions, scale, metrics


def iteration(
    state: PPOState,
    inputs: ImaginationInputs,
    rng: Array,
    *,
    imagine_step: ImagineStep,
    reward_rule: RewardRule,
    policy_settings: Any,
    settings: Any,
    axis_name: str | None = None,
) -> tuple[PPOState, Metrics]:
    """One iteration of PPO: collects rollouts in imagination, then takes all gradient steps on them.

    Args:
      state: training state.
      inputs: start latents, world model, reward and base policy; unchanged.
      rng: one key, unique to (seed, iteration, device).
      imagine_step: one step of the world model's prior.
      reward_rule: judges each imagined latent.
      policy_settings, settings: see diffusion_policy and the module.
      axis_name: devices that train together.

    Returns:
      the next state and float32 scalar metrics.
    """
    rollout_rng, update_rng = jax.random.split(rng)
    static = {"policy_settings": policy_settings, "settings": settings}
    policy = PolicyParams(base=inputs.base_policy_params, finetuned=state.params.actor)
    episodes = imagination.rollout(
        policy, inputs, rollout_rng, explore=True, imagine_step=imagine_step, reward_rule=reward_rule, **static
    )
    state, metrics = learn(state, episodes, inputs.base_policy_params, update_rng, **static, axis_name=axis_name)
    return state, {"imagined_success": metrics.pop("success"), **metrics}


def learn(
    state: PPOState,
    episodes: Rollout,
    base_policy_params: Params,
    rng: Array,
    *,
    policy_settings: Any,
    settings: Any,
    axis_name: str | None = None,
) -> tuple[PPOState, Metrics]:
    """All that an iteration learns from its rollouts, wherever they come from: see `prepare` and `update`.

    Args:
      state: training state.
      episodes: H decisions of B episodes, by `state.params.actor`.
      base_policy_params: of the frozen base policy.
      rng: one key.
      policy_settings, settings: see diffusion_policy and the module.
      axis_name: devices that train together.

    Returns:
      the next state and float32 scalar metrics; `success` is the share of the episodes that succeeded.
    """
    static = {"policy_settings": policy_settings, "settings": settings, "axis_name": axis_name}
    decisions, scale, rollout_metrics = prepare(state, episodes, base_policy_params, **static)
    state, metrics = update(state, decisions, base_policy_params, rng, **static)
    averaged = optax.incremental_update(state.params.actor, state.ema_actor, 1 - settings.ema_decay)
    # Not before the actor moves: the average of equal numbers is rounded, and would no longer be the cloned policy.
    ema_actor = _select(state.iteration >= settings.critic_warmup, averaged, state.ema_actor)
    state = state.replace(ema_actor=ema_actor, reward_scale=scale, iteration=state.iteration + 1)
    return state, {**rollout_metrics, **metrics}
