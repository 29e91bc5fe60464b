"""Inverse dynamics: predict the action from two consecutive embeddings (WAM, arXiv 2603.28955, its third loss term).

On encoder embeddings, not on RSSM features: h_{t+1} has already received a_t, and the head would only copy it.
Three options lead away from WAM: RSSM features all the same (`world_model.action_input`), actions of other frames as
targets (`action_target`), and frames up to K steps apart (`action_steps`).
"""

import jax
import jax.numpy as jnp

from wam_jax.networks.layers import MLP
from wam_jax.specs import ACTION_DIM
from wam_jax.types import Array, Metrics

INPUTS = ("embeddings", "features")
TARGETS = ("taken", "shuffled")


def build(hidden_dims: tuple[int, ...], dtype) -> MLP:
    """The head: a three-layer MLP, [..., `input_dim`] -> [..., 7]. The paper does not give its widths."""
    return MLP(hidden_dims, ACTION_DIM, dtype)


def input_dim(frame_dim: int, max_steps: int) -> int:
    """Size of the head's input: two frames [E], and where they may be more than a step apart, one-hot how many."""
    return 2 * frame_dim + (max_steps if max_steps > 1 else 0)


def loss(
    params: dict,
    batch: tuple[Array, Array],
    rng: Array,
    *,
    head: MLP,
    max_steps: int = 1,
    shuffled: bool = False,
) -> tuple[Array, Metrics]:
    """Mean absolute error of the predicted action over batch, time and the 7 dims.

    With `max_steps` K > 1 the action a_t is predicted from e_t, e_{t+k} and k, for every k from 1 to K (AC-State, Lamb
    et al. 2022, arXiv 2207.08229, which draws one k for each pair); the mean is over all those pairs.

    Args:
      params: the head's parameters.
      batch: embeddings [B, T, E] of consecutive frames, and actions [B, T, 7]; action t leads from frame t to t + 1,
        so the last action has no target frame and is not used. T is more than `max_steps`.
      rng: key of the permutation; without effect unless `shuffled`.
      head: from `build`.
      max_steps: K, how far apart two frames may be.
      shuffled: permutes the targets over batch and time: gradients as ever, and nothing to learn but the actions'
        distribution.

    Returns:
      the loss, and its metrics.
    """
    embedding, action = batch
    inputs, targets = zip(
        *(_apart(embedding, action, steps, max_steps) for steps in range(1, max_steps + 1)), strict=True
    )
    target = jnp.concatenate(targets, axis=1)
    if shuffled:
        target = jax.random.permutation(rng, target.reshape(-1, ACTION_DIM)).reshape(target.shape)
    error = jnp.abs(head.apply({"params": params}, jnp.concatenate(inputs, axis=1)) - target)
    consecutive = error[:, : action.shape[1] - 1]  # they come first
    return error.mean(), {"inverse_dynamics_position_error": consecutive[..., :3].mean()}


def _apart(embedding: Array, action: Array, steps: int, max_steps: int) -> tuple[Array, Array]:
    """The head's inputs [B, T - steps, `input_dim`] from frames that many steps apart, and the first action between."""
    parts = [embedding[:, :-steps], embedding[:, steps:]]
    if max_steps > 1:
        parts.append(jnp.broadcast_to(jax.nn.one_hot(steps - 1, max_steps), (*parts[0].shape[:2], max_steps)))
    return jnp.concatenate(parts, axis=-1), action[:, :-steps]
