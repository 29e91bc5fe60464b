"""Updates on several devices: the same as on one, noise of their own, and errors that say how to mend them.

Virtual devices must be asked for before JAX starts, so the checks run in a process of their own: this file, run.
"""

import functools
import json
import sys
import tempfile
import traceback
from unittest import mock

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wam_jax import (
    diffusion_policy,
    imagination,
    latents,
    parallel,
    ppo,
    prior_ensemble,
    rlds,
    success_classifier,
    training,
    world_model,
    world_model_training,
)

NUM_DEVICES = 8


def noise_update(state, batch, rng):
    noise = jax.random.normal(rng, state["x"].shape)
    gradient = parallel.pmean(batch.mean(axis=0) + noise - state["x"], parallel.AXIS_NAME)
    state = {"x": state["x"] + 0.1 * gradient, "count": state["count"] + 1}
    return state, {"noise": noise[0], "x": state["x"].sum()}


def first_state():
    return {"x": np.arange(3, dtype=np.float32), "count": np.int32(0)}


def slices(devices, num_updates, size=8, seed=0):
    """The same data for every number of devices: [D, N, size / D, 3]."""
    data = np.random.default_rng(seed).normal(size=(num_updates, len(devices), size // len(devices), 3))
    return jnp.asarray(data.swapaxes(0, 1), jnp.float32)


def all_devices_equal(tree):
    for leaf in jax.tree.leaves(tree):
        assert len(leaf.addressable_shards) == NUM_DEVICES
        for shard in leaf.addressable_shards[1:]:
            np.testing.assert_array_equal(shard.data, leaf.addressable_shards[0].data)


# --- Checks that run under eight devices ---


def check_world_model_update_is_the_same_on_1_and_8_devices():
    # With this epsilon an AdamW step is proportional to the gradient: rounding is not blown up to the learning rate.
    model = helpers.make_model(adam_epsilon=1.0, open_loop_weight=0.0, proprioception_weight=0.0)
    update = functools.partial(world_model_training.update, model=model, axis_name=parallel.AXIS_NAME)
    start = helpers.make_state(model)
    batch = helpers.make_steps(shape=(2, 8, 6))  # two updates of 8 windows
    results = []
    with mock.patch.object(world_model, "sample_stochastic", helpers.sample_mode):
        for num_devices in (1, 8):
            devices = parallel.local_devices(num_devices)
            parts = jax.tree.map(lambda x: x.reshape(2, len(devices), -1, *x.shape[2:]).swapaxes(0, 1), batch)  # noqa: B023
            run = parallel.compile_updates(update, devices)
            state, metrics = run(parallel.replicate(start, devices), parts, 0, 0)
            assert all(x.shape == (num_devices, 2) for x in metrics.values())
            results.append(jax.device_get((parallel.unreplicate(state), jax.tree.map(lambda x: x[0], metrics))))
    (one, one_metrics), (eight, eight_metrics) = results
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), one.params, start.params)
    assert max(jax.tree.leaves(moved)) > 1e-4
    helpers.assert_close(eight_metrics, one_metrics, rtol=1e-3)
    helpers.assert_close(eight.params, one.params, rtol=0, atol=1e-6)


def check_a_run_goes_on_with_another_number_of_devices():
    def update(state, batch, rng):
        del rng
        gradient = parallel.pmean(batch.mean(axis=0) - state["x"], parallel.AXIS_NAME)
        return {"x": state["x"] + 0.1 * gradient, "count": state["count"] + 1}, {"loss": state["x"].sum()}

    def train(workdir, num_devices, num_steps):
        devices = parallel.local_devices(num_devices)
        return training.fit(
            parallel.compile_updates(update, devices), first_state(),
            lambda step: (slices(devices, 2, seed=n) for n in range(step, 100, 2)), stage="toy", workdir=workdir,
            settings={}, seed=0, num_steps=num_steps, updates_per_call=2, save_every=2, devices=devices,
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        train(f"{folder}/changed", 8, 4)
        changed = train(f"{folder}/changed", 1, 8)
        helpers.assert_close(changed, train(f"{folder}/one", 1, 8), rtol=1e-6)
    assert changed["count"] == 8


def check_noise_differs_between_devices_and_steps_and_repeats():
    devices = parallel.local_devices(0)
    run = parallel.compile_updates(noise_update, devices)

    def draw(seed, first_step):
        return np.asarray(
            run(parallel.replicate(first_state(), devices), slices(devices, 3), seed, first_step)[1]["noise"]
        )

    noise = draw(0, 0)
    assert noise.shape == (NUM_DEVICES, 3)
    assert len(np.unique(noise)) == noise.size
    np.testing.assert_array_equal(noise, draw(0, 0))
    np.testing.assert_array_equal(noise[:, 1:], draw(0, 1)[:, :2])  # a resumed run draws what it would have drawn
    assert not np.isin(noise, draw(1, 0)).any()


def check_states_stay_the_same_on_all_devices():
    devices = parallel.local_devices(0)
    state, _ = parallel.compile_updates(noise_update, devices)(
        parallel.replicate(first_state(), devices), slices(devices, 3), 0, 0
    )
    all_devices_equal(state)


def check_an_ensemble_of_priors_stays_the_same_on_all_devices():
    devices, config = parallel.local_devices(0), helpers.make_config()
    config.prior_ensemble.update(num_members=2, hidden_dims=(4,), batch_size=8)
    ensemble = prior_ensemble.build(helpers.freeze(config.prior_ensemble), config.world_model)
    bank = prior_ensemble.bank([helpers.make_latents(0, (4, 9), config.world_model)])
    update = functools.partial(prior_ensemble.update_from_bank, ensemble=ensemble, axis_name=parallel.AXIS_NAME)
    start = parallel.replicate(prior_ensemble.init(ensemble, jax.random.key(0)), devices)
    state, _ = parallel.compile_updates(update, devices, num_updates=2)(start, parallel.replicate(bank, devices), 0, 0)
    all_devices_equal(state)


def check_n_updates_in_one_call_equal_n_calls():
    devices = parallel.local_devices(4)
    data = slices(devices, 4)
    run = parallel.compile_updates(noise_update, devices)
    together, metrics = run(parallel.replicate(first_state(), devices), data, 0, 5)
    state = parallel.replicate(first_state(), devices)
    for i in range(4):
        state, one = run(state, data[:, i : i + 1], 0, 5 + i)
        helpers.assert_equal(jax.tree.map(lambda x: x[:, 0], one), jax.tree.map(lambda x, i=i: x[:, i], metrics))
    helpers.assert_equal(together, state)
    assert np.asarray(state["count"]).tolist() == [4] * 4


def check_n_updates_from_one_bank_equal_n_calls():
    devices = parallel.local_devices(4)
    bank = slices(devices, 1)[:, 0]
    run = parallel.compile_updates(noise_update, devices, num_updates=3)
    together, metrics = run(parallel.replicate(first_state(), devices), bank, 0, 0)
    assert metrics["x"].shape == (4, 3)
    single = parallel.compile_updates(noise_update, devices, num_updates=1)
    state = parallel.replicate(first_state(), devices)
    for i in range(3):
        state, _ = single(state, bank, 0, i)
    helpers.assert_equal(together, state)


def check_replicate_and_back():
    devices = parallel.local_devices(0)
    tree = {"x": np.arange(6.0, dtype=np.float32).reshape(2, 3), "count": np.int32(7), "nested": (np.zeros(0),)}
    replicated = parallel.replicate(tree, devices)
    assert replicated["x"].shape == (NUM_DEVICES, 2, 3)
    all_devices_equal(replicated)
    assert {shard.device for shard in replicated["x"].addressable_shards} == set(devices)
    back = parallel.unreplicate(replicated)
    helpers.assert_equal(back, tree)
    assert jax.tree.map(lambda x: x.dtype, back)["count"] == np.int32


def stage_settings():
    """Settings of policy, classifier and PPO as their binaries derive them for eight devices."""
    config = helpers.make_config()
    policy = helpers.freeze(config.policy, batch_size=2, decay_steps=4)
    reward = helpers.freeze(config.reward, batch_size=2, soft_feature=config.policy.soft_feature)
    return policy, reward, helpers.freeze(config.ppo, num_rollouts=2, horizon=3)


def make_bank(shape=(12,)):
    return helpers.make_latents(0, shape, helpers.make_model().settings)


def run_from_bank(update, state, bank):
    devices = parallel.local_devices(0)
    run = parallel.compile_updates(functools.partial(update, axis_name=parallel.AXIS_NAME), devices, num_updates=2)
    before = jax.device_get(state)
    state, metrics = run(parallel.replicate(before, devices), parallel.replicate(bank, devices), 0, 0)
    all_devices_equal(state)
    all_devices_equal(metrics)
    assert all(np.isfinite(x).all() and x.shape == (NUM_DEVICES, 2) for x in metrics.values())
    return before, parallel.unreplicate(state), metrics


def state_dim():
    return world_model.feature_dim(helpers.make_model().settings)


def check_policy_update_on_8_devices():
    settings, _, _ = stage_settings()
    action = np.random.default_rng(0).uniform(-1, 1, (12, settings.chunk, 7)).astype(np.float32)
    before, after, _ = run_from_bank(
        functools.partial(diffusion_policy.update_from_bank, settings=settings),
        diffusion_policy.init(jax.random.key(0), state_dim(), settings),
        diffusion_policy.PolicyBank(diffusion_policy.PolicyBatch(make_bank(), action), np.int32(12)),
    )
    assert after.step == 2
    assert not np.array_equal(*(jax.tree.leaves(x.params)[1] for x in (before, after)))


def check_classifier_update_on_8_devices():
    _, settings, _ = stage_settings()
    before, after, metrics = run_from_bank(
        functools.partial(success_classifier.update_from_bank, settings=settings),
        success_classifier.init(jax.random.key(0), state_dim(), settings),
        success_classifier.ClassifierBatch(make_bank(), np.arange(12, dtype=np.int32) % 2),
    )
    assert after.step == 2
    assert set(metrics) == {"contrastive_loss", "cross_entropy", "accuracy"}
    assert not np.array_equal(*(jax.tree.leaves(x.params)[1] for x in (before, after)))


def check_ppo_iteration_on_8_devices():
    policy_settings, reward_settings, settings = stage_settings()
    model = helpers.make_model()
    policy = diffusion_policy.init(jax.random.key(0), state_dim(), policy_settings).params
    inputs = imagination.ImaginationInputs(
        start=latents.latent_at(make_bank(), slice(0, 5)),
        num_starts=np.array(5, np.int32),
        world_model_params=helpers.make_state(model).params,
        reward_params=success_classifier.init(jax.random.key(1), state_dim(), reward_settings).params,
        base_policy_params=policy,
    )
    update = functools.partial(
        ppo.iteration,
        imagine_step=functools.partial(world_model.imagine_step, model),
        reward_rule=helpers.classifier_rule(reward_settings),
        policy_settings=policy_settings,
        settings=settings,
    )
    _, after, metrics = run_from_bank(update, ppo.init(jax.random.key(2), policy, state_dim(), settings), inputs)
    assert after.iteration == 2
    # Counted over all devices: 8 x 2 rollouts of at most 3 decisions, of which the first is always valid.
    assert 16 <= metrics["valid_decisions"][0, 0] <= 48


def split(tree, num_devices):
    """Splits axis 1, the rows of each update, over the devices: [N, B, ...] to [D, N, B / D, ...]."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], num_devices, -1, *x.shape[2:]).swapaxes(0, 1), tree)


def on_devices(num_devices, update, state, parts):
    """State after the updates on the parts [D, N, ...], and metrics [D, N, ...]; each on the host."""
    devices = parallel.local_devices(num_devices)
    run = parallel.compile_updates(functools.partial(update, axis_name=parallel.AXIS_NAME), devices)
    state, metrics = run(parallel.replicate(state, devices), parts, 0, 0)
    return jax.device_get((parallel.unreplicate(state), metrics))


def alike(draw):
    """Stands in for a function of jax.random: every row is given the same, whatever the key and the device."""
    return lambda rng, shape, *limits: jnp.broadcast_to(draw(jax.random.key(0), shape[1:], *limits), shape)


def assert_moved_together(start, one, eight):
    """The parameters have moved, and on both numbers of devices to the same."""
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), one, start)
    assert max(jax.tree.leaves(moved)) > 1e-3, moved
    helpers.assert_close(eight, one, rtol=0, atol=1e-5)


def check_policy_update_is_the_same_on_1_and_8_devices():
    settings = helpers.freeze(stage_settings()[0], resample_latent=False)
    action = np.random.default_rng(0).uniform(-1, 1, (2, 16, settings.chunk, 7)).astype(np.float32)
    batch = diffusion_policy.PolicyBatch(make_bank((2, 16)), action)
    update = functools.partial(diffusion_policy.update, settings=settings)
    # With plain gradient descent a step is proportional to the gradient: rounding is not blown up to the learning rate.
    with (
        mock.patch.object(diffusion_policy, "optimizer", lambda settings: optax.sgd(0.1)),
        mock.patch.object(jax.random, "normal", alike(jax.random.normal)),
        mock.patch.object(jax.random, "randint", alike(jax.random.randint)),
    ):
        start = jax.device_get(diffusion_policy.init(jax.random.key(0), state_dim(), settings))
        (one, metrics), (eight, others) = (on_devices(d, update, start, split(batch, d)) for d in (1, NUM_DEVICES))
    assert_moved_together(start.params, one.params, eight.params)
    helpers.assert_close(eight.ema_params, one.ema_params, rtol=0, atol=1e-5)
    helpers.assert_close(others, jax.tree.map(lambda x: np.repeat(x, NUM_DEVICES, axis=0), metrics), rtol=1e-4)


def make_episodes(policy, settings, shape=(2, 16, 3)):
    """Made-up rollouts [N, B, H, ...]: the first succeed at once, later ones later or never."""
    num_updates, num_episodes, horizon = shape
    rng = np.random.default_rng(0)
    feature = rng.normal(size=(num_updates, num_episodes, horizon + 1, state_dim())).astype(np.float32)
    pair = diffusion_policy.PolicyParams(policy, policy)
    sample = jax.jit(functools.partial(diffusion_policy.sample, explore=True, settings=settings))
    chain = np.asarray(sample(pair, feature[:, :, :-1].reshape(-1, state_dim()), jax.random.key(3))[1])
    decision, end = np.arange(horizon), np.arange(num_episodes)[:, None] // 4  # end 3: never
    masks = (decision == end, (decision == horizon - 1) & (end > decision), decision <= end)
    terminated, truncated, valid = (np.broadcast_to(mask, shape) for mask in masks)
    return imagination.Rollout(
        feature=feature[:, :, :-1],
        last_feature=feature[:, :, -1],
        chain=chain.reshape(*shape, *chain.shape[1:]),
        reward=terminated * rng.uniform(0.5, 1.5, shape).astype(np.float32),
        terminated=terminated,
        truncated=truncated,
        valid=valid,
    )


def check_ppo_update_is_the_same_on_1_and_8_devices():
    # Nothing random enters: no regulariser, and every minibatch is all decisions.
    policy_settings, _, settings = stage_settings()
    settings = helpers.freeze(settings, bc_weight=0.0, critic_warmup=0, batch_size=10_000)
    static = {"policy_settings": policy_settings, "settings": settings}

    def update(state, rows, rng, axis_name):
        episodes = jax.tree.map(lambda x: x.swapaxes(0, 1), rows).replace(last_feature=rows.last_feature)
        decisions, scale, metrics = ppo.prepare(state, episodes, policy, **static, axis_name=axis_name)
        state, more = ppo.update(state, decisions, policy, rng, **static, axis_name=axis_name)
        advantage = decisions.advantage.reshape(episodes.valid.shape).swapaxes(0, 1)
        return state.replace(reward_scale=scale), {**metrics, **more, "advantage": advantage}

    with mock.patch.object(ppo, "optimizers", lambda settings: (optax.sgd(0.1), optax.sgd(0.1))):
        policy = diffusion_policy.init(jax.random.key(0), state_dim(), policy_settings).params
        start = jax.device_get(ppo.init(jax.random.key(2), policy, state_dim(), settings))
        episodes = make_episodes(policy, policy_settings)
        (one, metrics), (eight, others) = (on_devices(d, update, start, split(episodes, d)) for d in (1, NUM_DEVICES))
    for part in ("actor", "critic"):
        assert_moved_together(*(getattr(state.params, part) for state in (start, one, eight)))
    helpers.assert_close(eight.reward_scale, one.reward_scale, rtol=1e-5)
    advantage, other = (np.concatenate(x.pop("advantage"), axis=1) for x in (metrics, others))  # [N, B, H]
    np.testing.assert_allclose(other, advantage, atol=1e-5)
    for name in set(metrics) - {"bc_loss"}:  # the regulariser's chains are random
        np.testing.assert_allclose(others[name], np.repeat(metrics[name], NUM_DEVICES, 0), 1e-3, 1e-6, err_msg=name)


def check_windows_of_data_on_the_devices_are_the_same_on_1_and_8_devices():
    for lengths in ((9, 3, 14, 20, 5, 7, 6, 6, 11, 5), (11,)):  # steps of the episodes; fewer than devices, too
        episodes = [rlds.Episode(helpers.make_steps(i, (n,)), "test", str(i)) for i, n in enumerate(lengths)]
        with tempfile.TemporaryDirectory() as folder:
            helpers.write_dataset(folder, "windows", {"train": episodes})
            one, eight = (
                helpers.resident_windows(folder, 5, 2, devices, batch_size=16, updates_per_dispatch=2)
                for devices in (1, NUM_DEVICES)
            )
        helpers.assert_equal(one, eight)
        assert one.action.shape == (4, 16, 5, 7)


def run_checks():
    """Prints one line of JSON a check: its name, and its traceback where it failed."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    assert len(jax.local_devices()) == NUM_DEVICES
    for name in CHECKS:
        error = ""
        try:
            globals()[name]()
        except Exception:
            error = traceback.format_exc()
        print(json.dumps({"name": name, "error": error}), flush=True)


CHECKS = [name for name in globals() if name.startswith("check_")]

# --- Tests ---


@pytest.fixture(scope="module")
def results():
    flags = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
    run = helpers.run_python(
        __file__, XLA_FLAGS=flags, JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1", PYTHONPATH=str(helpers.ROOT)
    )
    assert run.returncode == 0, run.stderr[-4000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line["error"] for line in lines}


@pytest.mark.parametrize("name", CHECKS)
def test_on_8_devices(results, name):
    assert not results[name], results[name]


if __name__ == "__main__":
    sys.exit(run_checks())
