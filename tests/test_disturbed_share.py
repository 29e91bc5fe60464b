"""How many of play's attempts are disturbed: what is asked for is collected, noted, and not taken for anything else."""

from unittest import mock

import helpers
import pytest
from ml_collections import FrozenConfigDict

from experiments import collect_calvin, collect_playtable, launch
from experiments.config_checks import check
from wam_jax import rlds, shards


def make_config(share=0.6, **dataset):
    config = helpers.make_config()
    config.dataset.update(disturbed_share=share, **dataset)
    return config


def test_playtables_play_has_the_share_that_is_asked_for(tmp_path):
    asked = mock.Mock(side_effect=InterruptedError)
    with mock.patch.object(collect_playtable.playtable, "collect_play", asked), pytest.raises(InterruptedError):
        collect_playtable.collect_play(str(tmp_path), FrozenConfigDict(make_config(0.25)))
    assert asked.call_args.kwargs == {"disturbed_share": 0.25}
    assert shards.read_plan(tmp_path)["disturbed_share"] == 0.25


def test_calvins_play_has_the_share_that_is_asked_for(tmp_path):
    asked = mock.Mock(side_effect=InterruptedError)
    with (
        mock.patch.object(collect_calvin.calvin, "record_play", asked),
        mock.patch.object(collect_calvin, "_collect") as collected,
        pytest.raises(InterruptedError),
    ):
        collect_calvin.collect_play(str(tmp_path), FrozenConfigDict(make_config(0.25)), recorder=None)
        _, _, plan, planned, *_ = collected.call_args.args
        planned[0].episodes[0](pool=None)
    assert asked.call_args.kwargs == {"disturbed_share": 0.25} and plan["disturbed_share"] == 0.25


def test_play_older_than_the_option_is_of_its_default(tmp_path):
    shards.start_dataset(tmp_path, {"kind": "play", "seed": 0, "steps": 400, "train": 4, "validation": 1})
    sizes = {"play_steps": 400, "play_episodes": 4, "validation_episodes": 1}
    shards.start_dataset(tmp_path, launch.play_plan(make_config(**sizes)))
    with pytest.raises(ValueError, match=r"made with other settings \(disturbed_share differ"):
        shards.start_dataset(tmp_path, launch.play_plan(make_config(0.0, **sizes)))


def test_the_config_says_of_named_play_what_its_plan_says(tmp_path):
    episode = rlds.Episode(helpers.make_steps(0, (40,)), source="test", episode_id="0")
    helpers.write_dataset(tmp_path, "playtable_play", {"train": [episode]})
    named = {"play": str(tmp_path)}
    check(make_config(**named))
    plan = tmp_path / shards.PLAN_FILE
    plan.write_text('{"kind": "play", "disturbed_share": 0.0}')
    with pytest.raises(ValueError, match="is there, with 0.0; take --config.dataset.disturbed_share=0.0"):
        check(make_config(**named))
    check(make_config(0.0, **named))
    plan.write_text('{"kind": "play"}')  # older than the option
    check(make_config(**named))
    with pytest.raises(ValueError, match="is there, with 0.6; take --config.dataset.disturbed_share=0.6"):
        check(make_config(0.1, **named))
    plan.write_text('{"image_size": 64, "frames_per_shard": 4096}')  # converted: nothing was disturbed on purpose
    check(make_config(0.1, **named))
    plan.write_text('{"kind": "demonstrations"}')
    with pytest.raises(ValueError, match=f"config.dataset.play={tmp_path} holds demonstrations, not play"):
        check(make_config(**named))
    plan.write_text('{"kind": "play", "disturbed_share": "x"}')
    with pytest.raises(ValueError, match=f"{shards.PLAN_FILE} has disturbed_share='x', expected a share from 0 to 1"):
        check(make_config(**named))
