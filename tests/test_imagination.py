"""The learned environment: starts, chunks, rewards, ends of episodes."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from wam_jax import diffusion_policy, imagination
from wam_jax.imagination import ImaginationInputs
from wam_jax.networks import rssm
from wam_jax.types import LatentState

STATE_DIM = 3 + 2 * 4
SETTINGS = ml_collections.FrozenConfigDict({"num_rollouts": 64, "horizon": 3, "resample_latent": True})
POLICY_SETTINGS = ml_collections.FrozenConfigDict(
    {
        "kind": "diffusion",
        "hidden_dim": 16,
        "num_blocks": 1,
        "time_dim": 16,
        "chunk": 2,
        "compute_dtype": "float32",
        "denoising_steps": 4,
        "finetuned_steps": 2,
        "exploration_std": 0.1,
        "evaluation_std": 1e-3,
        "noise_clip": 3.0,
        "learning_rate": 1e-4,
        "final_learning_rate": 1e-5,
        "warmup_steps": 1,
        "decay_steps": 2,
        "weight_decay": 0.0,
        "standardize": False,
        "soft_feature": False,
    }
)


def imagine_step(params, latent, action, rng):
    """h = (position, steps taken, last gripper command); z is drawn uniformly."""
    position, steps = latent.deterministic[:, 0], latent.deterministic[:, 1]
    deterministic = jnp.stack([position + params["gain"] * action[:, 0], steps + 1, action[:, -1]], axis=-1)
    return LatentState(
        deterministic,
        latent.logits,
        rssm.sample_stochastic(latent.logits, rssm.stochastic_noise(rng, latent.logits.shape[:-1])),
    )


def reward_rule(params, feature, first_feature, count):
    return feature[..., 0] > params["goal"], count + 1


def make_bank(size=5):
    logits = jnp.zeros((size, 2, 4))
    deterministic = jnp.zeros((size, 3)).at[:, 0].set(jnp.arange(size) / 100)
    return LatentState(deterministic, logits, jax.nn.one_hot(jnp.zeros((size, 2), int), 4))


@functools.cache
def make_policy():
    init = functools.partial(diffusion_policy.init, state_dim=STATE_DIM, settings=POLICY_SETTINGS)
    return jax.jit(init)(jax.random.key(0)).params


def make_inputs(goal, start=None):
    start = make_bank() if start is None else start
    size = jnp.int32(len(start.deterministic))
    return ImaginationInputs(start, size, {"gain": jnp.ones(())}, {"goal": jnp.asarray(goal)}, make_policy())


PAIR = ml_collections.FrozenConfigDict({**SETTINGS, "num_rollouts": 2})
STATIC = {"imagine_step": imagine_step, "reward_rule": reward_rule}
reset = jax.jit(functools.partial(imagination.reset, policy_settings=POLICY_SETTINGS, settings=SETTINGS))
step_chunk = jax.jit(
    functools.partial(imagination.step_chunk, policy_settings=POLICY_SETTINGS, settings=PAIR, **STATIC)
)


def rollout(inputs, rng):
    policy = diffusion_policy.PolicyParams(inputs.base_policy_params, inputs.base_policy_params)
    return imagination.rollout(
        policy, inputs, rng, explore=True, policy_settings=POLICY_SETTINGS, settings=SETTINGS, **STATIC
    )


def start_pair(inputs):
    state = reset(inputs.start, inputs.num_starts, jax.random.key(0))
    return jax.tree.map(lambda x: x[:2] if x.ndim else x, state)


def test_starts_come_from_the_bank_with_fresh_latents():
    state = reset(make_bank(), 5, jax.random.key(0))
    position = np.asarray(state.latent.deterministic[:, 0])
    assert set(np.round(100 * position).astype(int)) == {0, 1, 2, 3, 4}
    assert (state.latent.stochastic.sum(-1) == 1).all() and state.latent.stochastic[..., 0].mean() < 0.5
    assert not state.done.any() and state.success_count.sum() == 0


@pytest.mark.parametrize("size", [5, 24, 64, 70])
def test_all_starts_are_drawn_equally_often_and_padding_never(size):
    bank = make_bank(size).replace(deterministic=jnp.arange(size)[:, None] * jnp.ones(3))
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.full((7, *x.shape[1:]), jnp.nan)]), bank)
    seen = []
    for seed in range(20):
        drawn = np.asarray(reset(padded, size, jax.random.key(seed)).latent.deterministic[:, 0])
        np.testing.assert_array_equal(drawn, reset(bank, size, jax.random.key(seed)).latent.deterministic[:, 0])
        counts = np.bincount(drawn.astype(int), minlength=size)
        assert len(counts) == size and set(counts) <= {64 // size, -(-64 // size)}
        seen.append(counts)
    assert (np.sum(seen, axis=0) > 20 * (64 // size)).all() or size == 64  # which ones are drawn once more is chance


def test_a_decision_takes_every_action_in_order_with_the_gripper_thresholded():
    inputs = make_inputs(goal=100.0)
    state = start_pair(inputs)
    chunk = jnp.zeros((2, 2, 7)).at[:, :, 0].set(jnp.array([[0.5, 0.25], [2.0, -0.5]])).at[:, -1, -1].set(0.1)
    after, reward, terminated, truncated = step_chunk(state, chunk, jax.random.key(1), inputs)
    moved = after.latent.deterministic[:, 0] - state.latent.deterministic[:, 0]
    np.testing.assert_allclose(moved, [0.75, 0.5], atol=1e-6)  # 2.0 is clipped to 1
    np.testing.assert_allclose(after.latent.deterministic[:, 1:], [[2, 1], [2, 1]])
    assert not terminated.any() and not truncated.any() and reward.sum() == 0


def test_success_within_a_chunk_counts_and_ends_the_episode_once():
    inputs = make_inputs(goal=0.4)
    state = start_pair(inputs)
    there_and_back = jnp.zeros((2, 2, 7)).at[0, :, 0].set(jnp.array([0.5, -0.5]))
    rewards, ends, cuts = [], [], []
    for step in range(3):
        state, reward, terminated, truncated = step_chunk(state, there_and_back, jax.random.key(step), inputs)
        rewards, ends, cuts = [*rewards, reward], [*ends, terminated], [*cuts, truncated]
    np.testing.assert_array_equal(rewards, [[1, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(ends, np.array(rewards, bool))
    np.testing.assert_array_equal(cuts, [[False, False], [False, False], [False, True]])


def test_rollout_is_one_episode_each_and_the_rest_is_invalid():
    episodes = jax.jit(rollout)(make_inputs(goal=0.9), jax.random.key(3))
    valid, terminated, truncated = (np.asarray(x) for x in (episodes.valid, episodes.terminated, episodes.truncated))
    assert episodes.feature.shape == (3, 64, STATE_DIM) and episodes.chain.shape == (3, 64, 3, 2, 7)
    assert episodes.last_feature.shape == (64, STATE_DIM)
    np.testing.assert_array_equal(episodes.reward, terminated)
    np.testing.assert_array_equal((terminated | truncated).sum(0), 1)
    ended_before = np.cumsum(terminated, axis=0) - terminated
    np.testing.assert_array_equal(valid, ended_before == 0)
    assert 0 < terminated.any(0).sum() < 64, "the test needs both ends"
    np.testing.assert_allclose(imagination.success_rate(episodes), terminated.any(0).mean(), rtol=1e-6)
    position, last = np.asarray(episodes.feature[..., 0]), np.asarray(episodes.last_feature[:, 0])
    executed = np.clip(np.asarray(episodes.chain[:, :, -1, :, 0]), -1, 1).sum(-1)
    np.testing.assert_allclose(np.diff(np.concatenate([position, last[None]]), axis=0), executed, atol=1e-5)


def test_rollout_keeps_the_banks_dtypes():
    inputs = make_inputs(goal=100.0, start=make_bank().replace(deterministic=jnp.zeros((5, 3), jnp.bfloat16)))
    episodes = jax.eval_shape(rollout, inputs, jax.random.key(0))
    assert episodes.feature.dtype == jnp.bfloat16 and episodes.chain.dtype == episodes.reward.dtype == jnp.float32
