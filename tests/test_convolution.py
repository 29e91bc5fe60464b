"""Convolutions in the form that each backend takes are Flax's: parameters, outputs and gradients."""

from unittest import mock

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import pytest
from helpers import assert_equal

from wam_jax.networks import convolution
from wam_jax.networks.decoder import ConvHead
from wam_jax.networks.encoder import ConvCamera
from wam_jax.networks.layers import xavier

quick_compilation = helpers.quick_compilation
PLAIN = {convolution.Conv: nn.Conv, convolution.ConvTranspose: nn.ConvTranspose}
LAYERS = [  # image size, kernel size: every pair of LUMOS' encoder and decoder
    *((convolution.Conv, size, 4) for size in (64, 31, 14, 6)),
    *((convolution.ConvTranspose, size, kernel) for size, kernel in ((1, 5), (5, 5), (13, 6), (30, 6))),
]


FORMS = {  # backends that take them
    "matrix": {"MATRIX_BACKENDS": ("cpu",), "BLOCK_BACKENDS": ()},
    "blocks": {"MATRIX_BACKENDS": (), "BLOCK_BACKENDS": ("cpu",)},
    "xla": {"MATRIX_BACKENDS": (), "BLOCK_BACKENDS": ()},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("layer", "size", "kernel_size"), LAYERS)
def test_equals_flax(layer, size, kernel_size, form):
    x = jax.random.normal(jax.random.key(0), (3, size, size, 5))
    fast = layer(4, kernel_size, dtype=jnp.float32)
    plain = PLAIN[layer](4, (kernel_size,) * 2, (2, 2), padding="VALID", kernel_init=xavier)
    params = plain.init(jax.random.key(1), x)
    assert_equal(fast.init(jax.random.key(1), x), params)
    weight = jax.random.normal(jax.random.key(2), plain.apply(params, x).shape)

    def compute(module):
        def loss(params, x):
            y = module.apply(params, x)
            return (y * weight).sum(), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    with mock.patch.multiple(convolution, **FORMS[form]):
        computed = compute(fast)
    helpers.assert_close_to_largest(computed, compute(plain))


@pytest.mark.parametrize("form", ["blocks", "xla"])
@pytest.mark.parametrize(("camera", "shape"), [(ConvCamera, (2, 64, 64, 3)), (ConvHead, (2, 20))])
def test_a_camera_is_the_same_in_every_form(camera, shape, form):
    x, module = jax.random.normal(jax.random.key(0), shape), camera(4, jnp.float32)
    params = module.init(jax.random.key(1), x)
    weight = jax.random.normal(jax.random.key(2), module.apply(params, x).shape)

    def compute():
        def loss(params, x):
            y = module.apply(params, x)
            return (y * weight).sum(), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    with mock.patch.multiple(convolution, **FORMS[form]):
        assert_equal(module.init(jax.random.key(1), x), params)
        other = compute()
    helpers.assert_close_to_largest(other, compute())


def test_groups_of_images_change_nothing():
    large, kernel = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(6, 8, 8, 3), (4, 4, 3, 2)])
    )

    def compute():
        def loss(large, kernel):
            small = convolution.convolve(large, kernel, jnp.zeros(2))
            return jnp.sin(convolution.convolve_transposed(small, kernel.swapaxes(2, 3), jnp.zeros(3))).sum()

        return jax.value_and_grad(loss, argnums=(0, 1))(large, kernel)

    whole = compute()
    with mock.patch.object(convolution, "GROUP_NUMBERS", 2 * 3 * 3 * 48):  # two images
        assert "scan" in str(jax.make_jaxpr(compute)())
        helpers.assert_close_to_largest(compute(), whole)


def test_other_backends_keep_the_convolutions_of_xla():
    x = jnp.zeros((2, 14, 14, 3))
    with mock.patch.object(convolution, "MATRIX_BACKENDS", ()):
        program = jax.make_jaxpr(jax.grad(lambda kernel: convolution.convolve(x, kernel, jnp.zeros(2)).sum()))(
            jnp.zeros((4, 4, 3, 2))
        )
    assert "conv_general_dilated" in str(program)
    assert "dot_general" not in str(program)
