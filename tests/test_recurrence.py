"""A step's products and the scan over time equal their plain forms, gradients included."""

import functools
from unittest import mock

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import pytest
from helpers import make_model, make_state, make_steps
from jax import lax

from wam_jax import world_model
from wam_jax.networks import recurrence

quick_compilation = helpers.quick_compilation


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
    helpers.assert_close_to_largest(found, compute(lax.dot_general))


FORMS = {  # what backends take of them; no size of the small model is a multiple of 5
    "keeping products": {"KEEPING_BACKENDS": ("cpu",)},
    "computing them anew": {"KEEPING_BACKENDS": ()},
    "kernels filled up": {"KEEPING_BACKENDS": (), "ALIGNED_BACKENDS": ("cpu",), "ALIGNED_TO": 5},
}
VARIANTS = [{}, {"robot_state": True}, {"robot_state": True, "soft_prior": True}]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_the_scan_with_late_gradients_is_a_scan(dtype, tolerance, variant, form, monkeypatch):
    for name, value in FORMS[form].items():
        monkeypatch.setattr(recurrence, name, value)
    model, batch = make_model(compute_dtype=dtype, **variant), make_steps()
    params = make_state(model).params
    embedding = world_model.embed(model, params, batch.observation)

    def compute(scan):
        def loss(params, embedding):
            latents = world_model.observe(model, params, embedding, batch.action, jax.random.key(3))
            start = jax.tree.map(lambda x: x[:, 0], latents)
            latents = latents, world_model.imagine(model, params, start, batch.action, jax.random.key(4))
            return sum(jnp.sin(x).sum() for x in jax.tree.leaves(latents)), latents

        with mock.patch.object(recurrence, "scan", scan):
            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, embedding)

    def plain(step, params, carry, inputs, noise, **_):
        def body(carry, x):
            carry, output = step(params, carry, *x)
            return carry, (carry, output)

        return lax.scan(body, carry, (inputs, noise))[1]

    helpers.assert_close_to_largest(compute(recurrence.scan), compute(plain), tolerance)


def test_a_layer_that_is_called_twice_in_a_step_is_refused():
    layer = nn.Dense(3)
    params = layer.init(jax.random.key(0), jnp.zeros((2, 3)))["params"]

    def step(params, carry, x, noise):
        bound = layer.bind({"params": params})
        return bound(bound(carry + x)), None

    def loss(params):
        ones = jnp.ones((4, 2, 3))
        return recurrence.scan(step, params, ones[0], ones, ones, dtype=jnp.float32)[0].sum()

    with pytest.raises(ValueError, match="called twice in a step"):
        jax.grad(loss)(params)
