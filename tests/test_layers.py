"""Layers that all networks share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wam_jax.networks.layers import elu


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 4e-3)])  # half of a step below 1
def test_elu_with_a_gradient_from_its_output_is_flax_s(dtype, tolerance):
    x = jnp.concatenate([jnp.linspace(-30, 30, 601), jnp.array([0.0, -1e-3, 1e-3])]).astype(dtype)
    exact = np.where(x > 0, 1, np.exp(np.minimum(np.asarray(x, np.float64), 0)))
    np.testing.assert_array_equal(elu(x), nn.elu(x))
    np.testing.assert_allclose(jax.vmap(jax.grad(elu))(x).astype(np.float64), exact, atol=tolerance)
