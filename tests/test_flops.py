"""Operations are counted as by hand, and as XLA counts where it counts."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from ml_collections import FrozenConfigDict

from experiments import made_up, workloads
from experiments.configs import base
from wam_jax import flops, world_model, world_model_training
from wam_jax.networks import plain, recurrence
from wam_jax.networks.decoder import ConvHead, Decoder


def repeated(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=10)[0]


def test_loops_count_as_often_as_they_run_and_gradients_thrice():
    x, w = jnp.ones((64, 128)), jnp.ones((128, 32)) @ jnp.ones((32, 128))
    once = 2 * 64 * 128 * 128
    assert flops.count(repeated, x, w) == 10 * once
    gradient = jax.grad(lambda w, x: repeated(x, w).sum(), argnums=(0, 1))
    assert flops.count(jax.jit(gradient), w, x) == 30 * once
    assert flops.count(lambda x, w: (x @ w, x)[1], x, w) == 0  # what nobody reads is not done


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(2, "VALID", 1), (1, "SAME", 1), (1, ((3, 3), (3, 3)), 2)])
def test_convolutions_count_as_xla_counts_them(stride, padding, dilation):
    x, kernel = jnp.ones((3, 17, 17, 5)), jnp.ones((4, 4, 5, 7))

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, lhs_dilation=(dilation,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    by_xla = jax.jit(convolve).lower(x, kernel).compile().cost_analysis()["flops"]
    assert flops.count(convolve, x, kernel) == pytest.approx(by_xla, rel=0.01)


def as_computed(loss, params, batch, backends):
    with mock.patch.object(recurrence, "KEEPING_BACKENDS", backends):
        return flops.count(jax.grad(loss, has_aux=True), params, batch, jax.random.key(0))


def test_a_frame_of_the_paper_s_world_model_costs_what_was_counted_by_hand():
    settings = FrozenConfigDict(base.get_config().world_model)
    model = world_model.build(settings)
    params = jax.eval_shape(functools.partial(world_model.init, model), jax.random.key(0))
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, made_up.steps((2, 10))))
    loss = functools.partial(world_model_training.loss, model=model)
    per_frame = flops.count(loss, params, batch, jax.random.key(0)) / 20
    with plain.plain_products():
        both = flops.count(jax.grad(loss, has_aux=True), params, batch, jax.random.key(0)) / 20
    kept, computed_anew = (as_computed(loss, params, batch, backends) / 20 for backends in (("cpu",), ()))
    assert per_frame == pytest.approx(382e6, rel=0.03)  # encoder 137, RSSM 26, decoder 219 (LUMOS)
    assert both == pytest.approx(3 * per_frame, rel=0.05)
    assert both < kept < 1.02 * both  # gradients of the recurrence's states are taken twice, of which a part is used
    assert 1.03 * both < computed_anew < 1.05 * both  # and its products


@pytest.mark.parametrize("windows", [4, 10, 50])
def test_rows_that_only_fill_registers_up_are_not_counted(windows):
    settings = FrozenConfigDict(base.get_config().world_model)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, made_up.steps((windows, 2))))
    per_frame = workloads.update_flops(settings, batch) / (2 * windows)
    assert per_frame == pytest.approx(1.13e9, rel=0.005)


def test_the_decoder_computes_what_its_heads_share_once():
    decoder, head = Decoder("conv", 4, 32), ConvHead(4, jnp.float32)
    feature, shared = jnp.ones((3, 20)), jnp.ones((3, 32))
    of_decoder, of_head = (
        flops.count(module.apply, jax.eval_shape(module.init, jax.random.key(0), x), x)
        for module, x in ((decoder, feature), (head, shared))
    )
    assert of_decoder == 2 * of_head + 2 * feature.size * 32


def test_an_iteration_of_ppo_costs_what_was_counted_by_hand():
    iteration = workloads.ppo_iteration_without_bc(FrozenConfigDict(base.get_config()))
    assert iteration.flops == pytest.approx(477e9, rel=0.005)  # docs/performance.md


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="while loop, whose length is not known"):
        flops.count(lambda x: jax.lax.while_loop(lambda x: x < 3, lambda x: x + 1, x), 0)
