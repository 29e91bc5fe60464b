"""Starts are trusted where imagination, under the recorded actions, comes to the recorded end."""

import contextlib
from unittest import mock

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from experiments import diagnose, diagnoses, finetune_policy, train_policy, train_reward, train_world_model
from wam_jax import json_files, latents, trust

CONFIG = FrozenConfigDict(helpers.make_config())
CONSECUTIVE = 2


def make_attempt(index, recorded, imagined):
    """An attempt with these rewards, whose imagination shows `imagined` in its first entry; 0 and 1 a step."""
    length = len(recorded)
    episode = helpers.make_steps(index, (length,)).replace(reward=np.array(recorded, np.float32))
    latent = helpers.make_latents(index, (length,), CONFIG.world_model)
    latent.deterministic[:, 0], latent.deterministic[:, 1] = imagined, 100 * index + np.arange(length)
    return latent, episode


def imagine(model, params, encoded, episodes, rng):
    """Stands in for the world model: it imagines what the attempt says."""
    del model, params, rng
    for episode in episodes:
        assert not episode.action[-trust.HOLD :, :-1].any()  # the hand stays
        assert (episode.action[-trust.HOLD - 1 :, -1] == episode.action[-1, -1]).all()  # the fingers too
    followed = [jax.tree.map(lambda x: x[1:], episode) for episode in episodes]
    return [latents.latent_at(latent, slice(1, None)) for latent in encoded], followed


def in_a_row(params, feature, first_feature, count):
    """Fires after CONSECUTIVE frames in a row whose first entry is above the parameter."""
    assert first_feature.shape == feature.shape[1:]
    fired = []
    for frame in feature:
        count = jnp.where(frame[:, 0] > params, count + 1, 0)
        fired.append(count >= CONSECUTIVE)
    return jnp.stack(fired), count


JUDGING = dict(reward_rule=in_a_row, reward_params=jnp.float32(0.5))
ATTEMPTS = [
    make_attempt(0, [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]),  # both solved
    make_attempt(1, [0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 0]),  # never twice in a row: missed
    make_attempt(2, [0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0]),  # made up
    make_attempt(3, [0, 0, 0, 1], [0, 0, 0, 1]),  # solved as it ends: imagination is held still, for a second frame
    make_attempt(4, [0, 1, 1], [0, 1, 1]),
]


def judge(function, *args):
    encoded, episodes = zip(*ATTEMPTS, strict=True)
    with mock.patch.object(latents, "imagine_episodes", imagine):
        return function(
            None, None, encoded, episodes, jax.random.key(0), *args, policy_settings=CONFIG.policy, **JUDGING
        )


def test_recorded_and_imagined_ends():
    verdicts = judge(trust.judge)
    assert verdicts.recorded.tolist() == [True, True, False, True, True]
    assert verdicts.imagined.tolist() == [True, False, True, True, True]
    shares = {"attempts": 5, "successes": 4, "successes_imagined": 0.75, "failures_imagined": 0.0, "trust": 0.0}
    assert trust.agreement(verdicts) == shares


@pytest.mark.parametrize(
    ("recorded", "imagined", "expected"),
    [
        ([1, 1, 0, 0, 0], [0, 0, 0, 0, 0], 0.0),  # it never succeeds, and 3 of 5 ends are alike
        ([1, 1, 1, 1, 0], [1, 1, 1, 1, 1], 0.0),  # it always does
        ([1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], 0.75),
        ([1, 1, 1, 1], [1, 1, 0, 1], 0.75),  # demonstrations hold no failure
        ([0, 0], [0, 0], 0.0),  # without a success nothing is known of any
        ([], [], 0.0),
    ],
)
def test_trust_needs_successes_and_failures_alike(recorded, imagined, expected):
    verdicts = trust.Verdicts(np.array(recorded, bool), np.array(imagined, bool))
    assert trust.agreement(verdicts)["trust"] == expected


def test_the_bank_holds_the_starts_that_agree_and_no_others():
    bank, verdicts = judge(trust.start_bank, 0, 2)
    # From step 1 on, what attempt 2 makes up is over after a frame, too few to count; attempt 4 ends at step 2.
    assert bank.deterministic[:, 1].tolist() == [0, 300, 400, 1, 201, 301, 401, 2, 202, 302]
    assert len(verdicts.recorded) == 5 + 5 + 4
    assert bank.logits.shape[0] == bank.stochastic.shape[0] == 10


def test_no_start_is_left_where_none_agrees():
    encoded, episodes = zip(*ATTEMPTS[1:2], strict=True)
    with mock.patch.object(latents, "imagine_episodes", imagine):
        bank, verdicts = trust.start_bank(
            None, None, encoded, episodes, jax.random.key(0), 0, 0, policy_settings=CONFIG.policy, **JUDGING
        )
    assert bank is None and verdicts.recorded.tolist() == [True]
    assert trust.agreement(verdicts)["failures_imagined"] is None


def test_a_task_that_is_not_trusted_keeps_its_cloned_policy(tmp_path):
    config = FrozenConfigDict({**CONFIG.to_dict(), "tasks": ("turn_on_led",)})
    base = train_policy.initial_state(config, "turn_on_led").ema_params
    stubs = {
        (finetune_policy, "start_bank"): (None, {"trusted": False, "trust": 0.2}),
        (train_world_model, "load"): (helpers.make_model(), {"rssm": {}}),
        (train_reward, "load"): {},
        (train_policy, "load"): base,
    }
    with contextlib.ExitStack() as stack:
        for (module, name), value in stubs.items():
            stack.enter_context(mock.patch.object(module, name, return_value=value))
        finetune_policy.run(config, str(tmp_path))
        loaded = finetune_policy.load(config, str(tmp_path), "turn_on_led")
        helpers.assert_equal((loaded.base, loaded.finetuned), (base, base))
        assert finetune_policy.read_trust(str(tmp_path)) == {"turn_on_led": {"trusted": False, "trust": 0.2}}
        finetune_policy.run(config, str(tmp_path))  # there is nothing left to do


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "is damaged .it holds a list, not a dict"),
        ({"settings": {}, "units": 3}, "holds no figures of a diagnosis"),
        ({"settings": 3, "units": {}}, "holds no figures of a diagnosis"),
        ({"settings": {}, "units": {"open_drawer": 4}}, "open_drawer is 4, expected figures"),
        ({"settings": {}, "units": {"open_drawer": {}}}, "open_drawer is {}, expected figures"),
    ],
)
def test_damaged_figures_are_named(monkeypatch, tmp_path, record, message):
    monkeypatch.setattr(diagnoses, "PARTS", {"trust": lambda *arguments: {"open_drawer": lambda: {"train": 1}}})
    monkeypatch.setattr(diagnoses, "settings", lambda *arguments: {})
    json_files.write(tmp_path / "diagnose/trust.json", record)
    with pytest.raises(ValueError, match=f"trust.json:? {message}.*; delete it; the same command measures again"):
        diagnose.run(CONFIG, str(tmp_path), diagnoses.Options(("open_drawer",)))
