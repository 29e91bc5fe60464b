"""Where PPO's imagination starts: whose latents, which of them are trusted, and what that costs to read."""

from unittest import mock

import helpers
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from experiments import finetune_policy, train_reward, train_world_model
from wam_jax import datasets, latents, rlds, specs

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
        banks = {task: finetune_policy.start_bank(config, str(tmp_path), task, {}) for task in TASKS}
    assert decode.call_count == 5 and [len(call.args[2]) for call in encode.call_args_list] == [2, 3]
    for task, count in zip(TASKS, (2, 3), strict=True):
        assert len(together[task][0]) == count
        helpers.assert_equal(banks[task], latents.start_bank(together[task][0], 2, 3))
