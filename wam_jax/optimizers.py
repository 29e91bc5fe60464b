"""The optimiser of every stage: AdamW, built from plain numbers."""

from typing import Any

import jax
import optax

CONSTANTS = "standardized"  # parameters under this name are constants of the data: no weight decay


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.0,
    epsilon: float = 1e-8,
    max_gradient_norm: float = float("inf"),
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping the gradients by their global norm; inf does not clip."""
    decay = optax.adamw(learning_rate, eps=epsilon, weight_decay=weight_decay, mask=_decayed)
    return optax.chain(optax.clip_by_global_norm(max_gradient_norm), decay)


def _decayed(params: Any) -> Any:
    """Which leaves weight decay applies to."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: CONSTANTS not in {getattr(k, "key", None) for k in path}, params
    )
