"""Where PPO's imagination starts: whose latents, which of them are trusted, and what that costs to read."""

from unittest import mock

import helpers
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from experiments import finetune_policy, train_policy, train_reward, train_world_model
from wam_jax import datasets, latents, parallel, rlds, specs, training

quick_compilation = helpers.quick_compilation
TASKS = ("turn_on_led", "open_drawer")
MODEL = helpers.make_model()


def make_config(**changes):
    config = helpers.make_config()
    config.tasks = TASKS
    config.update_from_flattened_dict(changes)
    return FrozenConfigDict(config)


# --- Reading play ---


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """Play of three episodes: an attempt at each task in the first two, at the second alone in the third."""
    episodes = []
    for number, attempted in enumerate((TASKS, TASKS, TASKS[1:])):
        task = np.concatenate([np.full(9 + number, specs.task_index(name), np.int32) for name in attempted])
        steps = helpers.make_steps(number, (len(task),)).replace(task=task)
        episodes.append(rlds.Episode(steps, source="test", episode_id=str(number)))
    directory = tmp_path_factory.mktemp("play")
    return str(helpers.write_dataset(directory, "play", {"train": episodes, "validation": episodes[:1]}))


def test_the_attempts_of_a_task_are_decoded_and_encoded_for_that_task_alone(play, monkeypatch, tmp_path):
    config = make_config(
        **{"ppo.starts": "play", "ppo.min_start_step": 2, "ppo.max_start_step": 3, "dataset.play": play}
    )
    monkeypatch.setattr(train_world_model, "load", lambda *_: (MODEL, helpers.make_state(MODEL).params))
    together = train_reward.encode_attempts(config, str(tmp_path), "train", TASKS)
    with (
        mock.patch.object(datasets, "decode", wraps=datasets.decode) as decode,
        mock.patch.object(latents, "encode_episodes", wraps=latents.encode_episodes) as encode,
    ):
        banks = {task: finetune_policy.start_bank(config, str(tmp_path), task, {})[0] for task in TASKS}
    assert decode.call_count == 5 and [len(call.args[2]) for call in encode.call_args_list] == [2, 3]
    for task, count in zip(TASKS, (2, 3), strict=True):
        assert len(together[task][0]) == count
        helpers.assert_equal(banks[task], latents.start_bank(together[task][0], 2, 3))


# --- Which starts are trusted ---


def make_attempt(index, recorded, imagined):
    """Ten frames, solved at the last two where it is recorded so; its latents say the same of imagination."""
    late = np.arange(10) >= 8
    episode = helpers.make_steps(index, (10,)).replace(reward=np.float32(late & recorded))
    latent = helpers.make_latents(index, (10,), MODEL.settings)
    latent.deterministic[:, 0], latent.deterministic[:, 1] = late & imagined, 10 * index + np.arange(10)
    return latent, episode


DEMONSTRATED = (make_attempt(0, True, True), make_attempt(1, True, True), make_attempt(2, True, False))
PLAYED = (make_attempt(3, False, False), make_attempt(4, False, True), make_attempt(5, True, False))


def imagine(model, params, encoded, episodes, rng):
    """Stands in for the world model: it imagines what the latents say."""
    del model, params, rng
    return [latents.latent_at(latent, slice(1, None)) for latent in encoded], episodes


def first_entry(params, feature, first_feature, count):
    return feature[..., 0] > params, count


@pytest.fixture
def recorded(monkeypatch):
    """The attempts of a run, and a world model and reward that say of them what is planted."""
    task = TASKS[0]
    monkeypatch.setattr(train_world_model, "load", lambda *_: (MODEL, {"rssm": {}}))
    monkeypatch.setattr(train_policy, "encode_demonstrations", lambda *_: {task: _lists(DEMONSTRATED)})
    monkeypatch.setattr(train_reward, "encode_attempts", lambda config, workdir, split, tasks: {task: _lists(PLAYED)})
    monkeypatch.setattr(latents, "imagine_episodes", imagine)
    monkeypatch.setattr(finetune_policy, "imagination_functions", lambda *_: {"reward_rule": first_entry})


def _lists(attempts):
    return tuple(map(list, zip(*attempts, strict=True)))


def start(workdir, **changes):
    changes = {"min_start_step": 0, "max_start_step": 0} | changes
    config = make_config(**{f"ppo.{key}": value for key, value in changes.items()})
    bank, figures = finetune_policy.start_bank(config, str(workdir), TASKS[0], np.float32(0.5))
    return None if bank is None else bank.deterministic[:, 1].tolist(), figures


@pytest.mark.parametrize(
    ("starts", "expected"),
    [("demonstrations", [0, 10, 20]), ("play", [30, 40, 50]), ("both", [0, 10, 20, 30, 40, 50])],
)
def test_starts_are_those_of_demonstrations_of_play_or_of_both(recorded, tmp_path, starts, expected):
    assert start(tmp_path, starts=starts) == (expected, {})
    later = [first + step for first in expected for step in (1, 2)]
    assert start(tmp_path, starts=starts, min_start_step=1, max_start_step=2) == (later, {})


@pytest.mark.parametrize(
    ("starts", "trust", "expected"),
    [("demonstrations", 2 / 3, [0, 10]), ("both", 0.5, [0, 10, 30]), ("play", 0.0, None)],
)
def test_imagination_is_trusted_up_to_the_threshold_and_no_further(recorded, tmp_path, starts, trust, expected):
    bank, figures = start(tmp_path, starts=starts, min_trust=trust - 1e-6 if trust else 0.01)
    assert bank == expected and figures["trusted"] == (expected is not None)
    assert figures["trust"] == pytest.approx(trust)
    bank, figures = start(tmp_path, starts=starts, min_trust=trust + 1e-6)
    assert bank is None and not figures["trusted"]


def test_play_without_an_attempt_is_named(recorded, monkeypatch, tmp_path):
    monkeypatch.setattr(train_reward, "encode_attempts", lambda *_: {TASKS[0]: ([], [])})
    with pytest.raises(ValueError, match="config.ppo.starts='play', but .* no annotated attempt at turn_on_led; take"):
        start(tmp_path, starts="play")


def test_of_several_processes_one_alone_writes_the_figures(recorded, monkeypatch, tmp_path):
    config = make_config(**{"ppo.min_trust": 0.5, "tasks": TASKS[:1]})
    monkeypatch.setattr(train_policy, "load", lambda *_: {})
    monkeypatch.setattr(train_reward, "load", lambda *_: np.float32(0.5))
    monkeypatch.setattr(finetune_policy, "initial_state", lambda *_: {})
    monkeypatch.setattr(training, "fit", lambda *_, **__: None)
    monkeypatch.setattr(parallel, "is_first_process", lambda: False)
    finetune_policy.run(config, str(tmp_path))
    assert finetune_policy.read_trust(str(tmp_path)) == {}
    monkeypatch.setattr(parallel, "is_first_process", lambda: True)
    finetune_policy.run(config, str(tmp_path))
    assert finetune_policy.read_trust(str(tmp_path))[TASKS[0]]["trusted"]
