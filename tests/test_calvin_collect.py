"""Play and demonstrations recorded in CALVIN's simulator: what they hold, and that a killed collection goes on."""

import json
import os
import shutil
import subprocess
import sys
import time

import helpers
import numpy as np
import pytest
import tensorflow_datasets as tfds
from calvin_files import ASSETS, SHARED, needs_simulator
from ml_collections import FrozenConfigDict

from data.calvin import conversion, convert, export, pickled_npy
from experiments import collect_calvin, config_checks, launch
from experiments.configs import calvin_d_scripted
from wam_jax import datasets, json_files, rlds, shards, specs
from wam_jax.environments.calvin import play
from wam_jax.environments.calvin.pool import Pool
from wam_jax.environments.calvin.simulator import Simulator
from wam_jax.environments.calvin.worker import Settings

CONFIG = "experiments/configs/calvin_d_scripted.py"
SIZES = {
    "dataset.play_episodes": 5,
    "dataset.validation_episodes": 1,
    "dataset.play_steps": 6,
    "dataset.demonstrations_per_task": 1,
    "tasks": ("turn_on_led", "turn_off_led"),
    "world_model.window_length": 4,
    "world_model.open_loop_steps": 4,
}


class Blind(Pool):
    """A pool that draws no pictures: twenty times as fast."""

    def __init__(self):
        super().__init__(Settings(str(ASSETS), pictures=False), num_workers=1)

    def look(self, episodes, render):
        return super().look(episodes, [False] * len(render))

    def step(self, episodes, actions, render):
        return super().step(episodes, actions, [False] * len(render))


@pytest.fixture(scope="module")
def blind():
    pool = Blind()
    yield pool
    pool.close()


# --- What is recorded ---


@needs_simulator
def test_play_succeeds_and_fails_at_every_turn(blind):
    track = play.record_play(blind, 1200, (0, 0), disturbed_share=0.6)
    annotations = [rlds.Annotation(a.start, a.end, a.task, "") for a in track.attempts]
    _, reward = rlds.tasks_and_rewards(annotations, track.scene_obs[:-1])
    solved = [(a.task, reward[a.start : a.end].max() > 0) for a in track.attempts]
    assert 0.25 < np.mean([success for _, success in solved]) < 0.8
    assert len({task for task, _ in solved}) >= 6
    assert min(len({task for task, success in solved if success == kind}) for kind in (True, False)) >= 3
    assert all(a.end <= b.start for a, b in zip(track.attempts, track.attempts[1:], strict=False))
    assert 0.2 < 1 - sum(a.end - a.start for a in track.attempts) / 1200 < 0.7  # free motion
    assert np.abs(track.actions[:, :6]).max() <= 1 and set(track.actions[:, 6]) == {-1, 1}
    assert np.abs(track.robot_obs[:, :3]).max() < 1  # an arm that was jammed for good would have run away


@needs_simulator
@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.75, 1.0), (1.0, 0.0, 0.5)])
def test_disturbed_attempts_are_those_that_fail(blind, share, low, high):
    track = play.record_play(blind, 1200, (0, 0), disturbed_share=share)
    annotations = [rlds.Annotation(a.start, a.end, a.task, "") for a in track.attempts]
    reward = rlds.tasks_and_rewards(annotations, track.scene_obs[:-1])[1]
    assert low <= np.mean([reward[a.start : a.end].max() > 0 for a in track.attempts]) <= high


@needs_simulator
def test_play_repeats_for_the_same_seed_and_for_no_other(blind):
    first, same, other = (play.record_play(blind, 30, seed, disturbed_share=0.6) for seed in ((3, 1), (3, 1), (3, 2)))
    np.testing.assert_array_equal(first.robot_obs, same.robot_obs)
    np.testing.assert_array_equal(first.actions, same.actions)
    assert (first.robot_obs[0, :3] != other.robot_obs[0, :3]).all()


@needs_simulator
@pytest.mark.parametrize("task", ["open_drawer", "turn_on_led"])
def test_demonstrations_end_after_their_success(blind, task):
    track = play.record_demonstration(blind, task, specs.MAX_EPISODE_STEPS, (5,))
    length = len(track.actions)
    assert track.attempts == (play.Attempt(task, 0, length),)
    solved = specs.task_success(specs.task_index(task), track.scene_obs[0], track.scene_obs[:-1])
    assert int(np.argmax(solved)) == length - 1 - play.STEPS_AFTER_SUCCESS > 0
    assert len(track.robot_obs) == length + 1


@needs_simulator
def test_an_expert_that_fails_gives_no_demonstration(blind):
    assert play.record_demonstration(blind, "open_drawer", 5, (5,)) is None


@pytest.mark.skipif(not (SHARED / "tiny").is_dir(), reason="needs the recorded CALVIN set")
def test_reached_actions_are_those_of_the_original_recorder():
    frames = [dict(np.load(path)) for path in sorted((SHARED / "tiny" / "training").glob("episode_*.npz"))]
    stacked = {key: np.stack([frame[key] for frame in frames]) for key in ("robot_obs", "actions", "rel_actions")}
    absolute, relative = play.reached_actions(stacked["robot_obs"])
    np.testing.assert_array_equal(absolute, stacked["actions"][:-1])
    np.testing.assert_allclose(relative, stacked["rel_actions"][:-1], atol=1e-9)


# --- The binary ---


def config(**changes):
    changed = calvin_d_scripted.get_config()
    changed.update_from_flattened_dict(SIZES | changes)
    return FrozenConfigDict(changed)


def collect(workdir, settings=None, **recorder):
    recorder = collect_calvin.Recorder(**{"assets": str(ASSETS), "num_workers": 2} | recorder)
    settings = settings or config()
    for key, function in (
        ("play", collect_calvin.collect_play),
        ("demonstrations", collect_calvin.collect_demonstrations),
    ):
        function(launch.collected_directory(settings, str(workdir), key), settings, recorder)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A collection that nothing disturbed; not to be changed."""
    workdir = tmp_path_factory.mktemp("collected")
    collect(workdir)
    return workdir


def written_shards(workdir):
    return {str(path.relative_to(workdir)): path for path in sorted(workdir.rglob("*.array_record-*"))}


@needs_simulator
def test_what_is_written_can_be_trained_on(workdir):
    settings = config()
    directory = launch.play_directory(settings, str(workdir))  # without config.dataset.play
    assert directory.endswith("data/calvin_play")
    train, validation = (datasets.read_episodes(directory, split) for split in ("train", "validation"))
    assert [len(steps.is_first) for steps in train] == [6] * 5 and len(validation) == 1
    for steps in train:
        assert steps.observation.rgb_static.reshape(6, -1).std(axis=1).min() > 20  # every frame is drawn
        assert (steps.observation.rgb_gripper[1:] != steps.observation.rgb_gripper[:-1]).any(axis=(1, 2, 3)).all()
        moved = steps.observation.robot_obs[1:, :3] - steps.observation.robot_obs[:-1, :3]
        np.testing.assert_allclose(steps.action[:-1, :3] * specs.POSITION_SCALE, np.clip(moved, -0.02, 0.02), atol=1e-6)
    demonstrations = launch.demonstration_directory(settings, str(workdir))
    assert datasets.episode_tasks(demonstrations) == [specs.task_index(task) for task in SIZES["tasks"]]
    assert all(steps.reward[-7] == 1 and steps.reward[-8] == 0 for steps in datasets.read_episodes(demonstrations))
    assert datasets.count_attempts(demonstrations, "train")["turn_on_led"] == {"attempts": 1, "solved": 1}


@needs_simulator
def test_the_cost_is_noted(workdir):
    with open(workdir / "data" / "calvin_play" / "collection.json") as file:
        notes = json.load(file)
    assert notes["frames"] == {"train": 30, "validation": 6} and notes["this_run"]["frames"] == 36
    seconds = notes["this_run"]["cpu_seconds"]
    assert min(seconds.values()) > 0
    assert notes["this_run"]["frames_per_cpu_second"] == pytest.approx(36 / sum(seconds.values()), rel=0.1)
    assert notes["simulator"]["renderer"] == "TinyRenderer"


@needs_simulator
def test_a_finished_dataset_is_left_alone_and_other_settings_are_refused(workdir):
    before = {name: path.stat().st_mtime_ns for name, path in written_shards(workdir).items()}
    collect(workdir, assets="no simulator is needed")
    collect(workdir, config(tasks=SIZES["tasks"][1:]), assets="demonstrations of more tasks serve")
    assert {name: path.stat().st_mtime_ns for name, path in written_shards(workdir).items()} == before
    with pytest.raises(ValueError, match="made with other settings .actions differ"):
        collect(workdir, actions="commanded")


@needs_simulator
def test_a_collection_is_kept_to_one_simulator(workdir, tmp_path):
    directory = tmp_path / "data" / "calvin_play"
    directory.mkdir(parents=True)
    facts = json_files.read(workdir / "data" / "calvin_play" / collect_calvin.SIMULATOR_FILE, "")
    json_files.write(directory / collect_calvin.SIMULATOR_FILE, facts | {"pybullet": "3.2.5"})
    with pytest.raises(ValueError, match="begun with another simulator .pybullet 3.2.5, now 3"):
        collect(tmp_path)


@needs_simulator
def test_notes_that_were_lost_with_the_process_are_written_again(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    notes = tmp_path / "data" / "calvin_play" / collect_calvin.NOTES_FILE
    before = json_files.read(notes, "")
    notes.unlink()
    collect(tmp_path)
    after = json_files.read(notes, "")
    assert after == {key: value for key, value in before.items() if key != "this_run"}


@needs_simulator
def test_pictures_that_a_policy_was_not_trained_on_are_refused(workdir):
    changed = calvin_d_scripted.get_config()
    changed.update_from_flattened_dict(SIZES | {"dataset.play": str(workdir / "data/calvin_play")})
    config_checks.check(changed)
    changed.dataset.pictures = "averaged"
    with pytest.raises(ValueError, match="holds pictures that are 'drawn', and config.dataset.pictures='averaged'"):
        config_checks.check(changed)


@needs_simulator
def test_a_killed_collection_goes_on_to_the_same_bytes(workdir, tmp_path, monkeypatch):
    flags = [f"--config.{key}={value}" for key, value in SIZES.items()]
    command = [sys.executable, "-m", "experiments.collect_calvin", f"--config={CONFIG}", *flags]
    options = [f"--workdir={tmp_path}", f"--calvin_assets={ASSETS}", "--calvin_workers=1"]
    process = subprocess.Popen([*command, *options], cwd=helpers.ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    parts = tmp_path / "data" / "calvin_play" / shards.PARTS_FOLDER
    while len(kept := [path for path in parts.glob("*") if path.suffix != ".tmp"]) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    before, written = shards.write_part, []
    monkeypatch.setattr(shards, "write_part", lambda *a: written.append(a) or before(*a))
    collect(tmp_path, num_workers=1)
    assert len(kept) + len(written) == 6 + 2  # play, and a demonstration of each task: no episode is recorded twice
    expected = {name: path.read_bytes() for name, path in written_shards(workdir).items()}
    assert {name: path.read_bytes() for name, path in written_shards(tmp_path).items()} == expected
    assert not parts.exists()


@needs_simulator
def test_an_interrupted_collection_ends_its_workers(tmp_path, monkeypatch):
    pools = []

    def interrupted(bar):
        raise KeyboardInterrupt

    monkeypatch.setattr(collect_calvin.tqdm, "update", interrupted)
    start = collect_calvin.Recorder.pools
    monkeypatch.setattr(
        collect_calvin.Recorder, "pools", lambda self, episodes: pools.extend(start(self, episodes)) or pools
    )
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path)
    for process in (process for pool in pools for process in pool.processes):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_cannot_be_collected_is_named(tmp_path):
    with pytest.raises(ValueError, match="config.environment='playtable'; expected 'calvin'"):
        collect_calvin.run(config(environment="playtable"), str(tmp_path))
    with pytest.raises(ValueError, match="no folder of CALVIN's assets given: --calvin_assets=DIR"):
        collect(tmp_path, assets="")
    with pytest.raises(ValueError, match="--calvin_workers=-1; expected 1 or more, or 0"):
        collect(tmp_path, num_workers=-1)
    assert not list(tmp_path.iterdir())


# --- CALVIN's own layout ---


def all_of(directory, split):
    """Every value of a split, by name."""
    episodes = tfds.builder_from_directory(directory).as_data_source(split)
    return [{**episode, "steps": list(episode["steps"])} for episode in episodes]


@needs_simulator
def test_the_npz_layout_converts_to_what_was_recorded(tmp_path):
    settings = config(**{"dataset.play_episodes": 1, "dataset.play_steps": 14, "seed": 12})  # an attempt begins early
    recorder = collect_calvin.Recorder(str(ASSETS), num_workers=1, pictures="full")
    collect_calvin.collect_play(str(tmp_path / "rlds"), settings, recorder)
    export.export(tmp_path / "rlds", tmp_path / "npz")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "npz").glob("*/episode_*.npz")}
    assert len(times) == 28
    lost = min(times)
    lost.unlink()
    export.export(tmp_path / "rlds", tmp_path / "npz")
    assert [path for path, before in times.items() if path.stat().st_mtime_ns != before] == [lost]
    convert.convert(tmp_path / "npz", tmp_path / "converted", conversion.Settings(image_size=0))
    for split in ("train", "validation"):
        helpers.assert_equal(all_of(tmp_path / "converted", split), all_of(tmp_path / "rlds", split))
    assert datasets.count_attempts(tmp_path / "converted", "train")["turn_off_led"]["attempts"] == 1
    averaged = collect_calvin.Recorder(str(ASSETS), num_workers=1, pictures="averaged")
    collect_calvin.collect_play(str(tmp_path / "averaged"), settings, averaged)
    convert.convert(tmp_path / "npz", tmp_path / "small")
    helpers.assert_equal(all_of(tmp_path / "small", "validation"), all_of(tmp_path / "averaged", "validation"))
    json_files.write(tmp_path / "npz" / "exported_from.json", {"checksums": ["of another dataset"]})
    with pytest.raises(ValueError, match="npz holds the frames of another dataset than"):
        export.export(tmp_path / "rlds", tmp_path / "npz")


@needs_simulator
def test_a_dataset_of_other_sizes_is_not_exported(workdir, tmp_path):
    with pytest.raises(ValueError, match=r"rgb_static is \(64, 64, 3\).*collect with --config.dataset.pictures=full"):
        export.export(workdir / "data" / "calvin_play", tmp_path)


def test_annotations_are_exported_with_their_frames(tmp_path):
    """An attempt that succeeds and one that fails, in the second of two episodes."""
    steps = helpers.make_steps(shape=(12,))
    big = {"rgb_static": np.zeros((12, 200, 200, 3), np.uint8), "rgb_gripper": np.zeros((12, 84, 84, 3), np.uint8)}
    steps = steps.replace(observation=steps.observation.replace(**big), reward=np.float32(np.arange(12) == 3))
    annotations = [rlds.Annotation(1, 5, "open_drawer", "open it"), rlds.Annotation(6, 12, "turn_on_led", "light it")]
    first, second = (
        rlds.Episode(steps, "calvin_scene_D", annotations=spans, extra={"action_absolute": np.ones((12, 7))})
        for spans in ((), annotations)
    )
    helpers.write_dataset(tmp_path / "rlds", "toy", {"train": [first, second]})
    export.export(tmp_path / "rlds", tmp_path / "npz")
    folder = tmp_path / "npz" / "training"
    everything, solved = (
        pickled_npy.load(folder / name / "auto_lang_ann.npy").item() for name in ("lang_annotations", "lang_solved")
    )
    assert everything["info"]["indx"] == [(13, 17), (18, 24)] and solved["info"]["indx"] == [(13, 17)]
    assert everything["language"]["task"] == ["open_drawer", "turn_on_led"] and solved["language"]["ann"] == ["open it"]
    assert everything["language"]["emb"].shape == (2, 1, 384)
    assert np.load(folder / "ep_start_end_ids.npy").tolist() == [[0, 11], [12, 23]]
    assert pickled_npy.load(folder / "scene_info.npy").item() == {"calvin_scene_D": [0, 23]}
    assert not (tmp_path / "npz" / "validation").exists()


# --- Faster pictures ---


@needs_simulator
def test_links_that_are_not_drawn_change_no_pixel():
    quick, plain = Simulator(str(ASSETS)), Simulator(str(ASSETS), draw_all=True)
    with np.load(SHARED / "eval_starts.npz") as starts:
        cases = [(starts[f"{task}_robot_obs"][3], starts[f"{task}_scene_obs"][3]) for task in specs.TASKS[::3]]
    for joints in (
        (0.3, -0.6, 0.2, -0.5, 0.4, 1.2, 0.3),
        (0.5, 0.3, -2.0, -0.6, 0, 1.5, 0.5),
        (1.5, 0, 0, 1.0, 0, 2, 0),
    ):
        back = cases[0][0].copy()
        back[7:14] += joints  # the arm is elsewhere, and the camera on the hand may look back at it
        cases.append((back, cases[0][1]))
    for case in cases:
        for simulator in (quick, plain):
            simulator.reset(*case)
        helpers.assert_equal(quick.render(64, 64), plain.render(64, 64))
    helpers.assert_equal(quick.render(200, 84), plain.render(200, 84))
    quick.close()
    plain.close()


@needs_simulator
def test_the_speed_of_both_ways_to_draw_is_measured(tmp_path):
    flags = f"--calvin_assets={ASSETS}", f"--output={tmp_path}", "--num_steps=3"
    done = helpers.run_python("-m", "experiments.measure_calvin", *flags)
    assert done.returncode == 0, done.stderr[-4000:]
    with open(tmp_path / "environment.json") as file:
        figures = json.load(file)
    assert figures["pictures"] == figures["identical_pictures"] == 2 * 3 * len(specs.TASKS)
    assert figures["frames_per_cpu_second"] > 1.2 * figures["frames_per_cpu_second_of_all_links"] > 0
