"""Sizes of the world model: parameters, shapes, what an option leaves out."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import B, T, make_model, make_state, make_steps
from ml_collections import FrozenConfigDict

from experiments.configs import base
from wam_jax import specs, world_model, world_model_training
from wam_jax.networks.encoder import from_patches, to_patches

quick_compilation = helpers.quick_compilation
MODEL = make_model()


@functools.cache
def params():
    return make_state(MODEL).params


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def param_shapes(config):
    model = world_model.build(FrozenConfigDict(config.world_model))
    return jax.eval_shape(functools.partial(world_model.init, model), jax.random.key(0))


def test_full_size_has_the_parameters_of_lumos():
    shapes = param_shapes(base.get_config())
    more_proprioception = (specs.PROPRIOCEPTION_DIM - specs.ROBOT_OBS_DIM) * 1000  # LUMOS reads 15 entries, we 18
    assert count(shapes["encoder"]) == 7_825_824
    assert count(shapes["rssm"]) == 12_914_968 + more_proprioception
    assert count(shapes["decoder"]) == 19_157_286
    assert set(shapes) == {"encoder", "rssm", "decoder", "inverse_dynamics"}
    assert count(shapes) - count(shapes["inverse_dynamics"]) == 39_898_078 + more_proprioception


def test_dreamer_v2_lacks_the_inverse_dynamics_and_nothing_else():
    wam, dreamer_v2 = (dict(param_shapes(base.get_config(method))) for method in ("wam", "dreamer_v2"))
    assert wam.pop("inverse_dynamics")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), wam) == jax.tree.map(lambda x: (x.shape, x.dtype), dreamer_v2)


@pytest.mark.parametrize("kind", ["conv", "patch"])
def test_shapes(kind):
    model = make_model(kind=kind)

    def forward(batch):
        weights = world_model.init(model, jax.random.key(0))
        embedding = world_model.embed(model, weights, batch.observation)
        posterior = world_model.observe(model, weights, embedding, batch.action, jax.random.key(1))
        start = jax.tree.map(lambda x: x[:, -1], posterior)
        imagined = world_model.imagine(model, weights, start, batch.action[:, :3], jax.random.key(2))
        images = world_model.decode(model, weights, imagined)
        return (
            embedding,
            posterior,
            imagined,
            images,
            world_model_training.loss(weights, batch, jax.random.key(3), model=model),
        )

    embedding, posterior, imagined, images, (loss, _) = jax.eval_shape(forward, make_steps())
    assert embedding.shape == (B, T, 16 + specs.PROPRIOCEPTION_DIM)
    assert posterior.deterministic.shape == (B, T, 16)
    assert posterior.logits.shape == posterior.stochastic.shape == (B, T, 4, 4)
    assert imagined.deterministic.shape == (B, 3, 16)
    assert [(x.shape, x.dtype) for x in images] == [((B, 3, 64, 64, 3), jnp.uint8)] * 2
    assert loss.shape == ()


def test_patches_are_squares_of_the_image():
    image = np.random.default_rng(0).normal(size=(2, 64, 64, 3))
    patches = to_patches(image)
    np.testing.assert_array_equal(patches[1, 8 * 2 + 5], image[1, 16:24, 40:48].reshape(-1))
    np.testing.assert_array_equal(from_patches(patches), image)


def test_unknown_kind_or_dtype_is_named():
    with pytest.raises(ValueError, match="world_model.kind='mlp'.*'conv' or 'patch'"):
        make_model(kind="mlp")
    with pytest.raises(ValueError, match="world_model.compute_dtype='float16'.*'bfloat16'"):
        make_model(compute_dtype="float16")


# --- What may depend on what ---
