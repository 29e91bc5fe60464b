"""Which rows the success classifier of a task learns from."""

import helpers
import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from experiments import train_policy, train_reward, train_world_model
from wam_jax import parallel, training

quick_compilation = helpers.quick_compilation
TASK = "turn_on_led"
MODEL = helpers.make_model()


def make_attempts(seed, lengths):
    """Attempts that are solved at their last two steps, with made-up latents."""
    episodes = [helpers.make_steps(seed + i, (length,)) for i, length in enumerate(lengths)]
    episodes = [x.replace(reward=np.float32(np.arange(len(x.action)) >= len(x.action) - 2)) for x in episodes]
    return [helpers.make_latents(seed + i, (length,), MODEL.settings) for i, length in enumerate(lengths)], episodes


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Runs the binary on made-up latents, and returns the bank of its task."""
    banks = []

    def fit(compiled, state, make_batches, **arguments):
        banks.append(jax.device_get(jax.tree.map(lambda x: x[0], next(make_batches(0)))))  # of the first device
        return state

    demonstrations, play = make_attempts(0, (5, 7)), make_attempts(10, (6,))
    monkeypatch.setattr(training, "fit", fit)
    monkeypatch.setattr(train_world_model, "load", lambda *_: (MODEL, helpers.make_state(MODEL).params))
    monkeypatch.setattr(train_policy, "encode_demonstrations", lambda *_: {TASK: demonstrations})
    monkeypatch.setattr(train_reward, "encode_attempts", lambda *_: {TASK: play})

    def run(**changes):
        config = helpers.make_config()
        config.tasks = (TASK,)
        config.reward.update(changes)
        train_reward.run(FrozenConfigDict(config), str(tmp_path / str(len(banks))))
        return banks[-1]

    return run


def solved(lengths):
    return [int(t >= length - 2) for length in lengths for t in range(length)]


def followed(lengths):
    return [int(t >= length - 2) for length in lengths for t in range(1, length)]


def test_imagined_rows_follow_the_real_ones_with_the_labels_of_the_steps_they_stand_for(train):
    real, both = train(), train(use_imagined=True)
    assert real.label.tolist() == solved((5, 7, 6))
    assert both.label.tolist() == solved((5, 7, 6)) + followed((5, 7, 6))
    helpers.assert_equal(jax.tree.map(lambda x: x[: len(real.label)], both), real)
    assert np.isfinite(both.latent.deterministic).all()


def test_play_is_imagined_only_where_it_is_used(train):
    bank = train(use_imagined=True, use_play=False)
    assert bank.label.tolist() == solved((5, 7)) + followed((5, 7))


def test_of_several_processes_one_alone_writes_the_quality(train, monkeypatch, tmp_path):
    quality = {"train": {"precision": 1.0}}
    monkeypatch.setattr(train_reward, "_quality", lambda *_: quality)
    for number, first in enumerate((False, True)):
        monkeypatch.setattr(parallel, "is_first_process", lambda first=first: first)
        train()
        assert train_reward.read_quality(str(tmp_path / str(number))) == ({TASK: quality} if first else {})
