"""The Gaussian policy: one denoising step of a network that predicts the chunk itself."""

import functools

import chex
import distrax
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from experiments import train_policy
from experiments.configs import base, quickstart
from wam_jax import diffusion_policy
from wam_jax.diffusion_policy import PolicyBank, PolicyBatch, PolicyParams
from wam_jax.networks import rssm
from wam_jax.types import LatentState

STATE_DIM = 8 + 2 * 4


def make_config(config=quickstart, **changes):
    config = config.get_config()
    config.policy.update(kind="gaussian", **changes)
    return FrozenConfigDict(config)


SETTINGS = train_policy.policy_settings(make_config(hidden_dim=64, warmup_steps=10, batch_size=32, num_steps=600))
init = jax.jit(functools.partial(diffusion_policy.init, state_dim=STATE_DIM, settings=SETTINGS))
act = jax.jit(functools.partial(diffusion_policy.act, settings=SETTINGS))


def make_batch(size=6):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(size, 2, 4)).astype(np.float32)
    stochastic = np.eye(4, dtype=np.float32)[logits.argmax(-1)]
    latent = LatentState(rng.normal(size=(size, 8)).astype(np.float32), logits, stochastic)
    action = rng.uniform(-0.9, 0.9, (size, 4, 7)).astype(np.float32)
    action[..., -1] = np.sign(action[..., -1])  # a gripper's commands lie on the edge
    return PolicyBatch(latent, action)


def test_parameters_are_those_of_a_residual_mlp_of_the_state():
    config = make_config(base)
    params = jax.eval_shape(functools.partial(train_policy.initial_state, config, "open_drawer")).params
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == 2049 * 512 + 2 * 513 * 512 + 513 * 28


def test_a_chunk_is_drawn_and_scored_by_one_normal_distribution_around_the_mean():
    params, feature = init(jax.random.key(0)).params, np.random.default_rng(1).normal(size=(500, STATE_DIM))
    feature = feature.astype(np.float32)
    policy = PolicyParams(params, params)
    mean = act(policy, feature, jax.random.key(1))
    np.testing.assert_array_equal(mean, act(policy, feature, jax.random.key(2)))  # evaluation draws nothing

    @jax.jit
    def explore(params, rng):
        chunk, chain = diffusion_policy.sample(policy, feature, rng, explore=True, settings=SETTINGS)
        conditioned = diffusion_policy.condition(params, feature, settings=SETTINGS)
        return chunk, chain, diffusion_policy.log_prob(params, conditioned, chain, settings=SETTINGS)

    chunk, chain, log_prob = explore(params, jax.random.key(3))
    assert chain.shape == (500, 2, 4, 7) and log_prob.shape == (500, 1)
    assert not chain[:, 0].any()
    np.testing.assert_array_equal(chunk, np.clip(chain[:, 1], -1, 1))
    std = SETTINGS.exploration_std
    drawn = (chain[:, 1] - mean) / std
    np.testing.assert_allclose([drawn.mean(), drawn.std()], [0, 1], atol=0.03)
    assert np.abs(drawn).max() < SETTINGS.noise_clip + 1e-3
    element = distrax.Normal(mean, std).log_prob(chain[:, 1])
    np.testing.assert_allclose(log_prob[:, 0], np.clip(element, -5, 2).mean((-2, -1)), atol=1e-4)


def test_cloning_minimises_the_squared_error_and_the_mean_reaches_the_actions():
    batch = make_batch()
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.full_like(x, jnp.nan)]), batch)
    bank = PolicyBank(padded, jnp.int32(len(batch.action)))
    state = jax.jit(functools.partial(diffusion_policy.set_statistics, settings=SETTINGS))(
        init(jax.random.key(0)), batch.latent
    )
    feature = rssm.feature(batch.latent, soft=SETTINGS.soft_feature)
    mean = act(PolicyParams(state.params, state.params), feature, jax.random.key(1))
    loss, metrics = diffusion_policy.loss(state.params, batch, jax.random.key(2), settings=SETTINGS)
    np.testing.assert_allclose(loss, np.square(mean - batch.action).mean(), rtol=1e-4)
    assert metrics["bc_loss"] == loss

    @jax.jit
    def train(state):
        update = functools.partial(diffusion_policy.update_from_bank, settings=SETTINGS)
        keys = jax.random.split(jax.random.key(3), SETTINGS.num_steps)
        return jax.lax.scan(lambda state, rng: update(state, bank, rng), state, keys)

    state, metrics = train(state)
    chex.assert_tree_all_finite(metrics)
    chunk = act(PolicyParams(state.ema_params, state.ema_params), feature, jax.random.key(4))
    assert np.abs(chunk - batch.action).mean() < 0.05
