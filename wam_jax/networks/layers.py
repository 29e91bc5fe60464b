"""Layers shared by all networks of the world model, with its initialisation: Xavier uniform, zero bias."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from wam_jax.types import Array

LAYER_NORM_EPSILON = 1e-3
xavier = nn.initializers.xavier_uniform()


def dense(features: int, dtype: Any, *, use_bias: bool = True, name: str | None = None, **options: Any) -> nn.Dense:
    """A linear layer computed in `dtype`, parameters float32; `options` are those of Flax."""
    options = {"kernel_init": xavier} | options
    return nn.Dense(features, use_bias=use_bias, dtype=dtype, name=name, **options)


@jax.custom_vjp
def elu(x: Array) -> Array:
    """ELU, whose gradient is taken from its output, which the next layer keeps anyway: x itself is not stored.

    It has gradients in reverse mode alone.
    """
    return nn.elu(x)


def _elu_backward(y: Array, gradient: Array) -> tuple[Array]:
    return (jnp.where(y > 0, gradient, gradient * (y + 1)),)


elu.defvjp(lambda x: (nn.elu(x),) * 2, _elu_backward)


class NormElu(nn.Module):
    """LayerNorm in float32, then ELU in the compute dtype."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32, use_fast_variance=False)(x)
        return elu(x.astype(self.dtype))


class MLP(nn.Module):
    """Hidden layers with ELU, then a linear output in float32."""

    hidden_dims: tuple[int, ...]
    output_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., input] to float32 [..., output_dim]."""
        for width in self.hidden_dims:
            x = elu(dense(width, self.dtype)(x))
        return dense(self.output_dim, self.dtype)(x).astype(jnp.float32)
