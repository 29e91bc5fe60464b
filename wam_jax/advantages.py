"""From rewards to advantages: a running scale (rewards over the standard deviation of discounted returns, DPPO), GAE.

Keys of `settings`: discount, reward_clip 10.0.
"""

from typing import Any

import chex
import flax.struct
import jax.numpy as jnp
from jax import lax

from wam_jax.parallel import pmean
from wam_jax.types import Array

UNROLLED = 8  # steps of a loop over decisions that are one: a GPU launches three kernels for each of them


@flax.struct.dataclass
class RewardScale:
    """Running statistics of discounted returns over all decisions seen; float32 scalars."""

    mean: Array
    squares: Array  # sum of squared deviations from the mean
    count: Array


def valid_moments(x: Array, valid: Array, axis_name: str | None) -> tuple[Array, Array, Array]:
    """Mean, unbiased variance and number of the valid elements on all devices; 0, 0, 0 where there are none."""

    def total(x):
        return pmean(jnp.sum(jnp.where(valid, x, 0.0)), axis_name) * (lax.axis_size(axis_name) if axis_name else 1)

    count = total(jnp.ones_like(x))
    mean = total(x) / jnp.maximum(count, 1)
    squares = total(jnp.square(x - mean))
    return mean, squares / jnp.maximum(count - 1, 1), count


def scale_reward(
    scale: RewardScale, reward: Array, valid: Array, *, settings: Any, axis_name: str | None = None
) -> tuple[Array, RewardScale]:
    """Divides rewards by the running standard deviation of discounted returns-so-far, and clips them.

    The new episodes enter the statistics first (merged as in Chan et al. 1979). The mean of the rewards stays.

    Args:
      scale: statistics until now.
      reward: float32 [H, B], from each episode's first decision on.
      valid: bool [H, B].
      settings: see the module.
      axis_name: devices to count together.

    Returns:
      scaled reward, float32 [H, B], and the statistics with these episodes in them.
    """

    def forward(so_far, reward):
        so_far = reward + settings.discount * so_far
        return so_far, so_far

    _, returns = lax.scan(forward, jnp.zeros_like(reward[0]), reward, unroll=UNROLLED)
    mean, variance, count = valid_moments(returns, valid, axis_name)
    total, shift = scale.count + count, mean - scale.mean
    squares = scale.squares + variance * jnp.maximum(count - 1, 0) + shift**2 * scale.count * count / total
    scale = RewardScale(mean=scale.mean + shift * count / total, squares=squares, count=total)
    scaled = reward / jnp.sqrt(squares / jnp.maximum(total - 1, 1) + 1e-8)
    return jnp.clip(scaled, -settings.reward_clip, settings.reward_clip), scale


def gae(
    reward: Array,
    value: Array,
    next_value: Array,
    terminated: Array,
    truncated: Array,
    *,
    discount: float,
    gae_lambda: float,
) -> tuple[Array, Array]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), with termination apart from truncation.

    Args:
      reward: float32 [H, B].
      value: float32 [H, B], of the state before the decision.
      next_value: float32 [H, B], of the state after it, in the same episode.
      terminated: bool [H, B], the episode ended for good: nothing is bootstrapped.
      truncated: bool [H, B], the episode was cut: `next_value` is bootstrapped. Both cut the trace.
      discount: per decision.
      gae_lambda: per decision.

    Returns:
      advantage and value target, float32 [H, B].
    """
    chex.assert_equal_shape([reward, value, next_value, terminated, truncated])
    delta = reward + discount * next_value * ~terminated - value
    decay = discount * gae_lambda * ~(terminated | truncated)

    def backward(following, delta_and_decay):
        delta, decay = delta_and_decay
        advantage = delta + decay * following
        return advantage, advantage

    _, advantage = lax.scan(backward, jnp.zeros_like(value[0]), (delta, decay), reverse=True, unroll=UNROLLED)
    return advantage, advantage + value
