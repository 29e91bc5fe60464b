"""A CALVIN folder becomes shards with nothing changed, resumably, and every damaged file is named.

The first tests use the small recorded set where it is found (beside the repository, or where WAM_JAX_CALVIN_TINY
points), else a synthetic folder of the same layout.
"""

import dataclasses
import functools
import os
import pickle
import shutil
from pathlib import Path

import cv2
import helpers
import numpy as np
import pytest
import tensorflow_datasets as tfds
from calvin_files import make_input, rewrite, save_pickled

from data.calvin import convert, episodes, npz_folder, pickled_npy
from data.calvin.conversion import Settings
from wam_jax import datasets, input_pipeline, parallel, specs, world_model_training

quick_compilation = helpers.quick_compilation
ROOT = Path(__file__).parents[1]
RECORDED = Path(os.environ.get("WAM_JAX_CALVIN_TINY", ROOT.parent / "shared" / "calvin" / "tiny"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The synthetic folder; not to be changed."""
    return make_input(tmp_path_factory.mktemp("calvin") / "input")


@pytest.fixture(scope="module")
def recorded(folder):
    """The recorded set where there is one."""
    return RECORDED if RECORDED.is_dir() else folder


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy of the synthetic folder to damage."""
    return shutil.copytree(folder, tmp_path / "damaged")


def frames_of(directory):
    return [dict(np.load(path)) for path in sorted(directory.glob("episode_*.npz"))]


def test_native_size_equals_the_files(recorded, tmp_path):
    convert.convert(recorded, tmp_path, Settings(image_size=0))
    builder = tfds.builder_from_directory(tmp_path)
    for split, name in (("train", "training"), ("validation", "validation")):
        steps = [step for episode in builder.as_data_source(split) for step in episode["steps"]]
        files = frames_of(recorded / name)
        assert len(steps) == len(files)
        for step, file in zip(steps, files, strict=True):
            converted = step["observation"] | {"rel_actions": step["action"], "actions": step["action_absolute"]}
            for key, array in converted.items():
                np.testing.assert_array_equal(array, file[key])
                assert array.dtype == file[key].dtype


def test_64_pixels_are_the_averaged_areas_and_equal_a_native_set_read_at_64(recorded, tmp_path):
    for size in (0, 64):
        convert.convert(recorded, tmp_path / str(size), Settings(image_size=size))
    native, small = (datasets.read_episodes(tmp_path / size, "validation") for size in ("0", "64"))
    files = frames_of(recorded / "validation")
    for camera in ("rgb_static", "rgb_gripper"):
        averaged = [cv2.resize(file[camera], (64, 64), interpolation=cv2.INTER_AREA) for file in files]
        for read in (native, small):
            np.testing.assert_array_equal(np.concatenate([getattr(e.observation, camera) for e in read]), averaged)


def test_50_updates_of_the_world_model_lower_its_loss(recorded, tmp_path):
    convert.convert(recorded, tmp_path)
    model = helpers.make_model(learning_rate=5e-3, final_learning_rate=5e-3, batch_size=2, num_steps=50)
    devices = parallel.local_devices(1)
    run = parallel.compile_updates(
        functools.partial(world_model_training.update, model=model, axis_name=parallel.AXIS_NAME), devices
    )
    state, loss = parallel.replicate(helpers.make_state(model), devices), []
    batches = input_pipeline.make_batches(
        tmp_path, "train", 2, helpers.T, seed=0, updates_per_dispatch=10, cache="none"
    )
    for step in range(0, 50, 10):
        state, metrics = run(state, next(batches), 0, step)
        loss += metrics["loss"][0].tolist()
    batches.close()
    assert np.isfinite(loss).all()
    assert np.mean(loss[-10:]) < 0.6 * np.mean(loss[:3]), loss


@pytest.mark.skipif(not RECORDED.is_dir(), reason="needs the recorded CALVIN set; set WAM_JAX_CALVIN_TINY to its path")
def test_recorded_annotations_and_rewards(tmp_path):
    convert.convert(RECORDED, tmp_path)
    (steps,) = datasets.read_episodes(tmp_path, "train")
    first = 1000
    for start, end, task in (
        (1005, 1044, "open_drawer"),
        (1055, 1092, "turn_on_led"),
        (1102, 1149, "move_slider_left"),
    ):
        span = slice(start - first, end - first)
        assert (steps.task[span] == specs.task_index(task)).all()
        assert steps.task[span.start - 1] == steps.task[span.stop] == -1
        assert steps.reward[span.start] == 0 and steps.reward[span.stop - 1] == 1  # the expert solves it in the span
        assert (np.diff(steps.reward[span]) >= 0).all() and steps.reward[span.stop] == 0


def test_annotations_tasks_rewards_and_sources(folder, tmp_path):
    convert.convert(folder, tmp_path)
    first, second = tfds.builder_from_directory(tmp_path).as_data_source("train")
    tasks = [step["task"].decode() for step in first["steps"]]
    assert tasks == [""] * 3 + ["open_drawer"] * 5 + [""] * 4
    assert first["steps"][3]["language_instruction"] == b"please open_drawer"
    assert [step["reward"] for step in first["steps"]] == [0] * 6 + [1, 1] + [0] * 4  # 0.15 m > 0.12 m after 3 steps
    assert [step["task"].decode() for step in second["steps"]] == [""] + ["lift_red_block_table"] * 5
    assert sum(step["reward"] for step in second["steps"]) == 0
    assert second["episode_metadata"]["first_frame"] == 112
    assert second["episode_metadata"]["source"] == b"calvin_scene_D"
    read = datasets.read_episodes(tmp_path)
    assert read[0].task.tolist() == [-1] * 3 + [0] * 5 + [-1] * 4
    assert read[1].task.tolist() == [-1] * 6  # not one of the eight


def test_long_ranges_are_cut_but_no_annotation_is(folder):
    training, faults = npz_folder.read_folder(folder / "training")
    assert faults == []
    parts = episodes.plan_episodes(training, max_steps=5)
    assert [(part.first, part.last) for part in parts] == [(100, 102), (103, 107), (108, 111), (112, 112), (113, 117)]
    assert [len(part.annotations) for part in parts] == [0, 1, 0, 0, 1]
    shards = episodes.group_into_shards(parts, frames_per_shard=6)
    assert [[len(part) for part in shard] for shard in shards] == [[3, 5], [4, 1, 5]]


def test_a_killed_conversion_goes_on_where_it_stopped(folder, tmp_path):
    settings = Settings(frames_per_shard=4, max_episode_steps=4)
    convert.convert(folder, tmp_path, settings)
    shards = sorted(tmp_path.glob("calvin-*"))
    assert len(shards) > 3
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards}
    leftover = tmp_path / f"{shards[1].name}.77.tmp"
    shards[1].rename(leftover)
    (tmp_path / "dataset_info.json").unlink()
    convert.convert(folder, tmp_path, settings)
    for path, (content, time) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == time) == (path != shards[1])
    assert not leftover.exists()
    assert sum(len(episode.is_first) for episode in datasets.read_episodes(tmp_path)) == 18
    with pytest.raises(ValueError, match="other settings .image_size differ"):
        convert.convert(folder, tmp_path, dataclasses.replace(settings, image_size=0))


FRAME = "training/episode_0000104.npz"
RANGES = "training/ep_start_end_ids.npy"
LANGUAGE = "training/lang_annotations/auto_lang_ann.npy"
NAN_ACTION = np.array([0, 0, np.nan, 0, 0, 0, 1])


def with_unknown_compression(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 10] = 99  # in the archive's directory, the first entry's method
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (FRAME, lambda p: rewrite(p, scene_obs=None), "has no array 'scene_obs'"),
        (FRAME, lambda p: rewrite(p, robot_obs=np.zeros(14)), r"robot_obs has shape \(14,\), expected \(15,\)"),
        (FRAME, lambda p: rewrite(p, rgb_static=np.zeros((200, 200, 3))), "rgb_static is float64, expected uint8"),
        (FRAME, lambda p: rewrite(p, actions=np.zeros(7, int)), "actions is int64, expected float64 or float32"),
        (FRAME, lambda p: rewrite(p, rel_actions=NAN_ACTION), r"rel_actions\[2\] is nan, expected a finite number"),
        (FRAME, lambda p: p.write_bytes(p.read_bytes()[:5000]), "cannot be read as npz"),
        (FRAME, lambda p: p.write_bytes(b""), "cannot be read as npz"),
        (FRAME, with_unknown_compression, "cannot be read as npz .NotImplementedError: "),
        (FRAME, lambda p: p.unlink(), "missing; expected a file for every frame that"),
        (RANGES, lambda p: p.unlink(), "missing; it says where each stretch of play begins"),
        (RANGES, lambda p: np.save(p, np.array([[111, 100]])), "a range runs from 111 to 100"),
        (RANGES, lambda p: np.save(p, np.array([[100, 105], [105, 111]])), "begins at 105, inside the one"),
        (RANGES, lambda p: np.save(p, np.zeros(4)), r"is float64 \(4,\), expected integers"),
        (RANGES, lambda p: p.write_bytes(b"x" * 50), "not read .*expected an .npy file"),
        (LANGUAGE, lambda p: save_pickled(p, {"info": {}}), "KeyError 'indx'; expected a dict with language.ann"),
        (LANGUAGE, lambda p: p.write_bytes(p.read_bytes()[:-40]), "not read"),
        ("validation", lambda p: shutil.rmtree(p), "no such folder; --input must hold the folders"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(damaged, tmp_path, file, damage, message):
    damage(damaged / file)
    with pytest.raises(ValueError, match=message) as error:
        convert.convert(damaged, tmp_path / "out")
    assert str(error.value).startswith(str(damaged / file))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "dataset_info.json").exists()


class Malicious:
    """What a pickle can do to its reader: call anything with anything."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("file", [LANGUAGE, RANGES, "training/scene_info.npy"])
@pytest.mark.parametrize("function", [os.mkdir, exec, np.save])
def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(damaged, tmp_path, file, function):
    trace = tmp_path / "trace.npy"
    arguments = {
        os.mkdir: (str(trace),),
        exec: (f"open({str(trace)!r}, 'w')",),
        np.save: (str(trace), 1),
    }[function]
    save_pickled(damaged / file, Malicious(function, *arguments))
    with pytest.raises(ValueError, match="UnpicklingError: it refers to .*which an array file has no use for"):
        convert.convert(damaged, tmp_path / "out")
    assert not trace.exists()
    np.load(damaged / file, allow_pickle=True)  # the control: numpy's own reader does run it
    assert trace.exists()


def test_a_pickle_in_place_of_an_npz_file_is_refused(damaged, tmp_path):
    trace = tmp_path / "trace"
    (damaged / FRAME).write_bytes(pickle.dumps(Malicious(os.mkdir, str(trace))))
    with pytest.raises(ValueError, match="cannot be read as npz"):
        convert.convert(damaged, tmp_path / "out")
    assert not trace.exists()


def test_pickled_files_of_older_numpy_are_read(tmp_path):
    array = np.array({"a": [np.arange(3), "text", (1, 2.5)], "b": np.float32(2)}, dtype=object)
    path = tmp_path / "old.npy"
    with open(path, "wb") as file:  # as numpy 1 wrote it: an older pickle protocol, and modules under another name
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(pickle.dumps(array, protocol=3).replace(b"numpy._core.", b"numpy.core."))
    value = pickled_npy.load(path).item()
    assert value["a"][0].tolist() == [0, 1, 2] and value["a"][1:] == ["text", (1, 2.5)] and value["b"] == 2


def test_the_binary_with_two_workers(folder, damaged, tmp_path):
    output = tmp_path / "out"

    def run(input_folder, *more):
        flags = [f"--input={input_folder}", f"--output={output}", "--frames_per_shard=6", *more]
        return helpers.run_python("-m", "data.calvin.convert", *flags)

    rewrite(damaged / FRAME, rel_actions=NAN_ACTION)
    failed = run(damaged, "--workers=2")
    assert failed.returncode == 1
    message = failed.stderr.strip().splitlines()[-1]
    assert message.startswith(f"error: {damaged / FRAME}: rel_actions[2] is nan")
    assert message.endswith(f"all 1 in {output / 'refused_files.txt'}")
    assert "Traceback" not in failed.stderr
    done = run(folder, "--workers=2", "--verify")  # the same frames, mended: the shards of the first run are kept
    assert done.returncode == 0, done.stderr
    assert "train: 18 frames, 2 episodes from 2 ranges, 2 annotations, 2 shards" in done.stdout
    assert "verified: every checksum is right" in done.stdout
    assert len(datasets.read_episodes(output, "validation")) == 1
    (shard,) = output.glob("calvin-validation*")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    changed = run(folder, "--workers=1", "--verify")
    assert changed.returncode == 1
    assert changed.stderr.strip().splitlines()[-1].startswith(f"error: {shard}: SHA-256 is ")
