"""The world model: sizes, what may depend on what, and the terms of its loss."""

import functools
from unittest import mock

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import B, T, assert_close, assert_equal, make_model, make_state, make_steps, sample_mode

from wam_jax import specs, world_model, world_model_training
from wam_jax.networks import rssm

quick_compilation = helpers.quick_compilation
MODEL = make_model()
without_noise = functools.partial(mock.patch.object, world_model, "sample_stochastic", sample_mode)


@functools.cache
def params():
    return make_state(MODEL).params


@functools.cache
def compile_forward(model):
    """Compiles `(params, batch) -> posteriors, total loss, metrics, imagined logits`, all without noise."""

    def forward(params, batch):
        found = []

        def imagine(*args, imagine=world_model.imagine):
            found.append(imagine(*args))
            return found[-1]

        with without_noise(), mock.patch.object(world_model, "imagine", imagine):
            embedding = world_model.embed(model, params, batch.observation)
            posterior = world_model.observe(model, params, embedding, batch.action, jax.random.key(0))
            total, metrics = world_model_training.loss(params, batch, jax.random.key(0), model=model)
        return posterior, total, metrics, [latent.logits for latent in found]

    return jax.jit(forward)


def forward(batch):
    """Those of MODEL; imagined logits are [B, segments, steps after the start, S, V]."""
    posterior, total, metrics, (imagined,) = compile_forward(MODEL)(params(), batch)
    return posterior, total, metrics, imagined.reshape(B, 2, 3, 4, 4)


def change_frames(batch, index):
    """Other frames at `index` of the time axis."""

    def mix(x, y):
        x = x.copy()
        x[:, index] = y[:, index]
        return x

    return batch.replace(observation=jax.tree.map(mix, batch.observation, make_steps(seed=99).observation))


def change_actions(batch, index):
    """Opposite actions at `index` of the time axis."""
    action = batch.action.copy()
    action[:, index] *= -1
    return batch.replace(action=action)


# --- Sizes ---


def test_the_future_never_changes_past_posteriors():
    moment = 3
    changed = change_actions(change_frames(make_steps(), slice(moment, None)), slice(moment - 1, None))
    before, after = forward(make_steps())[0], forward(changed)[0]
    assert_equal(*(jax.tree.map(lambda x: x[:, :moment], x) for x in (before, after)))
    assert (before.logits[:, moment] != after.logits[:, moment]).any(axis=(-2, -1)).all()


def test_an_action_changes_the_state_after_it():
    before, after = forward(make_steps())[0], forward(change_actions(make_steps(), 2))[0]
    assert_equal(before.deterministic[:, :3], after.deterministic[:, :3])
    assert (before.deterministic[:, 3] != after.deterministic[:, 3]).any(axis=-1).all()


def test_the_last_action_of_a_window_is_unused():
    before = forward(make_steps())
    assert_equal(before, forward(change_actions(make_steps(), T - 1)))
    other = forward(change_actions(make_steps(), T - 2))
    assert other[2]["inverse_dynamics"] != before[2]["inverse_dynamics"]


def test_observing_step_by_step_equals_observing_a_window():
    batch, whole = make_steps(), forward(make_steps())[0]
    step = jax.jit(functools.partial(world_model.observe_step, MODEL))
    latent = world_model.initial(MODEL, params(), B)
    action = np.broadcast_to(specs.NEUTRAL_ACTION, (B, specs.ACTION_DIM))
    for t in range(T):
        frame = jax.tree.map(lambda x, t=t: x[:, t], batch.observation)
        with without_noise():
            latent = step(params(), latent, action, frame, jax.random.key(t))
        assert_close(latent, jax.tree.map(lambda x, t=t: x[:, t], whole), atol=1e-5)
        action = batch.action[:, t]


def imagine_slowly(start, action):
    """Logits of repeated single steps of the prior, without noise: [B, H, S, V]."""
    step = jax.jit(functools.partial(world_model.imagine_step, MODEL))
    latent, logits = start, []
    for t in range(action.shape[1]):
        with without_noise():
            latent = step(params(), latent, action[:, t], jax.random.key(t))
        logits.append(latent.logits)
    return jnp.stack(logits, axis=1)


def test_open_loop_imagines_by_steps_of_the_prior_and_compares_with_posteriors():
    batch = make_steps()
    posterior, _, metrics, imagined = forward(batch)
    kl = []
    for segment, first in enumerate((0, 4)):
        start = jax.tree.map(lambda x, first=first: x[:, first], posterior)
        expected = imagine_slowly(start, batch.action[:, first : first + 3])
        assert_close(imagined[:, segment], expected, atol=1e-5)
        kl.append(numpy_kl(posterior.logits[:, first + 1 : first + 4], expected))
    np.testing.assert_allclose(metrics["open_loop_kl"], np.mean(kl), rtol=1e-4)


def test_a_soft_prior_feeds_its_probabilities_back_in_place_of_samples():
    model, start = make_model(soft_prior=True), helpers.make_latents(0, (3,), MODEL.settings)
    action = np.random.default_rng(0).uniform(-1, 1, (3, specs.ACTION_DIM)).astype(np.float32)
    step = jax.jit(functools.partial(world_model.imagine_step, model))
    first = step(params(), start, action, jax.random.key(0))
    assert_close(first.stochastic, jax.nn.softmax(first.logits), atol=1e-6)
    assert_equal(first, step(params(), start, action, jax.random.key(1)))
    # The same cell as ever: only what the next step reads of z differs from a sample.
    sampled = jax.jit(functools.partial(world_model.imagine_step, MODEL))(params(), start, action, jax.random.key(0))
    assert_close(first.logits, sampled.logits, atol=1e-6)
    assert not np.array_equal(first.stochastic, sampled.stochastic)


def test_open_loop_segments_start_from_posteriors_alone():
    _, _, metrics, imagined = forward(make_steps())
    _, _, inside_metrics, inside = forward(change_frames(make_steps(), slice(5, 8)))  # of segment 1, after its start
    assert_equal(inside, imagined)
    assert inside_metrics["open_loop_kl"] != metrics["open_loop_kl"]
    _, _, _, at_start = forward(change_frames(make_steps(), 4))
    assert_equal(at_start[:, 0], imagined[:, 0])
    assert (at_start[:, 1] != imagined[:, 1]).any()


def test_samples_are_one_hot_and_follow_the_logits():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.7, 0.2, 0.1])), (20_000, 1, 3))
    z = rssm.sample_stochastic(logits, rssm.stochastic_noise(jax.random.key(0), logits.shape[:-1]))
    np.testing.assert_array_equal(z.sum(-1), 1)
    np.testing.assert_array_equal(z.max(-1), 1)
    np.testing.assert_allclose(z.mean((0, 1)), [0.7, 0.2, 0.1], atol=0.02)


def test_gradients_pass_through_samples():
    def first_entry(logits):
        return rssm.sample_stochastic(logits, jnp.full(1, 0.5))[0, 0]

    logits = jnp.array([[0.3, -0.2, 0.9]])
    probability = jax.nn.softmax(logits)[0]
    expected = probability[0] * (jnp.array([1.0, 0, 0]) - probability)  # gradient of the probability itself
    np.testing.assert_allclose(jax.grad(first_entry)(logits)[0], expected, rtol=1e-5)


# --- The loss ---


def test_the_loss_is_the_weighted_sum_of_its_terms():
    settings = MODEL.settings
    weights = {
        "reconstruction": 1.0,
        "kl": settings.kl_weight,
        "inverse_dynamics": settings.action_weight,
        "proprioception": settings.proprioception_weight,
        "open_loop": settings.open_loop_weight,
    }
    _, total, metrics, _ = forward(make_steps())
    details = {"inverse_dynamics_position_error", "open_loop_kl", "open_loop_proprioception"}
    assert set(metrics) == {"loss", *weights, *details}
    np.testing.assert_allclose(total, sum(weight * metrics[name] for name, weight in weights.items()), rtol=1e-6)
    assert metrics["loss"] == total


def test_terms_without_weight_are_absent():
    model = make_model("dreamer_v2", proprioception_weight=0.0, open_loop_weight=0.0)
    weights = jax.eval_shape(functools.partial(world_model.init, model), jax.random.key(0))
    _, _, metrics, _ = jax.eval_shape(compile_forward(model), weights, make_steps())
    assert set(weights) == {"encoder", "rssm", "decoder"}
    assert set(metrics) == {"loss", "reconstruction", "kl"}


def test_reconstruction_is_half_the_squared_error_summed_over_both_images():
    batch = make_steps()
    posterior, _, metrics, _ = forward(batch)
    images = MODEL.decoder.apply({"params": params()["decoder"]}, rssm.feature(posterior).reshape(B * T, -1))
    targets = [np.float32(x) / 127.5 - 1 for x in (batch.observation.rgb_static, batch.observation.rgb_gripper)]
    squares = sum(np.square(np.asarray(x).reshape(y.shape) - y).sum() for x, y in zip(images, targets, strict=True))
    np.testing.assert_allclose(metrics["reconstruction"], 0.5 * squares / (B * T), rtol=1e-4)


def numpy_kl(p, q):
    p, q = (np.asarray(jax.nn.log_softmax(x)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(axis=(-2, -1))


def test_kl():
    p, q = (jax.random.normal(jax.random.key(i), (3, 4, 5)) for i in range(2))
    np.testing.assert_allclose(rssm.categorical_kl(p, q), numpy_kl(p, q), rtol=1e-4)
    np.testing.assert_allclose(rssm.categorical_kl(p, p + 2.0), 0, atol=1e-5)
    np.testing.assert_allclose(world_model_training._balanced_kl(p, p, 0.8, np.ones(3)), 0, atol=1e-5)


def test_kl_balance_moves_the_prior_four_times_as_much():
    posterior, prior = (jax.random.normal(jax.random.key(i), (3, 4, 5)) for i in range(2))

    def full(posterior, prior):
        return rssm.categorical_kl(posterior, prior).mean()

    def balanced(posterior, prior):
        return world_model_training._balanced_kl(posterior, prior, 0.8, np.ones(3))

    np.testing.assert_allclose(balanced(posterior, prior), full(posterior, prior), rtol=1e-6)
    gradients, expected = (jax.grad(f, argnums=(0, 1))(posterior, prior) for f in (balanced, full))
    np.testing.assert_allclose(gradients[0], 0.2 * expected[0], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(gradients[1], 0.8 * expected[1], rtol=1e-4, atol=1e-7)


def test_open_loop_trains_the_start_of_a_segment_and_none_of_its_targets():
    batch = make_steps()

    @jax.jit
    @jax.grad
    def gradient(robot_obs):
        observed = batch.replace(observation=batch.observation.replace(robot_obs=robot_obs))
        return compile_forward(MODEL)(params(), observed)[2]["open_loop_kl"]

    size = np.abs(gradient(batch.observation.robot_obs)).sum(axis=(0, 2))
    assert (size[:5] > 0).all()  # up to the start of the second segment
    np.testing.assert_array_equal(size[5:], 0)


def test_open_loop_weighs_its_kl_alike_with_and_without_proprioception():
    model = make_model(proprioception_weight=0.0)
    weights = {name: tree for name, tree in params().items() if name != "proprioception_decoder"}
    _, _, without, _ = compile_forward(model)(weights, make_steps())
    expected = MODEL.settings.kl_weight * forward(make_steps())[2]["open_loop_kl"]
    np.testing.assert_allclose(without["open_loop"], expected, rtol=1e-4)


def test_a_window_shorter_than_a_segment_is_named():
    with pytest.raises(ValueError, match="open_loop_steps=9 exceeds the window of 8"):
        jax.eval_shape(compile_forward(make_model(open_loop_steps=9)), params(), make_steps())


@functools.cache
def overfitted():
    """Metrics of the first and of the last of many updates on one batch."""
    model = make_model(inverse_dynamics_dims=(32, 32), open_loop_steps=3, learning_rate=5e-3, final_learning_rate=5e-3)
    batch, rng = make_steps(shape=(2, 6)), jax.random.key(0)

    @jax.jit
    def train(state):
        def update(state, index):
            return world_model_training.update(state, batch, jax.random.fold_in(rng, index), model=model)

        return jax.lax.scan(update, state, jnp.arange(80))

    state, metrics = train(make_state(model))
    assert state.step == 80
    return jax.tree.map(lambda x: (float(x[0]), float(x[-10:].mean())), metrics)


@pytest.mark.parametrize("name", ["loss", "reconstruction", "inverse_dynamics", "proprioception"])
def test_the_loss_overfits_one_batch(name):
    first, last = overfitted()[name]
    assert last < 0.5 * first


def test_bfloat16_computes_in_it_and_keeps_parameters_and_losses_in_float32():
    model = make_model(compute_dtype="bfloat16")

    def forward(batch):
        state = world_model_training.create_state(model, jax.random.key(0))
        embedding = world_model.embed(model, state.params, batch.observation)
        posterior = world_model.observe(model, state.params, embedding, batch.action, jax.random.key(1))
        loss = world_model_training.loss(state.params, batch, jax.random.key(2), model=model)
        return (
            embedding,
            posterior,
            loss,
            state,
            world_model_training.update(state, batch, jax.random.key(2), model=model),
        )

    embedding, posterior, loss, state, (updated, metrics) = jax.eval_shape(forward, make_steps())
    assert embedding.dtype == posterior.deterministic.dtype == jnp.bfloat16
    assert posterior.logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves((loss, metrics, state.params, updated.params))} == {jnp.dtype("float32")}
    assert jax.tree.map(lambda x: x.dtype, updated) == jax.tree.map(lambda x: x.dtype, state)


def test_bfloat16_is_close_to_float32():
    exact = forward(make_steps())[2]
    rough = compile_forward(make_model(compute_dtype="bfloat16"))(params(), make_steps())[2]
    for name in ("reconstruction", "inverse_dynamics", "proprioception"):
        np.testing.assert_allclose(rough[name], exact[name], rtol=0.05)


def test_parameters_for_imagination_imagine_the_same():
    model = make_model(compute_dtype="bfloat16")
    params = make_state(model).params
    start = world_model.initial(model, params, 3)
    step = jax.jit(functools.partial(world_model.imagine_step, model))
    action = jnp.full((3, specs.ACTION_DIM), 0.3)
    frozen = world_model.imagination_params(model, params)
    assert set(frozen) == {"rssm"} and frozen["rssm"]["prior_out"]["kernel"].dtype == jnp.bfloat16
    helpers.assert_equal(*(step(x, start, action, jax.random.key(0)) for x in (frozen, params)))


def test_bfloat16_keeps_imagined_probabilities_in_float32():
    model = make_model(compute_dtype="bfloat16", soft_prior=True)
    start, action = world_model.initial(model, params(), 3), jnp.full((3, 2, specs.ACTION_DIM), 0.3)
    imagined = jax.jit(functools.partial(world_model.imagine, model))(params(), start, action, jax.random.key(0))
    assert_close(imagined.stochastic, jax.nn.softmax(imagined.logits), atol=1e-6)
