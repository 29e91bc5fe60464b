"""PPO in imagination: advantages, loss, and whole iterations on a toy world."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from wam_jax import advantages, diffusion_policy, imagination, ppo
from wam_jax.imagination import ImaginationInputs
from wam_jax.types import LatentState

STATE_DIM = 2 + 1 * 2
POLICY_SETTINGS = ml_collections.FrozenConfigDict(
    {
        "kind": "diffusion",
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
        "standardize": False,
        "soft_feature": False,
    }
)
GAUSSIAN = ml_collections.FrozenConfigDict(
    {**POLICY_SETTINGS, "kind": "gaussian", "denoising_steps": 1, "finetuned_steps": 1, "exploration_std": 0.3}
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
        "bootstrap_at_limit": True,
        "clip_noisiest": 0.01,
        "clip_last": 0.1,
        "clip_rate": 3.0,
        "value_weight": 0.5,
        "bc_weight": 0.0,
        "target_kl": 1.0,
        "actor_learning_rate": 2e-3,
        "critic_learning_rate": 1e-2,
        "weight_decay": 0.0,
        "actor_max_gradient_norm": float("inf"),
        "epochs": 5,
        "batch_size": 10_000,
        "critic_warmup": 1,
        "reward_clip": 10.0,
        "min_advantage_std": 0.0,
        "ema_decay": 0.0,
    }
    return ml_collections.FrozenConfigDict({**settings, **changes})


def imagine_step(params, latent, action, rng):
    """A point on a line that moves by the first action; the second entry of h counts steps."""
    del rng
    moved = jnp.stack([params["gain"] * action[:, 0], jnp.full(action.shape[:1], 0.1)], axis=-1)
    return latent.replace(deterministic=latent.deterministic + moved)


def reward_rule(params, feature, first_feature, count):
    return feature[..., 0] > params["goal"], count


@functools.cache
def make_policy(seed=0, settings=POLICY_SETTINGS):
    init = functools.partial(diffusion_policy.init, state_dim=STATE_DIM, settings=settings)
    return jax.jit(init)(jax.random.key(seed)).params


@functools.cache
def make_state(settings=POLICY_SETTINGS):
    init = functools.partial(ppo.init, state_dim=STATE_DIM, settings=make_settings())
    return jax.jit(init)(jax.random.key(1), make_policy(settings=settings))


def make_inputs(goal=1.0, settings=POLICY_SETTINGS):
    start = LatentState(jnp.zeros((3, 2)), jnp.zeros((3, 1, 2)), jnp.zeros((3, 1, 2)).at[..., 0].set(1))
    return ImaginationInputs(
        start, jnp.int32(3), {"gain": jnp.asarray(0.25)}, {"goal": jnp.asarray(goal)}, make_policy(settings=settings)
    )


def collect_decisions(goal, **changes):
    """Decisions of one collection."""
    settings = make_settings(**changes)

    @jax.jit
    def collect(state, inputs, rng):
        policy = diffusion_policy.PolicyParams(inputs.base_policy_params, state.params.actor)
        static = {"policy_settings": POLICY_SETTINGS, "settings": settings}
        episodes = imagination.rollout(
            policy, inputs, rng, explore=True, imagine_step=imagine_step, reward_rule=reward_rule, **static
        )
        return ppo.prepare(state, episodes, inputs.base_policy_params, **static)[0]

    return collect(make_state(), make_inputs(goal=goal), jax.random.key(5))


@functools.cache
def make_decisions(**changes):
    """Decisions of one collection, some of them after the end of their episode."""
    decisions = collect_decisions(0.4, **changes)
    assert 0 < decisions.valid.sum() < decisions.valid.size
    return decisions


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
    result = advantages.gae(reward, value, next_value, terminated, truncated, discount=0.9, gae_lambda=0.8)
    expected = slow_gae(reward, value, next_value, terminated, truncated, 0.9, 0.8)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_truncation_bootstraps_and_termination_does_not():
    one, no, yes = jnp.ones((1, 1)), jnp.zeros((1, 1), bool), jnp.ones((1, 1), bool)
    static = {"discount": 0.5, "gae_lambda": 1.0}
    assert advantages.gae(one, 0 * one, 4 * one, yes, no, **static)[0] == 1
    assert advantages.gae(one, 0 * one, 4 * one, no, yes, **static)[0] == 3


def test_an_episode_that_runs_out_of_time_is_worth_nothing_or_what_its_last_state_is_worth():
    worth, nothing = (
        np.asarray(collect_decisions(99.0, bootstrap_at_limit=bootstrap).value_target).reshape(4, -1)[-1]
        for bootstrap in (True, False)
    )
    assert (np.abs(worth) > 1e-4).all() and (nothing == 0).all()


def test_success_at_the_limit_is_success_either_way():
    worth, nothing = (
        collect_decisions(-99.0, horizon=1, bootstrap_at_limit=bootstrap).value_target for bootstrap in (True, False)
    )
    np.testing.assert_array_equal(worth, nothing)
    assert (np.asarray(nothing) > 0.5).all()


def test_reward_scale_is_the_variance_of_all_valid_returns():
    rng = np.random.default_rng(1)
    settings, batches = make_settings(discount=0.9), []
    scale = make_state().reward_scale
    scale_reward = jax.jit(functools.partial(ppo.scale_reward, settings=settings))
    for _ in range(3):
        reward, valid = rng.random((4, 6)).astype(np.float32), rng.random((4, 6)) < 0.7
        scaled, scale = scale_reward(scale, reward, valid)
        returns = np.zeros_like(reward)
        for t in range(4):
            returns[t] = reward[t] + (0.9 * returns[t - 1] if t else 0)
        batches.append(returns[valid])
    seen = np.concatenate(batches)
    np.testing.assert_allclose(scale.mean, seen.mean(), rtol=1e-4)
    np.testing.assert_allclose(scaled, reward / seen.std(ddof=1), rtol=1e-3)


def test_clip_grows_from_the_noisiest_step_to_the_last():
    width = ppo.clip_width(make_settings(clip_noisiest=0.001, clip_last=0.01), 10)
    np.testing.assert_allclose(width[jnp.array([0, -1])], [0.001, 0.01], rtol=1e-5)
    middle = 0.001 + 0.009 * (np.exp(3 * 4 / 9) - 1) / (np.exp(3) - 1)
    np.testing.assert_allclose(width[4], middle, rtol=1e-5)
    np.testing.assert_allclose(ppo.clip_width(make_settings(), 1), [0.1], rtol=1e-5)


@functools.cache
def make_gradient():
    settings = make_settings(bc_weight=0.1)
    return jax.jit(
        jax.grad(functools.partial(ppo.loss, policy_settings=POLICY_SETTINGS, settings=settings), has_aux=True)
    )


def test_invalid_decisions_change_neither_loss_nor_gradient():
    params = make_state().params
    half = jax.tree.map(lambda x: x[:32], make_decisions()).replace(valid=jnp.ones(32, bool))
    garbage = jax.tree.map(lambda x: jnp.full_like(x, 1e3), half).replace(valid=jnp.zeros(32, bool))
    padded = jax.tree.map(lambda *x: jnp.concatenate(x), half, garbage)
    doubled = jax.tree.map(lambda *x: jnp.concatenate(x), half, half)
    result, expected = (make_gradient()(params, x, jnp.roll(x.chain, 1, axis=1)) for x in (padded, doubled))
    chex.assert_trees_all_close(result, expected, rtol=1e-3, atol=1e-6)


def test_advantages_are_normalised_over_valid_decisions():
    decisions = make_decisions()
    advantage = np.asarray(decisions.advantage)[np.asarray(decisions.valid)]
    np.testing.assert_allclose([advantage.mean(), advantage.std(ddof=1)], [0, 1], atol=1e-4)


def test_advantages_are_divided_by_a_floor_where_they_vary_less():
    free, high, higher = (make_decisions(min_advantage_std=floor) for floor in (1e-3, 10.0, 20.0))
    assert np.std(free.advantage[free.valid]) == pytest.approx(1, abs=0.01)
    assert np.std(high.advantage[high.valid]) < 0.5
    np.testing.assert_allclose(high.advantage, 2 * higher.advantage, rtol=1e-5)
    quotient = np.asarray(high.advantage / free.advantage)
    np.testing.assert_allclose(quotient, quotient[0], rtol=1e-3)


def test_without_the_regulariser_its_chains_are_not_looked_at():
    decisions, state = make_decisions(), make_state()
    params = state.params.replace(actor=make_policy(seed=9))
    static = {"policy_settings": POLICY_SETTINGS}

    def gradient(bc_weight, chain):
        loss = functools.partial(ppo.loss, settings=make_settings(bc_weight=bc_weight), **static)
        return jax.jit(jax.grad(loss, has_aux=True))(params, decisions, chain)

    grads, metrics = gradient(0.0, jnp.full_like(decisions.chain, jnp.nan))
    plain, plain_metrics = gradient(1e-20, decisions.chain)
    plain_metrics.pop("bc_loss")
    chex.assert_trees_all_close((grads, metrics), (plain, plain_metrics), rtol=1e-4, atol=1e-6)


def test_regulariser_pulls_towards_the_base_policy():
    state = make_state()
    decisions = jax.tree.map(lambda x: x[:64], make_decisions())
    indifferent = decisions.replace(advantage=jnp.zeros(64), valid=jnp.ones(64, bool))
    params, losses = state.params.replace(actor=make_policy(seed=9)), []
    for _ in range(30):  # the decisions' chains are the base policy's own
        grads, metrics = make_gradient()(params, indifferent, decisions.chain)
        params = params.replace(actor=jax.tree.map(lambda p, g: p - 2.0 * g, params.actor, grads.actor))
        losses.append(float(metrics["bc_loss"]))
    floor = float(make_gradient()(state.params, indifferent, decisions.chain)[1]["bc_loss"])
    assert losses[-1] - floor < 0.5 * (losses[0] - floor), (losses, floor)


def test_updates_stop_once_the_kl_exceeds_its_target():
    settings = make_settings(target_kl=-1.0, epochs=2, batch_size=80, critic_warmup=0)
    update = functools.partial(ppo.update, policy_settings=POLICY_SETTINGS, settings=settings)
    state, metrics = jax.jit(update)(make_state(), make_decisions(), make_policy(), jax.random.key(0))
    assert int(metrics["gradient_steps"]) == int(optax.tree_utils.tree_get(state.critic_optimizer_state, "count")) == 1


def test_minibatches_cover_distinct_decisions_and_drop_the_remainder():
    settings = make_settings(epochs=2, batch_size=80)
    rows = np.asarray(ppo._minibatch_rows(jax.random.key(0), 256, settings))
    assert rows.shape == (6, 80)
    assert all(len(np.unique(epoch)) == 240 for epoch in rows.reshape(2, 240))
    assert ppo._minibatch_rows(jax.random.key(0), 50, settings).shape == (2, 50)


@pytest.mark.parametrize(("policy", "goal"), [(POLICY_SETTINGS, 1.0), (GAUSSIAN, 0.4)], ids=["diffusion", "gaussian"])
def test_learns_a_trivial_task_with_one_trace(policy, goal):
    settings, inputs, traces = make_settings(), make_inputs(goal, policy), []
    state = first_state = make_state(policy)

    @jax.jit
    def iterate(state, inputs, rng):
        traces.append(1)
        static = {"policy_settings": policy, "settings": settings}
        return ppo.iteration(state, inputs, rng, imagine_step=imagine_step, reward_rule=reward_rule, **static)

    history = []
    for i in range(30):
        state, metrics = iterate(state, inputs, jax.random.key(i))
        if i == 0:
            chex.assert_trees_all_equal(state.params.actor, first_state.params.actor)  # the critic warms up
        history.append(jax.device_get(metrics))
    assert len(traces) == 1
    success = [float(m["imagined_success"]) for m in history]
    assert np.mean(success[:3]) < 0.3 and np.mean(success[-5:]) > 0.6, success
    for metrics in history:
        np.testing.assert_allclose([metrics["first_approx_kl"], metrics["first_ratio_error"]], 0, atol=1e-5)
    assert history[5]["ratio_error"] > 1e-4 and all(np.isfinite(list(m.values())).all() for m in history)
    assert history[-1]["valid_decisions"] < history[0]["valid_decisions"]
    assert history[-1]["gradient_steps"] == settings.epochs and int(state.iteration) == 30
    chex.assert_trees_all_equal(state.ema_actor, state.params.actor)  # no average where its decay is 0


def test_the_policy_is_the_average_of_the_actor_over_the_iterations():
    static = {"policy_settings": POLICY_SETTINGS, "settings": make_settings(ema_decay=0.9, critic_warmup=1)}
    iterate = jax.jit(functools.partial(ppo.iteration, imagine_step=imagine_step, reward_rule=reward_rule, **static))
    state, expected = make_state(), make_policy()
    state, _ = iterate(state, make_inputs(goal=0.4), jax.random.key(9))
    chex.assert_trees_all_equal(state.ema_actor, expected)  # the critic warms up
    for i in range(2):
        state, _ = iterate(state, make_inputs(goal=0.4), jax.random.key(i))
        expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, expected, state.params.actor)
    chex.assert_trees_all_close(state.ema_actor, expected, rtol=1e-6, atol=1e-7)
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), state.ema_actor, state.params.actor)
    assert max(jax.tree.leaves(moved)) > 1e-3
