"""Optimisers of all stages, built from plain numbers."""

import optax


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.0,
    epsilon: float = 1e-8,
    max_gradient_norm: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW on every parameter, with global-norm clipping of the true gradients where `max_gradient_norm` > 0."""
    transforms = [optax.clip_by_global_norm(max_gradient_norm)] if max_gradient_norm > 0 else []
    transforms.append(optax.adamw(learning_rate, eps=epsilon, weight_decay=weight_decay))
    return optax.chain(*transforms)
