"""PPO in imagination: advantages, loss, and whole iterations on a toy world."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from wam_jax import diffusion_policy, imagination, ppo
from wam_jax.imagination import ImaginationInputs
from wam_jax.types import LatentState

STATE_DIM = 2 + 1 * 2
POLICY_SETTINGS = ml_collections.FrozenConfigDict(
    {
        "hidden_dim": 32,
        "num_blocks": 1,
        "time_dim": 16,
        "chunk": 2,
        "compute_dtype": "float32",
        "denoising_steps": 5,
        "finetuned_steps": 3,
        "exploration_std": 0.1,
        "evaluation_std": 1e-3,
        "noise_clip": 3.0,
        "learning_rate": 1e-4,
        "final_learning_rate": 1e-5,
        "warmup_steps": 1,
        "decay_steps": 2,
        "weight_decay": 0.0,
    }
)


def make_settings(**changes):
    settings = {
        "num_rollouts": 64,
        "horizon": 4,
        "resample_latent": True,
        "critic_hidden_dim": 16,
        "critic_num_blocks": 1,
        "discount": 0.99,
        "gae_lambda": 0.95,
        "denoising_discount": 0.99,
        "clip_noisiest": 0.01,
        "clip_last": 0.1,
        "clip_rate": 3.0,
        "value_weight": 0.5,
        "bc_weight": 0.0,
        "target_kl": 1.0,
        "actor_learning_rate": 1e-3,
        "critic_learning_rate": 1e-2,
        "weight_decay": 0.0,
        "actor_max_gradient_norm": float("inf"),
        "epochs": 5,
        "batch_size": 10_000,
        "critic_warmup": 1,
        "reward_clip": 10.0,
    }
    return ml_collections.FrozenConfigDict({**settings, **changes})


def imagine_step(params, latent, action, rng):
    """A point on a line that moves by the first action; the second entry of h counts steps."""
    del rng
    moved = jnp.stack([params["gain"] * action[:, 0], jnp.full(action.shape[:1], 0.1)], axis=-1)
    return latent.replace(deterministic=latent.deterministic + moved)


def reward_rule(params, feature, count):
    return feature[:, 0] > params["goal"], count


def make_inputs(goal=1.0):
    start = LatentState(jnp.zeros((3, 2)), jnp.zeros((3, 1, 2)), jnp.zeros((3, 1, 2)).at[..., 0].set(1))
    policy = diffusion_policy.init(jax.random.key(0), STATE_DIM, POLICY_SETTINGS).params
    return ImaginationInputs(start, {"gain": jnp.asarray(0.25)}, {"goal": jnp.asarray(goal)}, policy)


def make_iteration(settings):
    return functools.partial(
        ppo.iteration,
        imagine_step=imagine_step,
        reward_rule=reward_rule,
        policy_settings=POLICY_SETTINGS,
        settings=settings,
    )


def make_decisions(settings, inputs, state):
    """Decisions of one collection, some of them invalid."""

    @jax.jit
    def collect(state, inputs, rng):
        policy = diffusion_policy.PolicyParams(inputs.base_policy_params, state.params.actor)
        episodes = imagination.rollout(
            policy, inputs, rng, explore=True, imagine_step=imagine_step, reward_rule=reward_rule,
            policy_settings=POLICY_SETTINGS, settings=settings,
        )  # fmt: skip
        return ppo.prepare(state, episodes, policy_settings=POLICY_SETTINGS, settings=settings)[0]

    return collect(state, inputs, jax.random.key(5))


def slow_gae(reward, value, next_value, terminated, truncated, discount, gae_lambda):
    advantage = np.zeros_like(reward)
    for b in range(reward.shape[1]):
        following = 0.0
        for t in reversed(range(reward.shape[0])):
            bootstrap = 0.0 if terminated[t, b] else next_value[t, b]
            if terminated[t, b] or truncated[t, b]:
                following = 0.0
            following = reward[t, b] + discount * bootstrap - value[t, b] + discount * gae_lambda * following
            advantage[t, b] = following
    return advantage, advantage + value


def test_gae_equals_a_slow_loop():
    rng = np.random.default_rng(0)
    reward, value, next_value = (rng.normal(size=(9, 5)).astype(np.float32) for _ in range(3))
    terminated, truncated = rng.random((9, 5)) < 0.2, rng.random((9, 5)) < 0.2
    result = ppo.gae(reward, value, next_value, terminated, truncated, discount=0.9, gae_lambda=0.8)
    expected = slow_gae(reward, value, next_value, terminated, truncated, 0.9, 0.8)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_truncation_bootstraps_and_termination_does_not():
    one, no, yes = jnp.ones((1, 1)), jnp.zeros((1, 1), bool), jnp.ones((1, 1), bool)
    static = {"discount": 0.5, "gae_lambda": 1.0}
    assert ppo.gae(one, 0 * one, 4 * one, yes, no, **static)[0] == 1
    assert ppo.gae(one, 0 * one, 4 * one, no, yes, **static)[0] == 3


def test_reward_scale_is_the_variance_of_all_valid_returns():
    rng = np.random.default_rng(1)
    settings, batches = make_settings(discount=0.9), []
    scale = ppo.init(jax.random.key(0), {}, STATE_DIM, settings).reward_scale
    for _ in range(3):
        reward, valid = rng.random((4, 6)).astype(np.float32), rng.random((4, 6)) < 0.7
        scale = ppo.update_reward_scale(scale, reward, valid, settings=settings)
        returns = np.zeros_like(reward)
        for t in range(4):
            returns[t] = reward[t] + (0.9 * returns[t - 1] if t else 0)
        batches.append(returns[valid])
    seen = np.concatenate(batches)
    np.testing.assert_allclose(scale.mean, seen.mean(), rtol=1e-4)
    np.testing.assert_allclose(scale.variance, seen.var(ddof=1), rtol=1e-3)
    scaled = ppo.scale_reward(scale, jnp.array([1.0, 1e6]), settings=settings)
    np.testing.assert_allclose(scaled, [1 / seen.std(ddof=1), 10], rtol=1e-3)


def test_clip_grows_from_the_noisiest_step_to_the_last():
    width = ppo.clip_width(make_settings(clip_noisiest=0.001, clip_last=0.01), 10)
    np.testing.assert_allclose(width[jnp.array([0, -1])], [0.001, 0.01], rtol=1e-5)
    middle = 0.001 + 0.009 * (np.exp(3 * 4 / 9) - 1) / (np.exp(3) - 1)
    np.testing.assert_allclose(width[4], middle, rtol=1e-5)
    np.testing.assert_allclose(ppo.clip_width(make_settings(), 1), [0.1], rtol=1e-5)


def test_invalid_decisions_change_neither_loss_nor_gradient():
    settings, inputs = make_settings(bc_weight=0.1), make_inputs(goal=0.4)
    state = ppo.init(jax.random.key(1), inputs.base_policy_params, STATE_DIM, settings)
    decisions = make_decisions(settings, inputs, state)
    assert 0 < decisions.valid.sum() < decisions.valid.size
    bc_chain = jnp.roll(decisions.chain, 1, axis=0)
    gradient = jax.jit(
        jax.grad(functools.partial(ppo.loss, policy_settings=POLICY_SETTINGS, settings=settings), has_aux=True)
    )

    def spoil(x):
        invalid = ~decisions.valid.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(invalid, 1e3, x) if x.dtype == jnp.float32 else x

    garbage = jax.tree.map(spoil, decisions)
    expected = gradient(state.params, decisions, bc_chain)
    chex.assert_trees_all_equal(gradient(state.params, garbage, spoil(bc_chain)), expected)
    kept = jax.tree.map(lambda x: x[decisions.valid], decisions)
    chex.assert_trees_all_close(gradient(state.params, kept, bc_chain[decisions.valid]), expected, rtol=1e-3, atol=1e-5)


def test_advantages_are_normalised_over_valid_decisions():
    settings, inputs = make_settings(), make_inputs(goal=0.4)
    state = ppo.init(jax.random.key(1), inputs.base_policy_params, STATE_DIM, settings)
    decisions = make_decisions(settings, inputs, state)
    advantage = np.asarray(decisions.advantage)[np.asarray(decisions.valid)]
    np.testing.assert_allclose([advantage.mean(), advantage.std(ddof=1)], [0, 1], atol=1e-4)


def test_learns_a_trivial_task_with_one_trace_and_leaves_what_is_frozen():
    settings, inputs = make_settings(), make_inputs()
    state = first_state = ppo.init(jax.random.key(1), inputs.base_policy_params, STATE_DIM, settings)
    before = jax.tree.map(np.array, inputs)
    chex.clear_trace_counter()
    iterate = jax.jit(chex.assert_max_traces(make_iteration(settings), n=1))
    history = []
    for i in range(40):
        state, metrics = iterate(state, inputs, jax.random.key(i))
        if i == 0:
            chex.assert_trees_all_equal(state.params.actor, first_state.params.actor)  # the critic warms up
        history.append(jax.device_get(metrics))
    chex.assert_trees_all_equal(jax.tree.map(np.array, inputs), before)
    success = [float(m["imagined_success"]) for m in history]
    assert np.mean(success[:3]) < 0.4 and np.mean(success[-3:]) > 0.8, success
    for metrics in history:
        np.testing.assert_allclose([metrics["first_approx_kl"], metrics["first_ratio_error"]], 0, atol=1e-5)
    assert history[5]["ratio_error"] > 1e-4 and all(np.isfinite(list(m.values())).all() for m in history)
    assert history[-1]["valid_decisions"] < history[0]["valid_decisions"]
    assert int(state.iteration) == 40


def test_regulariser_pulls_towards_the_base_policy():
    settings, inputs = make_settings(bc_weight=0.5, critic_warmup=0, actor_learning_rate=1e-2), make_inputs(goal=99.0)
    state = ppo.init(jax.random.key(1), inputs.base_policy_params, STATE_DIM, settings)
    other = diffusion_policy.init(jax.random.key(9), STATE_DIM, POLICY_SETTINGS).params
    state = state.replace(params=state.params.replace(actor=other))
    iterate = jax.jit(make_iteration(settings))
    losses = []
    for i in range(8):
        state, metrics = iterate(state, inputs, jax.random.key(i))
        losses.append(float(metrics["bc_loss"]))
    assert losses[-1] < losses[0] - 0.1, losses


@pytest.mark.parametrize(("target_kl", "steps"), [(-1.0, 1), (1e9, 6)])
def test_updates_stop_once_the_kl_exceeds_its_target(target_kl, steps):
    settings = make_settings(target_kl=target_kl, epochs=2, batch_size=80, critic_warmup=0)
    inputs = make_inputs(goal=0.4)
    state = ppo.init(jax.random.key(1), inputs.base_policy_params, STATE_DIM, settings)
    state, metrics = jax.jit(make_iteration(settings))(state, inputs, jax.random.key(0))
    assert int(metrics["gradient_steps"]) == steps  # 64 x 4 decisions: 3 minibatches of 80 in each of 2 epochs
    assert int(state.critic_optimizer_state[0].count) == steps
