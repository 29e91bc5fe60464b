"""Diffusion policy: sizes, schedule, sampler, log-probabilities and behavioural cloning."""

import functools
from unittest import mock

import distrax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from wam_jax import diffusion_policy, flops, noise_schedule
from wam_jax.diffusion_policy import PolicyBatch, PolicyParams
from wam_jax.networks import categorical, rssm
from wam_jax.networks.denoiser import Critic, Denoiser, mish
from wam_jax.types import LatentState

STATE_DIM = 8 + 2 * 4
ROWS = 4000


def make_settings(**changes):
    settings = {
        "kind": "diffusion",
        "hidden_dim": 64,
        "num_blocks": 1,
        "time_dim": 16,
        "chunk": 4,
        "compute_dtype": "float32",
        "denoising_steps": 8,
        "finetuned_steps": 4,
        "exploration_std": 0.1,
        "evaluation_std": 1e-3,
        "noise_clip": 3.0,
        "learning_rate": 3e-3,
        "final_learning_rate": 1e-4,
        "warmup_steps": 10,
        "decay_steps": 1500,
        "weight_decay": 1e-6,
        "ema_decay": 0.98,
        "resample_latent": True,
        "standardize": False,
        "soft_feature": False,
        "batch_size": 32,
        "noise_draws": 1,
    }
    return ml_collections.FrozenConfigDict({**settings, **changes})


def make_batch(batch_size=4):
    rng = jax.random.split(jax.random.key(0), 3)
    logits = 8 * jax.random.normal(rng[0], (batch_size, 2, 4))  # nearly certain, so that re-sampling changes little
    latent = LatentState(
        deterministic=jax.random.normal(rng[1], (batch_size, 8)),
        logits=logits,
        stochastic=jax.nn.one_hot(logits.argmax(-1), 4),
    )
    return PolicyBatch(latent, jax.random.uniform(rng[2], (batch_size, 4, 7), minval=-0.9, maxval=0.9))


draw = jax.jit(functools.partial(diffusion_policy.sample, explore=True, settings=make_settings()))


init = jax.jit(functools.partial(diffusion_policy.init, state_dim=STATE_DIM, settings=make_settings()))


@functools.cache
def make_params(seed=0):
    return init(jax.random.key(seed)).params


def num_parameters(params):
    return sum(x.size for x in jax.tree.leaves(params))


def test_parameter_counts_are_dppos():
    denoiser = functools.partial(Denoiser().init, method="denoise")
    params = jax.eval_shape(
        denoiser, jax.random.key(0), jnp.zeros((1, 4, 7)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 2048))
    )
    assert num_parameters(params) == 1_612_364
    assert num_parameters(jax.eval_shape(Critic().init, jax.random.key(0), jnp.zeros((1, 2048)))) == 656_385


def test_schedule_is_the_closed_form():
    steps = 20
    schedule = noise_schedule.cosine_schedule(steps)

    def signal(i):
        return np.cos((i / steps + 0.008) / 1.008 * np.pi / 2) ** 2

    # Before the clip of the last beta, the product telescopes to f(t + 1) / f(0).
    closed = np.array([signal(t + 1) / signal(0) for t in range(steps - 1)])
    np.testing.assert_allclose(schedule.alpha_bar[:-1], closed, rtol=1e-5)
    np.testing.assert_allclose(schedule.alpha_bar[-1], closed[-1] * 1e-3, rtol=1e-4)
    beta = 1 - closed[1] / closed[0]
    np.testing.assert_allclose(schedule.variance[1], beta * (1 - closed[0]) / (1 - closed[1]), rtol=1e-4)
    np.testing.assert_allclose([schedule.variance[0], schedule.clean_weight[0], schedule.noisy_weight[0]], [0, 1, 0])


def plain_network(params, chunk, step, state):
    """DPPO's form: one layer on concat[chunk, time, state] for every pair of a state and a step; [N, ...]."""
    p = params["params"]
    frequency = np.exp(-np.log(10_000) / 7 * np.arange(8))
    angle = step[:, None] * frequency
    time = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
    time = jax.nn.mish(time @ p["time_hidden"]["kernel"] + p["time_hidden"]["bias"])
    time = time @ p["time_out"]["kernel"] + p["time_out"]["bias"]
    kernel = jnp.concatenate([p["chunk_in"]["kernel"], p["state_in"]["kernel"]])
    hidden = jnp.concatenate([chunk.reshape(len(chunk), -1), time, state], -1) @ kernel + p["state_in"]["bias"]
    block = p["blocks_0"]
    inner = jax.nn.mish(hidden) @ block["Dense_0"]["kernel"] + block["Dense_0"]["bias"]
    hidden = hidden + jax.nn.mish(inner) @ block["Dense_1"]["kernel"] + block["Dense_1"]["bias"]
    return (hidden @ p["output"]["kernel"] + p["output"]["bias"]).reshape(chunk.shape)


def test_a_state_used_for_many_steps_equals_concatenation_in_value_and_gradient():
    network, rng, step = diffusion_policy.network(make_settings()), np.random.default_rng(0), jnp.arange(3)
    chunk, weight = (rng.normal(size=(2, 5, 3, 4, 7)).astype(np.float32) for _ in range(2))  # two chains a state
    state = rng.normal(size=(5, STATE_DIM)).astype(np.float32)

    def once_a_state(params):
        condition = network.apply(params, state, method="condition")[:, None]
        return network.apply(params, chunk, condition + network.apply(params, step, method="time"))

    def once_a_pair(params):
        steps = jnp.broadcast_to(step, (2, 5, 3)).reshape(-1)
        states = jnp.broadcast_to(state[:, None], (2, 5, 3, STATE_DIM)).reshape(30, -1)
        return plain_network(params, chunk.reshape(30, 4, 7), steps, states).reshape(chunk.shape)

    def value_and_gradient(form):
        return jax.jit(lambda params: (form(params), jax.grad(lambda p: jnp.sum(weight * form(p)))(params)))

    fast, plain = (value_and_gradient(form)(make_params()) for form in (once_a_state, once_a_pair))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), fast, plain)


def test_mish_equals_its_definition_in_value_and_gradient():
    x = jnp.concatenate([jnp.linspace(-30, 30, 601), jnp.array([-1e4, -100.0, 100.0, 1e4])])
    for fast, plain in ((mish, jax.nn.mish), (jax.vmap(jax.grad(mish)), jax.vmap(jax.grad(jax.nn.mish)))):
        np.testing.assert_allclose(jax.jit(fast)(x), jax.jit(plain)(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("matrix_backends", [("cpu",), ()])
def test_one_hot_samples_are_as_frequent_as_their_logits_say(matrix_backends, monkeypatch):
    monkeypatch.setattr(categorical, "MATRIX_BACKENDS", matrix_backends)
    logits = jnp.array([[0.0, 1.0, -1.0, -jnp.inf], [-jnp.inf, 0.0, -jnp.inf, 3.0]])
    drawn = jax.jit(categorical.sample_one_hot)(jnp.broadcast_to(logits, (40_000, 2, 4)), jax.random.key(0))
    np.testing.assert_array_equal(drawn.sum(-1), 1)
    np.testing.assert_allclose(drawn.mean(0), jax.nn.softmax(logits), atol=0.01)
    np.testing.assert_array_equal(drawn.mean(0)[logits == -jnp.inf], 0)


def test_cloning_overfits_a_batch_and_the_sampler_reproduces_it():
    settings, batch = make_settings(), make_batch()
    state = init(jax.random.key(0))
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.full_like(x, jnp.nan)]), batch)  # would be noticed
    bank = diffusion_policy.PolicyBank(padded, jnp.int32(len(batch.action)))

    def step(state, rng):
        new, metrics = diffusion_policy.update_from_bank(state, bank, rng, settings=settings)
        average = jax.tree.map(lambda old, now: 0.98 * old + 0.02 * now, state.ema_params, new.params)
        gap = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), average, new.ema_params)
        return new, (metrics["bc_loss"], jnp.stack(jax.tree.leaves(gap)).max())

    state, (losses, gaps) = jax.jit(functools.partial(jax.lax.scan, step))(
        state, jax.random.split(jax.random.key(1), 1500)
    )
    assert np.mean(losses[-50:]) < 0.1 * np.mean(losses[:10])
    policy = PolicyParams(base=state.ema_params, finetuned=state.ema_params)
    act = jax.jit(functools.partial(diffusion_policy.act, settings=settings))
    chunk = act(policy, rssm.feature(batch.latent), jax.random.key(2))
    assert chunk.shape == (4, 4, 7) and jnp.abs(chunk).max() <= 1
    assert jnp.abs(chunk - batch.action).mean() < 0.1, "the sampler does not reproduce what was cloned"
    assert gaps.max() < 1e-6, "the average of the parameters does not move at every update"
    assert int(state.step) == 1500


def test_more_draws_of_noise_are_the_loss_of_a_batch_that_repeats_its_states_for_less_work():
    batch, state, rng = make_batch(8), init(jax.random.key(0)), jax.random.key(1)
    bank = diffusion_policy.PolicyBank(batch, jnp.int32(8))
    exact = {"resample_latent": False, "batch_size": 32}

    def grads(batch, draws):
        settings = make_settings(**exact, noise_draws=draws)
        return jax.grad(diffusion_policy.loss, has_aux=True)(state.params, batch, rng, settings=settings)

    def work(draws):
        settings = make_settings(**exact, noise_draws=draws)
        update = functools.partial(diffusion_policy.update_from_bank, settings=settings)
        return flops.count(update, state, bank, rng)

    repeated = jax.tree.map(lambda x: jnp.concatenate([x] * 4), batch)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), grads(batch, 4), grads(repeated, 1))
    of_state = 2 * 2 * STATE_DIM * 64  # multiplications and additions of a row, forward and back; 64 wide
    assert work(1) - work(4) == (32 - 8) * of_state


def test_resampling_draws_from_the_stored_posterior():
    certain = make_batch(1)
    uniform = certain.replace(latent=certain.latent.replace(logits=jnp.zeros((1, 2, 4))))

    @jax.jit
    def losses(params, batch):
        both = (make_settings(resample_latent=resample) for resample in (False, True))
        return [diffusion_policy.loss(params, batch, jax.random.key(3), settings=settings)[0] for settings in both]

    (stored, drawn), (same, other) = losses(make_params(), certain), losses(make_params(), uniform)
    assert stored == same and drawn != other


def test_evaluation_adds_no_noise_at_the_last_step_and_exploration_does_at_all():
    settings = make_settings()
    evaluation = diffusion_policy.step_std(settings, explore=False)
    assert evaluation[0] == 0 and (evaluation[1:] >= 1e-3).all()
    np.testing.assert_allclose(diffusion_policy.step_std(settings, explore=True).min(), 0.1)


def test_base_denoises_the_first_steps_and_the_finetuned_the_last():
    settings = make_settings()
    base, other = make_params(), make_params(1)
    feature = jnp.ones((ROWS, STATE_DIM))
    chunk, chain = draw(PolicyParams(base, other), feature, jax.random.key(3))
    _, chain_of_base = draw(PolicyParams(base, base), feature, jax.random.key(3))
    assert chain.shape == (ROWS, settings.finetuned_steps + 1, 4, 7)
    np.testing.assert_array_equal(chain[:, 0], chain_of_base[:, 0])
    assert jnp.abs(chain[:, 1] - chain_of_base[:, 1]).max() > 0
    np.testing.assert_array_equal(chunk, jnp.clip(chain[:, -1], -1, 1))


def test_a_chain_that_is_drawn_anew_is_one_that_the_network_would_have_drawn():
    settings, params, feature = make_settings(), make_params(), jax.random.normal(jax.random.key(4), (6, STATE_DIM))

    @jax.jit
    def chains(params, feature, rng):
        _, chain = diffusion_policy.sample(PolicyParams(params, params), feature, rng, explore=True, settings=settings)
        conditioned = diffusion_policy.condition(params, feature, settings=settings)
        return chain, diffusion_policy.redraw(params, conditioned, chain[:, 0], rng, settings=settings)

    chain, other = chains(params, feature, jax.random.key(5))
    np.testing.assert_array_equal(chain[:, 0], other[:, 0])
    assert jnp.abs(chain[:, 1:] - other[:, 1:]).min(axis=(0, 2, 3)).max() > 1e-4, "noise of its own"
    with mock.patch.object(jax.random, "normal", lambda rng, shape: jnp.full(shape, 0.3)):
        same, again = chains.__wrapped__(params, feature, jax.random.key(5))
    np.testing.assert_allclose(same, again, atol=1e-5)


def test_log_prob_scores_the_distribution_that_the_sampler_draws_from():
    settings, params, feature = make_settings(), make_params(), jnp.ones((ROWS, STATE_DIM))
    _, chain = draw(PolicyParams(params, params), feature, jax.random.key(2))
    steps = np.arange(settings.finetuned_steps - 1, -1, -1)
    std = np.asarray(diffusion_policy.step_std(settings, explore=True))[steps]

    @jax.jit
    def score(params, chain):
        conditioned = diffusion_policy.condition(params, feature, settings=settings)
        transition = functools.partial(diffusion_policy.transition, explore=True, settings=settings)
        at_steps = functools.partial(diffusion_policy.at_steps, params, conditioned, settings=settings)
        means = [transition(params, at_steps(t), chain[:, i], t).loc for i, t in enumerate(jnp.asarray(steps))]
        return jnp.stack(means, 1), diffusion_policy.log_prob(params, conditioned, chain, settings=settings)

    means, scores = score(params, chain)
    for i in range(len(steps)):
        standardised = (chain[:, i + 1] - means[:, i]) / std[i]
        np.testing.assert_allclose([standardised.mean(), standardised.std()], [0, 1], atol=0.01)
        element = distrax.Normal(means[:, i], std[i]).log_prob(chain[:, i + 1])
        np.testing.assert_allclose(scores[:, i], np.clip(element, -5, 2).mean((-2, -1)), atol=1e-4)


def test_executed_actions_are_the_robots():
    chunk = jnp.full((1, 2, 7), 0.3).at[0, 1].set(-1.7)
    executed = diffusion_policy.executed(chunk)
    np.testing.assert_allclose(executed[0, :, -1], [1, -1])
    np.testing.assert_allclose(executed[0, :, 0], [0.3, -1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_and_samples_are_float32(dtype):
    settings = make_settings(compute_dtype=dtype)

    def run(rng):
        state = diffusion_policy.init(rng, STATE_DIM, settings)
        policy, batch = PolicyParams(state.params, state.params), make_batch()
        state, metrics = diffusion_policy.update(state, batch, rng, settings=settings)
        return state.params, metrics, diffusion_policy.act(policy, rssm.feature(batch.latent), rng, settings=settings)

    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(jax.eval_shape(run, jax.random.key(0))))


@pytest.mark.parametrize("soft", [False, True])
def test_standardised_policy_sees_features_of_mean_zero_and_trains_their_constants_not_at_all(soft):
    settings, batch = make_settings(standardize=True, soft_feature=soft, weight_decay=0.1), make_batch()
    init = jax.jit(functools.partial(diffusion_policy.init, state_dim=STATE_DIM, settings=settings))
    state = jax.jit(functools.partial(diffusion_policy.set_statistics, settings=settings))(
        init(jax.random.key(0)), batch.latent
    )
    constants = jax.tree.map(np.asarray, state.params["params"]["standardized"])
    rows = rssm.feature(batch.latent, soft=soft)
    np.testing.assert_allclose(constants["mean"], rows.mean(0), rtol=1e-5, atol=1e-6)
    # The network of standardised rows is the plain network of rows that were standardised by hand.
    plain = {"params": {k: v for k, v in state.params["params"].items() if k != "standardized"}}
    condition = jax.jit(diffusion_policy.condition, static_argnames="settings")
    by_hand = condition(plain, (rows - rows.mean(0)) / constants["std"], settings=make_settings())
    seen = condition(state.params, rows, settings=settings)
    np.testing.assert_allclose(seen, by_hand, rtol=1e-4, atol=1e-5)
    state, _ = jax.jit(functools.partial(diffusion_policy.update, settings=settings))(state, batch, jax.random.key(1))
    for params in (state.params, state.ema_params):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6), params["params"]["standardized"], constants
        )


@pytest.mark.parametrize("kind", ["diffusion", "gaussian"])
def test_parameters_in_the_compute_dtype_are_what_the_layers_make_of_them(kind):
    changes = {"kind": "gaussian", "denoising_steps": 1, "finetuned_steps": 1} if kind == "gaussian" else {}
    settings = make_settings(compute_dtype="bfloat16", standardize=True, **changes)
    params = diffusion_policy.init(jax.random.key(0), STATE_DIM, settings).params
    params = jax.tree.map(lambda x: x + 0.01, params)
    feature = jax.random.normal(jax.random.key(1), (ROWS, STATE_DIM))

    def draw(params):
        policy = PolicyParams(params, params)
        return diffusion_policy.sample(policy, feature, jax.random.key(2), explore=True, settings=settings)

    cast = diffusion_policy.in_compute_dtype(params, settings=settings)
    assert {x.dtype for x in jax.tree.leaves(cast)} == {jnp.dtype("float32"), jnp.dtype("bfloat16")}
    jax.tree.map(np.testing.assert_array_equal, jax.jit(draw)(cast), jax.jit(draw)(params))
