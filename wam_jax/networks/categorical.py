"""Drawing from categorical distributions."""

import jax
import jax.numpy as jnp

from wam_jax.types import Array


def sample_one_hot(logits: Array, rng: Array) -> Array:
    """Draws one-hot rows by inverting the cumulative distribution.

    One uniform number a row, where the Gumbel trick takes one a class and two logarithms of it: on a CPU a tenth of
    the time (0.23 ms for 50 x 32 x 32 against 2.6, a fifth of an imagined step; by jnp.cumsum 0.79).

    Args:
      logits: [..., V].
      rng: one key.

    Returns:
      float32 [..., V].
    """
    probability = jax.nn.softmax(logits.astype(jnp.float32))
    up_to = jnp.triu(jnp.ones((logits.shape[-1],) * 2))  # as a matrix product: faster than cumsum
    cumulative = jnp.matmul(probability, up_to, precision=jax.lax.Precision.HIGHEST)
    threshold = jax.random.uniform(rng, logits.shape[:-1]) * cumulative[..., -1]
    return jax.nn.one_hot(jnp.sum(cumulative <= threshold[..., None], axis=-1), logits.shape[-1])
