"""Layers that all networks share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wam_jax.networks.convolution import add_bias
from wam_jax.networks.layers import elu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_elu_with_a_gradient_from_its_output_is_flax_s(dtype):
    x = jnp.concatenate([jnp.linspace(-30, 30, 601), jnp.array([0.0, -1e-3, 1e-3])]).astype(dtype)
    np.testing.assert_array_equal(elu(x), nn.elu(x))
    np.testing.assert_array_equal(jax.vmap(jax.grad(elu))(x), jax.vmap(jax.grad(nn.elu))(x))


@pytest.mark.parametrize("block", [1, 4])
def test_the_gradient_of_a_bias_is_summed_in_float32(block):
    x = jnp.zeros((9, 61, 61, block**2 * 3), jnp.bfloat16)
    gradient = jax.grad(lambda bias: (add_bias(x, bias) * jnp.bfloat16(0.125)).astype(jnp.float32).sum())(jnp.zeros(3))
    np.testing.assert_array_equal(gradient, 9 * 61 * 61 * block**2 * 0.125)  # bfloat16 cannot count so far
