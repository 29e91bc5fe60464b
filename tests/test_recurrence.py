"""A step's products and the scan over time equal their plain forms, gradients included."""

import functools
from unittest import mock

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_model, make_state, make_steps
from jax import lax

from wam_jax import world_model
from wam_jax.networks import recurrence

quick_compilation = helpers.quick_compilation


def assert_close_to_largest(found, expected):
    """Within 1e-5 of the largest entry of each array: sums of float32 in another order."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max() + 1e-7), found, expected
    )


@pytest.mark.parametrize("rows", [9, 40])
def test_a_transposed_product_is_the_product(rows):
    shapes = [(rows, 7), (7, 5), (rows, 5)]
    x, kernel, weight = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))

    def compute(dot):
        def loss(x, kernel):
            y = dot(x, kernel, (((1,), (0,)), ((), ())))
            return (y * weight).sum(), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)

    with mock.patch.object(recurrence, "LARGE_KERNEL", 1):
        assert "custom_vjp" in str(
            jax.make_jaxpr(functools.partial(recurrence.recurrent_dot, dimension_numbers=()))(x, kernel)
        )
        found = compute(recurrence.recurrent_dot)
    assert_close_to_largest(found, compute(lax.dot_general))


def test_the_scan_with_late_gradients_is_a_scan():
    model, batch = make_model(), make_steps()
    params = make_state(model).params
    embedding = world_model.embed(model, params, batch.observation)

    def compute(scan):
        def loss(params, embedding):
            latents = world_model.observe(model, params, embedding, batch.action, jax.random.key(3))
            return sum(jnp.sin(x).sum() for x in jax.tree.leaves(latents)), latents

        with mock.patch.object(recurrence, "scan", scan):
            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, embedding)

    def plain(step, params, carry, inputs, keys):
        return lax.scan(lambda carry, x: step(params, carry, *x), carry, (inputs, keys))

    assert_close_to_largest(compute(recurrence.scan), compute(plain))
