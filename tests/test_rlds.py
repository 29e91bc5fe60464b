"""What is written is a valid TFDS dataset, whole or resumable, and equal to what was given."""

import dataclasses

import helpers
import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import verify_dataset
from wam_jax import rlds, shards, specs
from wam_jax.types import Observation, StepBatch


def make_episode(length=12, seed=0, static_size=(20, 24), gripper_size=(16, 16), **fields):
    rng = np.random.default_rng(seed)
    position = np.arange(length)
    observation = Observation(
        rgb_static=rng.integers(0, 256, (length, *static_size, 3), np.uint8),
        rgb_gripper=rng.integers(0, 256, (length, *gripper_size, 3), np.uint8),
        robot_obs=rng.normal(size=(length, 15)),
        scene_obs=rng.normal(size=(length, 24)),
    )
    steps = StepBatch(
        observation=observation,
        action=rng.uniform(-1, 1, (length, 7)),
        is_first=position == 0,
        is_last=position == length - 1,
        task=np.where(position < 4, seed % 8, -1).astype(np.int32),
        reward=(position == 3).astype(np.float32),
    )
    return rlds.Episode(steps=steps, source="test", episode_id=f"episode {seed}", **fields)


def write(directory, episodes, **arguments):
    return helpers.write_dataset(directory, "toy", {"train": episodes}, **arguments)


def test_tfds_reads_back_what_was_written(tmp_path):
    annotation = rlds.Annotation(2, 6, "rotate_red_block_left", "turn the red block to the left")
    episodes = [
        make_episode(seed=1, is_terminal=True),
        make_episode(seed=2, length=7, annotations=[annotation]),
        make_episode(seed=3),
    ]
    write(tmp_path, episodes, episodes_per_shard=2)
    source = tfds.builder_from_directory(tmp_path).as_data_source("train")  # no code of ours from here on
    assert len(source) == 3
    for episode, read in zip(episodes, source, strict=True):
        steps = list(read["steps"])
        for t, step in enumerate(steps):
            for key in ("rgb_static", "rgb_gripper", "robot_obs", "scene_obs"):
                written = getattr(episode.steps.observation, key)[t]
                np.testing.assert_array_equal(step["observation"][key], written)
                assert step["observation"][key].dtype == written.dtype  # float64, not rounded to float32
            np.testing.assert_array_equal(step["action"], episode.steps.action[t])
            assert step["is_first"] == (t == 0)
            assert step["is_last"] == (t == len(steps) - 1)
            assert step["is_terminal"] == (episode.is_terminal and t == len(steps) - 1)
            assert step["discount"] == 1 - step["is_terminal"]
            assert step["reward"] == episode.steps.reward[t]
        assert len(steps) == len(episode.steps.is_first)
        assert read["episode_metadata"]["episode_id"].decode() == episode.episode_id
    first, second = source[0]["steps"], source[1]["steps"]
    assert first[3]["task"].decode() == specs.TASKS[1]
    assert first[3]["language_instruction"].decode() == specs.INSTRUCTIONS[specs.TASKS[1]]
    assert first[4]["task"] == first[4]["language_instruction"] == b""
    assert [step["task"].decode() for step in second] == [specs.TASKS[2]] * 2 + ["rotate_red_block_left"] * 4 + [""]
    assert second[5]["language_instruction"].decode() == annotation.instruction
    assert source[1]["episode_metadata"]["annotations"]["end"] == [6]


def test_rerun_keeps_complete_shards_and_writes_the_missing_one(tmp_path):
    episodes = [make_episode(seed=seed) for seed in range(5)]
    write(tmp_path, episodes, episodes_per_shard=2)
    paths = sorted(tmp_path.glob("*.array_record-*"))
    assert len(paths) == 3
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    (tmp_path / "dataset_info.json").unlink()
    paths[1].unlink()
    leftover = tmp_path / f"{paths[1].name}.1.tmp"
    leftover.write_bytes(before[1][0][:100])
    write(tmp_path, episodes, episodes_per_shard=2)
    after = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    assert [content for content, _ in after] == [content for content, _ in before]
    assert (after[0][1], after[2][1]) == (before[0][1], before[2][1])
    assert not leftover.exists()
    assert len(tfds.builder_from_directory(tmp_path).as_data_source("train")) == 5


def test_every_process_writes_the_same_bytes(tmp_path):
    """The maps of a tf.Example come in another order in each process, unless told otherwise."""
    write(tmp_path / "here", [make_episode()])
    code = "import sys; import test_rlds; test_rlds.write(sys.argv[1], [test_rlds.make_episode()])"
    done = helpers.run_python("-c", code, str(tmp_path / "there"), PYTHONPATH=str(helpers.ROOT / "tests"))
    assert done.returncode == 0, done.stderr
    here, there = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("here", "there"))
    assert here == there


def test_a_shard_that_fails_leaves_nothing_behind(tmp_path):
    def broken():
        yield make_episode()
        raise RuntimeError("the simulator died")

    spec = helpers.spec_of("toy", make_episode())
    shards.start_dataset(tmp_path, {})
    with pytest.raises(RuntimeError, match="the simulator died"):
        shards.write_shard(tmp_path, spec, "train", 0, 1, broken())
    assert [path.name for path in tmp_path.iterdir()] == [shards.PLAN_FILE]
    with pytest.raises(ValueError, match="1 shards are missing, the first is toy-train"):
        shards.finish_dataset(tmp_path, spec, {"train": [[12]]})


def test_a_disk_that_fills_up_is_an_error_of_the_system_that_names_the_file(tmp_path, monkeypatch):
    class Full:
        def __init__(self, *arguments):
            pass

        def write(self, record):
            pass

        def close(self):  # where ArrayRecord notices
            raise RuntimeError("No space left on device")

    spec = helpers.spec_of("toy", make_episode())
    shards.start_dataset(tmp_path, {})
    monkeypatch.setattr(shards, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match="toy-train.*No space left on device.*is the disk full"):
        shards.write_shard(tmp_path, spec, "train", 0, 1, [make_episode()])


def test_another_dataset_in_the_same_directory_is_refused(tmp_path):
    write(tmp_path, [make_episode(seed=0)])
    with pytest.raises(ValueError, match="made with other settings .episodes differ"):
        write(tmp_path, [make_episode(seed=1)])


def test_a_damaged_kept_shard_is_named(tmp_path):
    write(tmp_path, [make_episode()])
    (shard,) = tmp_path.glob("*.array_record-*")
    shard.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="written were .* delete the dataset and write it again"):
        write(tmp_path, [make_episode()])
    (tmp_path / "dataset_info.json").unlink()  # as before the last step of writing
    with pytest.raises(ValueError, match=rf"{shard.name} cannot be read .*delete it and run again"):
        write(tmp_path, [make_episode()])


def test_metadata_are_whole_or_not_there(tmp_path, monkeypatch):
    def write_half(*, data_dir, **_):
        (data_dir / shards.INFO_FILE).write_text("{")
        raise KeyboardInterrupt

    whole, broken_off = tmp_path / "whole", tmp_path / "broken_off"
    write(whole, [make_episode()])
    with monkeypatch.context() as patch:
        patch.setattr(tfds.folder_dataset, "write_metadata", write_half)
        with pytest.raises(KeyboardInterrupt):
            write(broken_off, [make_episode()])
    assert not (broken_off / shards.INFO_FILE).exists()
    write(broken_off, [make_episode()])
    found, expected = ({path.name: path.read_bytes() for path in d.iterdir()} for d in (broken_off, whole))
    assert found == expected


def test_any_dataset_can_be_verified(tmp_path, capsys):
    good, bad, none = (tmp_path / name for name in ("good", "bad", "none"))
    for directory in (good, bad):
        write(directory, [make_episode()])
    verify_dataset.main([str(good)])
    assert capsys.readouterr().out == f"verified: {good}\n"
    (shard,) = bad.glob("*.array_record-*")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(SystemExit) as error:
        verify_dataset.main([str(good), str(bad), str(none)])
    first, second = error.value.code.splitlines()
    assert first.startswith(f"error: {shard}: SHA-256 is ")
    assert second.startswith(f"error: {none / shards.INFO_FILE}: missing, so the dataset is not complete")


def _with_steps(episode, **changes):
    return dataclasses.replace(episode, steps=episode.steps.replace(**changes))


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        (_with_steps(make_episode(), action=np.zeros((12, 6))), r"action has shape \(12, 6\), expected \(12, 7\)"),
        (_with_steps(make_episode(), action=np.full((12, 7), np.nan)), "action has non-finite values"),
        (_with_steps(make_episode(), is_last=np.zeros(12, bool)), r"is_last at \[\], expected \[0\] and \[11\]"),
        (make_episode(static_size=(9, 9)), r"rgb_static has shape \(12, 9, 9, 3\), expected \(12, 20, 24, 3\)"),
        (make_episode(annotations=[rlds.Annotation(5, 13, "a", "b")]), "annotation 5:13 is not within 0:12"),
        (make_episode(extra={"force": np.zeros((12, 2))}), r"extra fields \['force'\], the dataset has \[\]"),
    ],
)
def test_malformed_episodes_are_refused(tmp_path, episode, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, [make_episode(), episode])


def test_nothing_to_write_and_unusable_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to write"):
        write(tmp_path, [])
    with pytest.raises(ValueError, match="'My-Data' is not usable"):
        helpers.write_dataset(tmp_path, "My-Data", {"train": [make_episode()]})
