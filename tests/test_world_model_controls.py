"""Options of the world model's loss that could refute what WAM claims: what each changes, and what it leaves alone."""

import functools

import helpers
import jax
import numpy as np
import pytest
from helpers import B, T, assert_equal, make_model, make_state, make_steps

from wam_jax import specs, world_model, world_model_training
from wam_jax.networks import rssm

quick_compilation = helpers.quick_compilation
SIZES = dict(proprioception_weight=0.0, open_loop_weight=0.0)
EMBEDDING = 16 + specs.PROPRIOCEPTION_DIM
FEATURE = 16 + 4 * 4


@functools.cache
def measure(**changes):
    """The terms of the loss at the first parameters, and the action term's gradient by module."""
    model = make_model(**SIZES, **changes)

    @jax.jit
    def terms_and_gradient(params, batch):
        def term(params):
            metrics = world_model_training.loss(params, batch, jax.random.key(0), model=model)[1]
            return metrics["inverse_dynamics"], metrics

        gradient, metrics = jax.grad(term, has_aux=True)(params)
        return metrics, {name: sum(abs(x).sum() for x in jax.tree.leaves(tree)) for name, tree in gradient.items()}

    return jax.device_get(terms_and_gradient(make_state(model).params, make_steps()))


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, 2 * EMBEDDING),
        ({"action_steps": 3}, 2 * EMBEDDING + 3),
        ({"action_input": "features"}, 2 * FEATURE),
        ({"action_input": "features", "action_steps": 2}, 2 * FEATURE + 2),
    ],
)
def test_a_control_changes_what_the_head_is_given_and_no_other_parameter(changes, size):
    def shapes(**changes):
        model = make_model(**changes)
        params = jax.eval_shape(functools.partial(world_model.init, model), jax.random.key(0))
        head = params.pop("inverse_dynamics")
        return head["Dense_0"]["kernel"].shape, jax.tree.map(lambda x: x.shape, params)

    assert shapes(**changes) == ((size, 16), shapes()[1])


@pytest.mark.parametrize("changes", [{}, {"action_target": "shuffled"}, {"action_steps": 3}])
def test_the_head_on_embeddings_trains_the_encoder_and_not_the_recurrence(changes):
    _, gradient = measure(**changes)
    assert gradient["encoder"] > 0
    assert gradient["inverse_dynamics"] > 0
    assert gradient["rssm"] == 0


def test_the_head_on_features_trains_the_recurrence_too():
    _, gradient = measure(action_input="features")
    assert gradient["encoder"] > 0
    assert gradient["rssm"] > 0


@pytest.mark.parametrize("changes", [{"action_target": "shuffled"}, {"action_steps": 3}, {"action_input": "features"}])
def test_a_control_changes_the_action_term_alone(changes):
    found, expected = measure(**changes)[0], measure()[0]
    assert found["inverse_dynamics"] != expected["inverse_dynamics"]
    assert_equal(*({name: x[name] for name in ("reconstruction", "kl")} for x in (found, expected)))


def kl(weight):
    """The KL term, and the KL of each frame [B, T], at the first parameters."""
    model = make_model("dreamer_v2", **SIZES, first_kl_weight=weight)
    params, batch, rng = make_state(model).params, make_steps(), jax.random.key(0)

    @jax.jit
    def forward(params):
        embedding = world_model.embed(model, params, batch.observation)
        posterior = world_model.observe(model, params, embedding, batch.action, jax.random.split(rng)[0])
        prior = model.rssm.apply({"params": params["rssm"]}, posterior.deterministic, method="prior_logits")
        each = rssm.categorical_kl(posterior.logits, prior)
        return world_model_training.loss(params, batch, rng, model=model)[1]["kl"], each

    return jax.device_get(forward(params))


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_the_first_frames_kl_has_a_weight_of_its_own_and_the_others_keep_theirs(weight):
    found, each = kl(weight)
    assert each.shape == (B, T)
    assert each[:, 0].mean() > 1e-3
    np.testing.assert_allclose(found, (weight * each[:, 0].sum() + each[:, 1:].sum()) / (B * T), rtol=1e-5)
