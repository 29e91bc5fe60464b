"""World models that see less than WAM's, or decode more: vision only, and the hybrid."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import B, T, assert_equal, make_model, make_state, make_steps
from ml_collections import FrozenConfigDict

from experiments.configs import base
from wam_jax import specs, world_model, world_model_training
from wam_jax.networks import rssm

quick_compilation = helpers.quick_compilation


def sizes(config):
    """Parameters of each part."""
    model = world_model.build(FrozenConfigDict(config.world_model))
    shapes = jax.eval_shape(functools.partial(world_model.init, model), jax.random.key(0))
    return {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in shapes.items()}


def test_without_proprioception_all_that_reads_an_embedding_is_smaller_and_nothing_else():
    config = base.get_config()
    whole, less = sizes(config), specs.PROPRIOCEPTION_DIM
    config.world_model.proprioception_input = False
    assert {name: whole[name] - size for name, size in sizes(config).items()} == {
        "encoder": 0,
        "rssm": less * config.world_model.rssm_hidden_dim,
        "decoder": 0,
        "inverse_dynamics": 2 * less * config.world_model.inverse_dynamics_dims[0],
    }


def test_without_proprioception_the_robots_state_reaches_neither_embedding_nor_loss():
    model = make_model(proprioception_input=False, proprioception_weight=0.0, open_loop_weight=0.0)
    batch = make_steps()
    robot_obs = make_steps(seed=99).observation.robot_obs
    changed = batch.replace(observation=batch.observation.replace(robot_obs=robot_obs))
    weights = make_state(model).params
    embed = jax.jit(functools.partial(world_model.embed, model))
    assert embed(weights, batch.observation).shape == (B, T, 16)
    assert_equal(*(embed(weights, x.observation) for x in (batch, changed)))
    loss = jax.jit(functools.partial(world_model_training.loss, model=model))
    assert_equal(*(loss(weights, x, jax.random.key(0)) for x in (batch, changed)))


def test_the_robots_own_state_is_measured_while_observing_and_moved_by_what_h_expects_while_imagining():
    model, batch = make_model(robot_state=True), make_steps()
    weights = make_state(model).params
    measured = specs.proprioception(batch.observation.robot_obs)

    def forward(weights, batch):
        embedding = world_model.embed(model, weights, batch.observation)
        posterior = world_model.observe(model, weights, embedding, batch.action, jax.random.key(0))
        at = functools.partial(jax.tree.map, lambda x: x[:, 0])
        imagined = world_model.imagine(model, weights, at(posterior), batch.action, jax.random.key(1))
        return posterior, imagined, world_model.expected_robot(model, weights, posterior, batch.action)

    posterior, imagined, expected = jax.jit(forward)(weights, batch)
    np.testing.assert_allclose(posterior.robot, measured, atol=1e-6)
    feature = rssm.feature(posterior)
    assert feature.shape[-1] == world_model.feature_dim(model.settings)
    np.testing.assert_array_equal(feature[..., -specs.PROPRIOCEPTION_DIM :], posterior.robot)
    np.testing.assert_allclose(imagined.deterministic[:, 0], posterior.deterministic[:, 1], atol=1e-5)
    np.testing.assert_allclose(imagined.robot[:, 0], expected[:, 1], atol=1e-5)  # one step ahead they agree
    assert np.abs(imagined.robot[:, 0] - measured[:, 0]).max() > 1e-3  # it moves
    later = np.array(batch.observation.robot_obs)
    later[:, 1:] += 0.1
    changed = batch.replace(observation=batch.observation.replace(robot_obs=later))
    assert_equal(jax.jit(forward)(weights, changed)[1].robot, imagined.robot)  # imagination sees the first frame alone


def test_imagination_may_follow_the_robot_as_recorded():
    """Each step is then that of imagination begun anew from the one before with the recorded state."""
    model, batch = make_model(robot_state=True, soft_prior=True), make_steps()  # expected z: no noise
    weights = make_state(model).params
    robot = specs.proprioception(batch.observation.robot_obs)

    def forward(weights, batch):
        embedding = world_model.embed(model, weights, batch.observation)
        posterior = world_model.observe(model, weights, embedding, batch.action, jax.random.key(0))
        start = jax.tree.map(lambda x: x[:, 0], posterior)
        imagine = functools.partial(world_model.imagine, model, weights, rng=jax.random.key(1))
        followed = imagine(start, batch.action[:, :2], robot=robot[:, 1:3])
        first = jax.tree.map(lambda x: x[:, 0], imagine(start, batch.action[:, :1]))
        second = imagine(first.replace(robot=robot[:, 1]), batch.action[:, 1:2])
        return followed, first, second, imagine(start, batch.action[:, :2])

    followed, first, second, free = jax.jit(forward)(weights, batch)
    np.testing.assert_array_equal(followed.robot, robot[:, 1:3])
    np.testing.assert_allclose(followed.deterministic[:, 0], first.deterministic, atol=1e-5)
    np.testing.assert_allclose(followed.deterministic[:, 1], second.deterministic[:, 0], atol=1e-5)
    np.testing.assert_allclose(followed.logits[:, 1], second.logits[:, 0], atol=1e-4)
    assert np.abs(followed.deterministic[:, 1] - free.deterministic[:, 1]).max() > 1e-3


def test_the_robots_own_state_must_be_seen():
    with pytest.raises(ValueError, match="needs proprioception_input=True"):
        make_model(robot_state=True, proprioception_input=False)


def test_the_robots_own_state_is_learnt_one_step_ahead_and_in_open_loop():
    model, batch = make_model(robot_state=True), make_steps()
    weights = make_state(model).params
    assert "proprioception_decoder" not in weights

    def errors(weights):
        metrics = world_model_training.loss(weights, batch, jax.random.key(0), model=model)[1]
        return jnp.stack([metrics["proprioception"], metrics["open_loop_proprioception"]])

    def still(weights):  # a model that expects no change at all
        return jax.tree_util.tree_map_with_path(lambda path, x: x * ("robot_out" not in str(path)), weights)

    measured = specs.proprioception(batch.observation.robot_obs)
    change = 0.5 * np.square(np.diff(measured, axis=1)).sum(-1)
    found = jax.jit(errors)(still(weights))
    np.testing.assert_allclose(found[0], change.sum() / (B * T), rtol=1e-5)  # the first frame's error is none
    steps = model.settings.open_loop_steps
    segments = np.asarray(measured)[:, : T // steps * steps].reshape(-1, steps, specs.PROPRIOCEPTION_DIM)
    np.testing.assert_allclose(found[1], 0.5 * np.square(segments[:, 1:] - segments[:, :1]).sum(-1).mean(), rtol=1e-5)
    gradients = jax.jit(jax.jacrev(errors))(weights)["rssm"]
    for part in ("robot_in", "robot_out", "gru"):
        for term in range(2):
            assert all(jnp.abs(x[term]).sum() > 0 for x in jax.tree.leaves(gradients[part])), (part, term)


def test_the_scene_decoder_is_trained_on_filtered_and_on_imagined_features_of_the_mechanisms_alone():
    model = make_model(scene_weight=3.0)
    weights, batch = make_state(model).params, make_steps()
    plain = {name: tree for name, tree in weights.items() if name != "scene_decoder"}
    assert_equal(plain, make_state(make_model()).params)  # the other parts begin as without it

    def terms(weights, scene_obs):
        observed = batch.replace(observation=batch.observation.replace(scene_obs=scene_obs))
        total, metrics = world_model_training.loss(weights, observed, jax.random.key(0), model=model)
        return jnp.stack([metrics["scene"], metrics["open_loop_scene"]]), (total, metrics)

    scene_obs = np.random.default_rng(0).uniform(0, 0.1, batch.observation.scene_obs.shape).astype(np.float32)
    (gradients, by_entry), (total, metrics) = jax.jit(jax.jacrev(terms, argnums=(0, 1), has_aux=True))(
        weights, scene_obs
    )
    size = {
        name: sum(jnp.abs(x).sum(axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(tree))
        for name, tree in gradients.items()
    }
    for name in ("scene_decoder", "encoder", "rssm"):
        assert (size.pop(name) > 0).all(), name
    assert not any(x.any() for x in size.values()), size
    expected = sum(
        weight * metrics[name]
        for name, weight in {
            "reconstruction": 1.0, "kl": model.settings.kl_weight, "inverse_dynamics": model.settings.action_weight,
            "proprioception": model.settings.proprioception_weight, "scene": 3.0, "open_loop": 1.0,
        }.items()
    )  # fmt: skip
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    open_loop = {"kl": model.settings.kl_weight, "proprioception": model.settings.proprioception_weight, "scene": 3.0}
    expected = sum(weight * metrics[f"open_loop_{name}"] for name, weight in open_loop.items())
    np.testing.assert_allclose(metrics["open_loop"], expected, rtol=1e-6)
    for of_term in np.abs(by_entry).sum((1, 2)):
        np.testing.assert_array_equal(of_term > 0, np.arange(specs.SCENE_OBS_DIM) < specs.NUM_MECHANISMS)
