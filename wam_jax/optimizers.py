"""The optimiser of every stage: AdamW, built from plain numbers."""

from collections.abc import Callable
from typing import Any

import optax


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.0,
    epsilon: float = 1e-8,
    max_gradient_norm: float = float("inf"),
    decayed: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping the gradients by their global norm.

    Args:
      learning_rate: a number, or a function of the update.
      weight_decay: share of a parameter that a learning rate of 1 takes off at each update.
      epsilon: added to the root of the second moment.
      max_gradient_norm: inf does not clip.
      decayed: from the parameters to a tree of bools, which of them decay; None: all.
    """
    clips = max_gradient_norm < float("inf")
    return optax.chain(
        optax.clip_by_global_norm(max_gradient_norm) if clips else optax.identity(),  # their states are alike: empty
        optax.adamw(learning_rate, eps=epsilon, weight_decay=weight_decay, mask=decayed),
    )
