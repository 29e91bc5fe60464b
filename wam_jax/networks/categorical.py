"""Drawing from categorical distributions."""

import jax
import jax.numpy as jnp

from wam_jax.networks import plain
from wam_jax.types import Array

# Where the cumulative distribution is a matrix product (on a CPU 0.23 ms for 50 x 32 x 32 against 0.79 by jnp.cumsum);
# elsewhere it is a sum that the compiler can join with what comes before and after, where a product is a kernel.
MATRIX_BACKENDS = ("cpu",)


def sample_one_hot(logits: Array, rng: Array) -> Array:
    """Draws one-hot rows by inverting the cumulative distribution.

    One uniform number a row, where the Gumbel trick takes one a class and two logarithms of it: on a CPU a tenth of
    the time (0.23 ms for 50 x 32 x 32 against 2.6, a fifth of an imagined step).

    Args:
      logits: [..., V].
      rng: one key.

    Returns:
      float32 [..., V].
    """
    return one_hot_at(logits, jax.random.uniform(rng, logits.shape[:-1]))


def one_hot_at(logits: Array, quantile: Array) -> Array:
    """The class in which each row's cumulative distribution reaches a quantile, one-hot.

    Args:
      logits: [..., V].
      quantile: float32 [...], in [0, 1); where it is uniform noise, the class is a sample.

    Returns:
      float32 [..., V].
    """
    probability = jax.nn.softmax(logits.astype(jnp.float32))
    up_to = jnp.triu(jnp.ones((logits.shape[-1],) * 2))
    if plain.takes(MATRIX_BACKENDS):
        cumulative = jnp.matmul(probability, up_to, precision=jax.lax.Precision.HIGHEST)
    else:
        cumulative = jnp.sum(probability[..., :, None] * up_to, axis=-2)
    threshold = quantile * cumulative[..., -1]
    return jax.nn.one_hot(jnp.sum(cumulative <= threshold[..., None], axis=-1), logits.shape[-1])
