"""PPO's rollouts in an environment: what is rewarded, where episodes end, what is filtered, and training on them."""

import functools
from unittest import mock

import helpers
import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import FrozenConfigDict

from experiments import config_checks, evaluate, finetune_policy, simulators, train_policy, train_world_model
from wam_jax import (
    diffusion_policy,
    environment_rollouts,
    environments,
    metrics,
    parallel,
    specs,
    training,
    world_model,
)
from wam_jax.diffusion_policy import PolicyParams

quick_compilation = helpers.quick_compilation
TASK = "open_drawer"  # solved once the drawer has moved more than 0.12 m
CONFIG = helpers.make_config(kl_weight=2.5)  # settings of its own: compiled here, without noise
CONFIG.ppo.update(rollouts="environment", updates_per_call=1)
CONFIG = FrozenConfigDict(CONFIG)
SETTINGS, POLICY = finetune_policy.ppo_settings(CONFIG), train_policy.policy_settings(CONFIG)
MODEL = world_model.build(CONFIG.world_model)
NUM_ROLLOUTS = 24


@functools.cache
def make_policy(seed=0):
    dim = world_model.feature_dim(CONFIG.world_model)
    params = jax.device_get(diffusion_policy.init(jax.random.key(seed), dim, POLICY).params)
    return PolicyParams(base=params, finetuned=jax.tree.map(lambda x: x + 0.01, params))


def collect(seed=0, environment=None, settings=SETTINGS, num_rollouts=NUM_ROLLOUTS):
    with mock.patch.object(world_model, "sample_stochastic", helpers.sample_mode):
        return environment_rollouts.collect(
            environment or helpers.Drawer(),
            make_policy(),
            TASK,
            jax.random.key(seed),
            num_rollouts=num_rollouts,
            model=MODEL,
            world_model_params=helpers.make_state(MODEL).params,
            policy_settings=POLICY,
            settings=settings,
        )


def executed(episodes):
    """The chunks that the chains end in, [H, B, C, 7]."""
    return np.asarray(diffusion_policy.executed(np.clip(episodes.chain[:, :, -1], -1, 1)))


def test_rewards_and_ends_are_those_of_the_executed_actions():
    episodes = collect()
    horizon = SETTINGS.horizon
    moved = 0.1 * np.cumsum(executed(episodes)[..., 0].swapaxes(0, 1).reshape(NUM_ROLLOUTS, -1), axis=1)
    solved = (moved > 0.12).reshape(NUM_ROLLOUTS, horizon, -1).any(axis=2).T
    first = np.where(solved.any(axis=0), solved.argmax(axis=0), horizon)
    assert 0 < (first < horizon).sum() < NUM_ROLLOUTS  # some succeed, some do not
    decision = np.arange(horizon)[:, None]
    np.testing.assert_array_equal(episodes.terminated, decision == first)
    np.testing.assert_array_equal(episodes.reward, decision == first)
    np.testing.assert_array_equal(episodes.valid, decision <= first)
    np.testing.assert_array_equal(episodes.truncated, (decision == horizon - 1) & (first == horizon))


def test_features_are_those_of_the_frames_filtered_one_by_one():
    episodes = collect()
    environment, params = helpers.Drawer(), helpers.make_state(MODEL).params
    numbers = np.arange(NUM_ROLLOUTS)
    state = environment.reset_to_task(jax.random.split(jax.random.key(0), 3)[0], numbers, numbers)
    action = np.repeat(specs.NEUTRAL_ACTION[None], NUM_ROLLOUTS, axis=0)
    latent = world_model.initial(MODEL, params, NUM_ROLLOUTS)
    expected = []
    with mock.patch.object(world_model, "sample_stochastic", helpers.sample_mode):
        step = jax.jit(functools.partial(world_model.observe_step, MODEL))
        latent = step(params, latent, action, environment.observe(state), jax.random.key(0))
        for chunk in executed(episodes):
            expected.append(diffusion_policy.features(latent, settings=POLICY))
            state, observations = environment.step_chunk(state, chunk)
            for index in range(chunk.shape[1]):
                frame = jax.tree.map(lambda x, i=index: x[:, i], observations)
                latent = step(params, latent, chunk[:, index], frame, jax.random.key(0))
    valid = episodes.valid
    np.testing.assert_allclose(episodes.feature[valid], np.stack(expected)[valid], atol=1e-4)
    still = episodes.truncated[-1]
    last = np.asarray(diffusion_policy.features(latent, settings=POLICY))
    np.testing.assert_allclose(episodes.last_feature[still], last[still], atol=1e-4)


def test_once_all_have_ended_nothing_more_is_executed():
    class Eager(helpers.Drawer):
        chunks = 0

        def step_chunk(self, state, actions, drawn=None):
            self.chunks += 1
            return super().step_chunk(state, actions.at[..., 0].set(1.0), drawn)

    environment = Eager()
    episodes = collect(environment=environment)
    assert environment.chunks == 1 and len(episodes.valid) == SETTINGS.horizon == 3
    assert episodes.terminated[0].all() and not episodes.valid[1:].any() and not episodes.truncated.any()
    assert episodes.feature.shape == (3, *episodes.last_feature.shape)


def test_each_device_gets_whole_episodes():
    episodes = collect()
    parts = environment_rollouts.split(episodes, 4)
    share = NUM_ROLLOUTS // 4
    for device in range(4):
        rows = slice(device * share, (device + 1) * share)
        np.testing.assert_array_equal(parts.chain[device], episodes.chain[:, rows])
        np.testing.assert_array_equal(parts.last_feature[device], episodes.last_feature[rows])


def test_training_in_the_environment_resumes_bit_for_bit(tmp_path):
    devices, base = parallel.local_devices(1), make_policy().base
    params = helpers.make_state(MODEL).params
    updates = finetune_policy.environment_updates(CONFIG, helpers.Drawer(), MODEL, params, devices)
    bank = parallel.replicate(jax.tree.map(lambda x: x[None], base), devices)

    def fit(workdir, num_steps):
        return training.fit(
            functools.partial(updates, TASK),
            finetune_policy.initial_state(CONFIG, TASK, base),
            training.repeat(bank),
            stage="ppo",
            workdir=str(workdir),
            settings={},
            seed=3,
            num_steps=num_steps,
            updates_per_call=1,
            save_every=1,
            devices=devices,
        )

    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "parts", 2)
    helpers.assert_equal(fit(tmp_path / "parts", 4), whole)
    rows = metrics.read(str(tmp_path / "whole"), "ppo")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(0 < row["environment_success"] < 1 and abs(row["first_ratio_error"]) < 1e-5 for row in rows)
    assert len({row["environment_success"] for row in rows}) > 1  # other starts and noise in each iteration


@pytest.mark.parametrize("given", ["", "evaluation.npz"])
def test_training_never_meets_the_starts_that_are_given_for_evaluation(given, monkeypatch, tmp_path):
    made = []

    def make(name, **options):
        made.append((name, options["starts_file"]))
        return helpers.Drawer()

    config = FrozenConfigDict({**CONFIG.to_dict(), "environment": "calvin", "tasks": (TASK,)})
    monkeypatch.setattr(environments, "make", make)
    monkeypatch.setattr(train_policy, "load", lambda *_: make_policy().base)
    monkeypatch.setattr(train_world_model, "load", lambda *_: (MODEL, helpers.make_state(MODEL).params))
    monkeypatch.setattr(training, "fit", lambda *_, **__: None)
    assert evaluate  # which has the flag; reproduce is one program with it
    monkeypatch.setattr(flags.FLAGS["starts"], "value", given)
    finetune_policy.run(config, str(tmp_path))
    simulators.make(config)
    assert made == [("calvin", ""), ("calvin", given)]
    simulators.make.cache_clear()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": "dream"}, "config.ppo.rollouts='dream'; expected one of imagination, environment"),
        ({"starts": "random"}, "config.ppo.starts='random'; expected one of demonstrations, play, both"),
        ({"rollouts": "environment", "updates_per_call": 2}, "config.ppo.updates_per_call=2, but rollouts of the env"),
        (
            {"rollouts": "environment", "starts": "play"},
            "config.ppo.starts='play' is about imagination, .* take 'demonst",
        ),
        ({"rollouts": "environment", "min_trust": 0.5}, "config.ppo.min_trust=0.5 is about imagination, .*; take 0.0"),
        (
            {"rollouts": "environment", "min_start_step": 1},
            "config.ppo.min_start_step=1 is about imagination, .*; take 0",
        ),
        ({"min_start_step": 9}, "config.ppo.min_start_step=9 exceeds max_start_step=8"),
    ],
)
def test_rollouts_that_cannot_be_are_refused(changes, message):
    config = helpers.make_config()
    config.ppo.update(changes)
    with pytest.raises(ValueError, match=f"^{message}"):
        config_checks.check(config)
