"""Inverse dynamics: predict the action from two consecutive embeddings (WAM, arXiv 2603.28955, its third loss term).

On encoder embeddings, not on RSSM features: h_{t+1} has already received a_t, and the head would only copy it.
"""

import jax.numpy as jnp

from wam_jax.networks.layers import MLP
from wam_jax.specs import ACTION_DIM
from wam_jax.types import Array, Metrics


def build(hidden_dims: tuple[int, ...], dtype) -> MLP:
    """The head: a three-layer MLP, [..., 2 E] -> [..., 7]. The paper does not give its widths."""
    return MLP(hidden_dims, ACTION_DIM, dtype)


def loss(params: dict, batch: tuple[Array, Array], rng: Array | None = None, *, head: MLP) -> tuple[Array, Metrics]:
    """Mean absolute error of the predicted action over batch, time and the 7 dims.

    Args:
      params: the head's parameters.
      batch: embeddings [B, T, E] of consecutive frames, and actions [B, T, 7]; action t leads from frame t to t + 1,
        so the last action has no target frame and is not used.
      rng: unused, for the common signature of losses.
      head: from `build`.

    Returns:
      the loss, and its metrics.
    """
    del rng
    embedding, action = batch
    pairs = jnp.concatenate([embedding[:, :-1], embedding[:, 1:]], axis=-1)
    error = jnp.abs(head.apply({"params": params}, pairs) - action[:, :-1])
    return error.mean(), {"inverse_dynamics_position_error": error[..., :3].mean()}
