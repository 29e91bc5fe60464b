"""Windows stay within episodes, come in an order that is a function of (seed, step), and bad input is named."""

import re
import shutil
import subprocess
import sys
import threading

import helpers
import jax
import numpy as np
import pytest

from experiments import verify_dataset
from wam_jax import datasets, input_pipeline, raw_cache, rlds
from wam_jax.types import Observation, StepBatch

LENGTHS = (9, 3, 14, 20, 5)  # steps of the episodes of the train split; one is shorter than a window
T = 5
STARTS = sum(max(0, n - T + 1) for n in LENGTHS)


def make_episode(index, length):
    """An episode whose action tells episode and step, and whose images tell the step."""
    position = np.arange(length)
    frames = np.broadcast_to(position.astype(np.uint8)[:, None, None, None], (length, 64, 64, 3))
    action = np.zeros((length, 7))
    action[:, 0], action[:, 1] = index, position
    observation = Observation(frames, frames + 100, np.ones((length, 15)) * index, np.ones((length, 24)) * index)
    task = np.full(length, index, np.int32)
    steps = StepBatch(observation, action, position == 0, position == length - 1, task, np.zeros(length, np.float32))
    return rlds.Episode(steps, source="test", episode_id=str(index))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("windows")
    episodes = [make_episode(i, n) for i, n in enumerate(LENGTHS)]
    splits = {"train": episodes, "validation": [make_episode(0, 6)]}
    return helpers.write_dataset(path, "windows", splits, episodes_per_shard=2)


def take(directory, count, cache="memory", batch_size=4, seed=0, **arguments):
    batches = input_pipeline.make_batches(directory, "train", batch_size, T, seed, cache=cache, **arguments)
    try:
        return [jax.tree.map(np.asarray, next(batches)) for _ in range(count)]
    finally:
        batches.close()


def test_read_episodes(directory):
    episodes = datasets.read_episodes(directory)
    assert [len(episode.is_first) for episode in episodes] == list(LENGTHS)
    written = make_episode(2, LENGTHS[2]).steps
    helpers.assert_equal(
        episodes[2], jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, written)
    )
    dtypes = {str(x.dtype) for x in jax.tree.leaves(episodes[2])}
    assert dtypes == {"uint8", "float32", "int32", "bool"}
    assert len(datasets.read_episodes(directory, "validation")) == 1


def test_attempts_are_the_long_enough_spans_of_a_task():
    labels = np.array([3] * 9 + [-1] * 4 + [5] * 10 + [3] * 7 + [5] * 8)  # the second 3 is too short
    spans = datasets.attempt_spans(labels, [3, 5], min_steps=8)
    assert spans == [(3, slice(0, 9)), (5, slice(13, 23)), (5, slice(30, 38))]
    assert datasets.attempt_spans(labels, [3], min_steps=7) == [(3, slice(0, 9)), (3, slice(23, 30))]
    assert datasets.attempt_spans(labels, [0], min_steps=1) == []


@pytest.mark.parametrize("read_attempts", [datasets.read_attempts, raw_cache.read_attempts])
def test_attempts_are_read_from_a_split_of_play_and_nothing_where_it_lacks_the_split(
    directory, tmp_path, read_attempts
):
    attempts = read_attempts(directory, "train", [0, 2, 6], min_steps=4)  # episode i is all task i
    assert {task: [len(steps.action) for steps in found] for task, found in attempts.items()} == {
        0: [9],
        2: [14],
        6: [],
    }
    helpers.assert_equal(attempts[2][0], datasets.read_episodes(directory)[2])
    helpers.write_dataset(tmp_path, "training", {"train": [make_episode(0, 6)]})
    assert read_attempts(tmp_path, "validation", [0]) == {0: []}


def test_the_task_of_every_episode(directory):
    assert datasets.episode_tasks(directory) == [0, 1, 2, 3, 4]


def test_windows_lie_within_episodes_and_an_epoch_holds_each_once(directory):
    (batch,) = take(directory, 1, batch_size=STARTS)  # exactly one epoch
    action = batch.action[0, 0]
    assert (action[..., 0] == action[:, :1, 0]).all()  # one episode a window
    assert (np.diff(action[..., 1]) == 1).all()  # consecutive steps
    assert (batch.observation.rgb_static[0, 0, ..., 0, 0, 0] == action[..., 1]).all()  # images of the same steps
    assert not batch.is_last[0, 0, :, :-1].any() and not batch.is_first[0, 0, :, 1:].any()
    found = sorted((int(episode), int(start)) for episode, start in action[:, 0, :2])
    assert found == [(e, s) for e, n in enumerate(LENGTHS) for s in range(n - T + 1)]


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_a_batch_is_a_function_of_seed_and_step(directory, cache):
    batches = take(directory, 12, cache)  # more than one epoch
    for resumed, batch in zip(take(directory, 4, cache, start_step=8), batches[8:], strict=True):
        helpers.assert_equal(resumed, batch)
    assert not all(
        (a.action == b.action).all() for a, b in zip(batches, take(directory, 12, cache, seed=1), strict=True)
    )
    assert not (batches[0].action == batches[STARTS // 4].action).all()  # the next epoch has another order


def test_position_of_the_iterator_continues_it(directory):
    batches = input_pipeline.make_batches(directory, "train", 4, T, seed=0, updates_per_dispatch=2)
    next(batches)
    assert batches.step == 2
    continued = next(batches)
    assert batches.seconds_waiting > 0
    batches.close()
    helpers.assert_equal(
        take(directory, 1, start_step=2, updates_per_dispatch=2)[0], jax.tree.map(np.asarray, continued)
    )


def test_many_updates_of_a_dispatch_are_the_single_ones(directory):
    single = take(directory, 6)
    for dispatch, batch in enumerate(take(directory, 2, updates_per_dispatch=3)):
        assert batch.observation.rgb_static.shape == (1, 3, 4, T, 64, 64, 3)
        for n in range(3):
            helpers.assert_equal(jax.tree.map(lambda x, n=n: x[:, n : n + 1], batch), single[3 * dispatch + n])


def test_devices_and_processes_take_disjoint_parts_of_each_update():
    whole = input_pipeline.window_numbers(step=5, batch_size=24, num_devices=1, num_updates=2)
    assert whole.shape == (1, 2, 24)
    assert whole.ravel().tolist() == list(range(5 * 24, 7 * 24))
    parts = [input_pipeline.window_numbers(5, 24, 4, 2, process, 3) for process in range(3)]
    assert {part.shape for part in parts} == {(4, 2, 2)}
    for n in range(2):  # together the same windows as one process on one device, none twice
        assert np.concatenate([part[:, n].ravel() for part in parts]).tolist() == whole[0, n].tolist()


def test_processes_load_disjoint_windows(directory):
    parts = [take(directory, 1, process_index=i, process_count=2)[0] for i in range(2)]
    (whole,) = take(directory, 1)
    helpers.assert_equal(jax.tree.map(lambda a, b: np.concatenate([a, b], axis=2), *parts), whole)


def test_images_of_another_size_are_averaged_down(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (1, 128, 128, 3), np.uint8)
    episode = make_episode(0, 1)
    observation = episode.steps.observation.replace(rgb_static=image)
    episode = rlds.Episode(episode.steps.replace(observation=observation), source="test")
    helpers.write_dataset(tmp_path, "large", {"train": [episode]})
    (read,) = datasets.read_episodes(tmp_path)
    mean = image.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(read.observation.rgb_static[0] - mean).max() <= 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directory": "nowhere"}, "directory nowhere does not exist; check the path"),
        ({"directory": "README.md"}, "directory README.md is a file; name the folder of a dataset"),
        ({"split": "test"}, "has no split 'test'; it has train, validation"),
        ({"length": 21}, "window length 21 is longer than every episode; the longest has 20 steps"),
        ({"batch_size": 5, "process_count": 2}, "batch_size=5 is not divisible by 2"),
        ({"cache": "disk"}, "cache='disk' is not known; choose one of none, memory"),
        ({"prefetch": 0}, "prefetch=0 must be at least 1"),
    ],
)
def test_bad_arguments_are_named(directory, changes, message):
    arguments = {"directory": directory, "split": "train", "batch_size": 4, "length": T, "seed": 0} | changes
    with pytest.raises(ValueError, match=message):
        input_pipeline.make_batches(**arguments)


def test_half_written_and_foreign_directories_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no dataset"):
        datasets.read_episodes(tmp_path)
    helpers.write_dataset(tmp_path, "half", {"train": [make_episode(0, 6)]})
    (tmp_path / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match="half-written .*run the command that wrote it again"):
        input_pipeline.make_batches(tmp_path, "train", 4, T, 0)


def test_a_damaged_or_missing_shard_is_named(tmp_path):
    helpers.write_dataset(tmp_path, "whole", {"train": [make_episode(0, 6)]})
    (shard,) = tmp_path.glob("*.array_record-*")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="shards of 'train' hold .* bytes, written were .*write it again"):
        datasets.read_episodes(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        input_pipeline.make_batches(tmp_path, "train", 4, T, 0)
    shard.write_bytes(content)
    assert len(datasets.read_episodes(tmp_path)) == 1
    (tmp_path / "features.json").unlink()
    with pytest.raises(ValueError, match="metadata cannot be read .*; write the dataset again"):
        datasets.read_episodes(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("dataset_info.json", "", "dataset_info.json is damaged .*; delete it, and run the command that wrote"),
        ("dataset_info.json", "{}", "dataset_info.json is damaged .*KeyError: 'splits'"),
        ("dataset_info.json", "[]", "dataset_info.json is damaged .*TypeError"),
        ("metadata.json", "", "its metadata cannot be read .*; write the dataset again"),
    ],
)
def test_damaged_metadata_is_named(tmp_path, file, content, message):
    helpers.write_dataset(tmp_path, "whole", {"train": [make_episode(0, 6)]})
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        input_pipeline.make_batches(tmp_path, "train", 4, T, 0)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_a_shard_damaged_inside_is_named(tmp_path, cache):
    helpers.write_dataset(tmp_path, "whole", {"train": [make_episode(0, 20)]})
    (shard,) = tmp_path.glob("*.array_record-*")
    content = bytearray(shard.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 100] = bytes(100)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}: episode 0 of 'train' cannot be read .*write it again"):
        take(tmp_path, 1, cache=cache)


def test_all_caches_give_the_same_windows(directory):
    arguments = dict(batch_size=8, start_step=3, updates_per_dispatch=2)
    streamed, *others = (take(directory, 3, cache, **arguments) for cache in ("none", "memory", "mmap"))
    for other in others:
        helpers.assert_equal(other, streamed)
    expected = jax.tree.map(lambda *x: np.concatenate(x, axis=1)[0], *streamed)
    found = helpers.resident_windows(directory, T, 3, 1, **arguments)
    assert found.action.shape == (6, 8, T, 7)
    helpers.assert_equal(found, expected)


def test_processes_that_build_the_raw_cache_at_once_all_get_it(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "data", ignore=shutil.ignore_patterns("raw-*"))
    script = "import sys; from wam_jax import raw_cache; print(raw_cache.load(sys.argv[1], 'train').action.sum())"
    command = [sys.executable, "-c", script, str(tmp_path / "data")]
    processes = [subprocess.Popen(command, cwd=helpers.ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    sums = {process.communicate(timeout=300)[0] for process in processes}
    assert len(sums) == 1 and not any(process.returncode for process in processes)
    assert not list((tmp_path / "data").glob("*.tmp"))


def test_a_raw_cache_is_made_once_and_anew_for_other_shards(tmp_path, monkeypatch):
    helpers.write_dataset(tmp_path / "a", "windows", {"train": [make_episode(0, 9)]})
    first = take(tmp_path / "a", 1, "mmap")
    monkeypatch.setattr(datasets, "decode", None)  # nothing is decoded again
    helpers.assert_equal(take(tmp_path / "a", 1, "mmap"), first)
    monkeypatch.undo()
    helpers.write_dataset(tmp_path / "b", "windows", {"train": [make_episode(5, 9)]})
    shutil.copytree(tmp_path / "a" / "raw-train", tmp_path / "b" / "raw-train")
    other = take(tmp_path / "b", 1, "mmap")
    helpers.assert_equal(other, take(tmp_path / "b", 1, "memory"))
    assert not list((tmp_path / "b").glob("*.tmp"))
    path = tmp_path / "b" / "raw-train" / "rgb_static.npy"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="raw-train is damaged .*delete it, it is then made anew"):
        take(tmp_path / "b", 1, "mmap")


def test_a_raw_cache_that_changed_is_found(tmp_path, capsys):
    helpers.write_dataset(tmp_path, "windows", {"train": [make_episode(0, 9)]})
    take(tmp_path, 1, "mmap")
    verify_dataset.main([str(tmp_path)])
    path = tmp_path / "raw-train" / "action.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(SystemExit) as error:
        verify_dataset.main([str(tmp_path)])
    assert re.fullmatch(f"error: {path}: SHA-256 is .*; delete {path.parent}, it is then made anew", error.value.code)


def test_a_raw_cache_that_finds_no_room_says_so_and_leaves_nothing(tmp_path):
    helpers.write_dataset(tmp_path, "windows", {"train": [make_episode(0, 9)]})
    script = "import resource, sys; from wam_jax import raw_cache; limit = 2 * (50_000,)\n"
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, limit); raw_cache.load(sys.argv[1], 'train')"
    done = helpers.run_python("-c", script, str(tmp_path))
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        rf"OSError: {tmp_path}/raw-train cannot be written \(.*File too large.*\); it takes 0.000223 GB: make room.*",
        last,
    )
    assert not list(tmp_path.glob("raw-train*/*"))
    assert len(take(tmp_path, 1, "mmap")) == 1


def test_closing_ends_every_thread(directory):
    before = set(threading.enumerate())
    take(directory, 2)
    assert set(threading.enumerate()) == before


def test_an_error_while_loading_reaches_the_consumer(directory, monkeypatch):
    def fail(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(input_pipeline.MemoryStore, "window", fail)
    with pytest.raises(OSError, match="disk gone"):
        take(directory, 1)
