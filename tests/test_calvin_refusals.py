"""A conversion lists every file it refuses, verifies what it wrote, and says what the published sets leave unsaid."""

import os
import shutil
import subprocess

import helpers
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from calvin_files import make_folder, make_input, rewrite, save_pickled
from scipy.spatial.transform import Rotation

from data.calvin import conversion, convert, npz_folder, pool, statistics
from data.calvin.conversion import Settings
from wam_jax import datasets, json_files, shards, specs

NAN_ACTION = np.array([0, 0, np.nan, 0, 0, 0, 1])
SHARDS_OF_6 = Settings(frames_per_shard=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The synthetic folder; not to be changed."""
    return make_input(tmp_path_factory.mktemp("calvin") / "input")


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy of the synthetic folder to damage."""
    return shutil.copytree(folder, tmp_path / "damaged")


def frame(path, number):
    return npz_folder.frame_path(path / ("validation" if number >= 500 else "training"), number)


def damage_three_frames(path):
    rewrite(frame(path, 113), actions=NAN_ACTION)
    rewrite(frame(path, 116), robot_obs=None)
    frame(path, 503).write_bytes(b"no archive")


def test_every_refused_frame_is_listed_and_costs_its_shard_only(folder, damaged, tmp_path):
    damage_three_frames(damaged)
    output = tmp_path / "out"
    with pytest.raises(npz_folder.RefusedFiles) as error:
        convert.convert(damaged, output, SHARDS_OF_6)
    listed = (output / conversion.REPORT_FILE).read_text().splitlines()
    assert listed == list(error.value.faults)
    starts = (
        f"{frame(damaged, 113)}: actions[2]",
        f"{frame(damaged, 116)}: has no array",
        f"{frame(damaged, 503)}: ca",
    )
    assert len(listed) == 3 and all(line.startswith(start) for line, start in zip(listed, starts, strict=True))
    assert str(error.value) == f"{listed[0]} (2 more refused)"
    (kept,) = output.glob("calvin-*")
    assert kept.name == "calvin-train.array_record-00000-of-00002"
    written = kept.stat().st_mtime_ns
    for number in (113, 116, 503):
        shutil.copy(frame(folder, number), frame(damaged, number))
    convert.convert(damaged, output, SHARDS_OF_6)
    assert kept.stat().st_mtime_ns == written
    assert not (output / conversion.REPORT_FILE).exists()
    convert.convert(folder, tmp_path / "undisturbed", SHARDS_OF_6)
    names = {path.name for path in (tmp_path / "undisturbed").iterdir()}
    assert names == {path.name for path in output.iterdir()}
    for name in names - {"dataset_info.json"}:  # which names the input
        assert (output / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_check_reads_everything_and_lists_every_refused_file(folder, damaged, tmp_path):
    assert convert.check(folder) == []
    assert len(convert.check(tmp_path / "nowhere", workers=2)) == 2  # training/ and validation/
    damage_three_frames(damaged)
    frame(damaged, 105).unlink()
    (damaged / "training" / "lang_annotations" / "auto_lang_ann.npy").write_bytes(b"no array")
    (damaged / "validation" / "ep_start_end_ids.npy").unlink()
    output = tmp_path / "out"
    flags = [f"--input={damaged}", f"--output={output}", "--workers=1", "--check"]
    done = helpers.run_python("-m", "data.calvin.convert", *flags)
    listed = (output / conversion.REPORT_FILE).read_text().splitlines()
    names = (
        "episode_0000105.npz",
        "episode_0000113.npz",
        "episode_0000116.npz",
        "auto_lang_ann.npy",
        "start_end_ids.npy",
    )
    assert len(listed) == 5 and all(name in line.split(":")[0] for line, name in zip(listed, names, strict=True))
    message = f"error: {listed[0]} (4 more refused); all 5 in {output / conversion.REPORT_FILE}"
    assert done.stderr.strip().splitlines()[-1] == message and done.returncode == 1
    assert [path.name for path in output.iterdir()] == [conversion.REPORT_FILE]


def test_what_is_missing_is_listed_before_work_starts(damaged, tmp_path):
    for number in (100, 117, 502):
        frame(damaged, number).unlink()
    (damaged / "training" / "scene_info.npy").write_bytes(b"no array")
    with pytest.raises(npz_folder.RefusedFiles) as error:
        convert.convert(damaged, tmp_path / "out")
    assert len(error.value.faults) == 4  # the scenes, of which validation speaks again, once
    assert [path.name for path in (tmp_path / "out").iterdir()] == [conversion.REPORT_FILE]


def test_a_worker_that_is_killed_ends_the_run_with_a_word_on_memory():
    with pytest.raises(ValueError, match="a worker process was killed; where memory ran out, take fewer --workers"):
        list(pool.run(os._exit, [1, 1], workers=2))


def test_verify_names_each_damaged_shard_and_a_rerun_mends_it(folder, tmp_path):
    convert.convert(folder, tmp_path, SHARDS_OF_6)
    assert datasets.verify(tmp_path) == []
    paths = shards.written(tmp_path)
    assert len(paths) == 3
    good = [path.read_bytes() for path in paths]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)
    middle = len(good[0]) // 2
    paths[0].write_bytes(good[0][:middle] + bytes([good[0][middle] ^ 1]) + good[0][middle + 1 :])
    paths[2].write_bytes(good[2][:-1] + bytes([good[2][-1] ^ 1]))
    faults = datasets.verify(tmp_path)
    assert [fault.split(": SHA-256 is ")[0] for fault in faults] == [str(paths[i]) for i in (0, 2)]
    for path in (paths[0], paths[2], tmp_path / "dataset_info.json"):  # as the message says
        path.unlink()
    convert.convert(folder, tmp_path, SHARDS_OF_6)
    assert [path.read_bytes() for path in paths] == good and datasets.verify(tmp_path) == []


def test_verify_decodes_what_has_the_right_checksum(folder, tmp_path):
    convert.convert(folder, tmp_path, SHARDS_OF_6)
    path = shards.written(tmp_path)[1]
    content = path.read_bytes()
    png = content.index(b"IDAT") + 20
    path.write_bytes(content[:png] + b"\0" * 50 + content[png + 50 :])
    shards.write_checksums(tmp_path, shards.written(tmp_path))
    (fault,) = datasets.verify(tmp_path)
    assert fault.startswith(f"{tmp_path}: episode 1 of 'train' cannot be decoded")
    path.write_bytes(content)
    shards.write_checksums(tmp_path, shards.written(tmp_path))
    metadata = json_files.read(tmp_path / "metadata.json", "")
    metadata["episode_lengths"]["train"][0] += 1
    json_files.write(tmp_path / "metadata.json", metadata)
    assert datasets.verify(tmp_path) == [f"{tmp_path}: episode 0 of 'train' has 12 steps, metadata.json says 13"]
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="SHA256SUMS: no checksums to read"):
        datasets.verify(tmp_path)


def test_statistics_are_those_of_the_files(folder, tmp_path):
    convert.convert(folder, tmp_path)
    found = json_files.read(tmp_path / "statistics.json", "")["train"]
    files = [np.load(path) for path in sorted((folder / "training").glob("episode_*.npz"))]
    robot_obs = np.stack([file["robot_obs"] for file in files])
    rows = Rotation.from_euler("xyz", robot_obs[:, 3:6]).as_matrix()[:, :2].reshape(-1, 6)
    expected = {
        "robot_obs": robot_obs,
        "robot_obs_rot6d": np.concatenate([robot_obs[:, :3], rows, robot_obs[:, 6:]], axis=1),
        "scene_obs": np.stack([file["scene_obs"] for file in files]),
        "action": np.stack([file["rel_actions"] for file in files]),
    }
    assert found.pop("frames") == 18 and set(found) == set(expected)
    for key, values in expected.items():
        for name, moment in found[key].items():
            np.testing.assert_allclose(moment, getattr(np, name)(values, axis=0), atol=1e-6, err_msg=f"{key} {name}")
    (tmp_path / statistics.FILE).unlink()  # as when killed between the dataset and them
    convert.convert(folder, tmp_path)
    assert json_files.read(tmp_path / statistics.FILE, "")["train"]["frames"] == 18


@pytest.mark.parametrize(("first", "source"), [(500, b"calvin_scene_B"), (104, b"calvin")])
def test_scenes_of_training_hold_for_validation_unless_the_numbers_clash(tmp_path, first, source):
    make_folder(tmp_path / "in" / "training", 100)
    make_folder(tmp_path / "in" / "validation", first, ranges=((0, 5),), annotations=())
    scenes = {"calvin_scene_C": [100, 111], "calvin_scene_B": [112, 600]}
    save_pickled(tmp_path / "in" / "training" / "scene_info.npy", scenes)
    convert.convert(tmp_path / "in", tmp_path / "out")
    builder = tfds.builder_from_directory(tmp_path / "out")
    sources = [e["episode_metadata"]["source"] for s in ("train", "validation") for e in builder.as_data_source(s)]
    assert sources == [b"calvin_scene_C", b"calvin_scene_B", source]


def test_repeated_annotations_count_once_and_another_language_folder_is_named(tmp_path):
    spans = ((3, 8, "open_drawer"), (3, 8, "open_drawer"), (13, 18, "push_into_drawer"))
    make_folder(tmp_path / "training", 100, annotations=spans)
    read, faults = npz_folder.read_folder(tmp_path / "training")
    assert faults == []
    assert [(a.start, a.end, a.task) for a in read.annotations] == [(103, 108, "open_drawer"), (113, 118, spans[2][2])]
    (tmp_path / "training" / "lang_annotations").rename(tmp_path / "training" / "lang_BERT")
    _, faults = npz_folder.read_folder(tmp_path / "training")
    assert len(faults) == 1 and "missing; --language_folder can be one of lang_BERT" in faults[0]
    again, faults = npz_folder.read_folder(tmp_path / "training", "lang_BERT")
    assert (again, faults) == (read, [])


def test_the_oracle_keeps_to_numpy():
    """JAX would compile it for each length of annotation, and keep every program."""
    scenes = np.zeros((9, specs.SCENE_OBS_DIM))
    scenes[5:, specs.DRAWER] = 0.13
    solved = specs.task_success(specs.task_index("open_drawer"), scenes[0], scenes)
    assert isinstance(solved, np.ndarray) and solved.tolist() == [False] * 5 + [True] * 4
    traced = jax.jit(specs.task_success)(specs.task_index("open_drawer"), scenes[0], scenes)
    assert isinstance(traced, jax.Array) and traced.tolist() == solved.tolist()
