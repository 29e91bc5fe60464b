"""The binary that evaluates: batches that a killed run keeps, films, and what it refuses."""

import os
from unittest import mock

import helpers
import numpy as np
import pytest
from absl import flags
from calvin_files import ASSETS, SHARED, needs_simulator
from ml_collections import FrozenConfigDict
from PIL import Image

from experiments import evaluate, simulators
from wam_jax import environments, evaluation, json_files, specs, tables

quick_compilation = helpers.quick_compilation
TASKS = ("open_drawer", "close_drawer")  # of which the table's expert solves the first


class Killed(Exception):
    """Stands in for the end of the process."""


@pytest.fixture
def table(monkeypatch):
    table = helpers.Drawer()

    def make(config, pictures=True):
        table.pictures = pictures
        return table

    monkeypatch.setattr(simulators, "make", make)
    return table


@pytest.fixture
def played(monkeypatch):
    """The batches that are played: task and numbers; `kill_at` ends the process as that episode ends."""
    batches, rollout = [], evaluation.rollout

    def noted(environment, policy, task, rng, *, numbers, ended, **options):
        def keep(number, *outcome):
            if (task, number) == batches.kill_at:
                raise Killed
            ended(number, *outcome)

        batches.append((task, *numbers))
        return rollout(environment, policy, task, rng, numbers=numbers, ended=keep, **options)

    batches = type("Batches", (list,), {"kill_at": None})()
    monkeypatch.setattr(evaluation, "rollout", noted)
    return batches


def make_config(num_episodes=5, batch_size=2):
    config = helpers.make_config()
    config.tasks = TASKS
    config.evaluation.update(num_episodes=num_episodes, batch_size=batch_size, max_steps=4)
    return helpers.freeze(config)


def content(workdir):
    """Every file of a workdir."""
    return {str(path.relative_to(workdir)): path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_an_interrupted_evaluation_keeps_its_episodes_and_ends_as_an_undisturbed_one(table, played, tmp_path):
    rows = evaluate.run(make_config(), str(tmp_path / "whole"), "expert")
    assert [(row.task, row.successes, row.episodes) for row in rows] == [("open_drawer", 5, 5), ("close_drawer", 0, 5)]
    assert played == [(task, *numbers) for task in TASKS for numbers in ((0, 1), (2, 3), (4,))]
    played.clear()
    for killed in (("open_drawer", 3), ("close_drawer", 0)):
        played.kill_at = killed
        with pytest.raises(Killed):
            evaluate.run(make_config(), str(tmp_path / "broken"), "expert")
    played.kill_at = None
    evaluate.run(make_config(), str(tmp_path / "broken"), "expert")
    batches = [(0, 1), (2, 3), (3, 4)]  # 2 was kept
    assert played == [("open_drawer", *numbers) for numbers in batches] + [
        ("close_drawer", *numbers) for numbers in ((0, 1), (0, 1), (2, 3), (4,))
    ]
    assert content(tmp_path / "broken") == content(tmp_path / "whole")
    episodes = tables.load_episodes(str(tmp_path / "broken/evaluation/expert.episodes.json"))
    assert [(episode.task, episode.number) for episode in episodes] == [(task, n) for task in TASKS for n in range(5)]
    assert {(episode.success, episode.steps) for episode in episodes if episode.task == "open_drawer"} == {(True, 3)}


@pytest.mark.parametrize(
    ("seconds", "sizes"), [(float("inf"), [3, 6, 9, 12]), (-1, [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, 12])]
)
def test_episodes_that_end_together_are_written_once(table, monkeypatch, tmp_path, seconds, sizes):
    monkeypatch.setattr(evaluate, "_SAVE_EVERY", seconds)
    with mock.patch.object(tables, "save", wraps=tables.save) as save:
        evaluate.run(make_config(num_episodes=6, batch_size=3), str(tmp_path), "expert")
    saved = [len(call.args[1]) for call in save.call_args_list if call.args[0].endswith(".episodes.json")]
    assert saved == sizes  # where episodes end within a second, once a batch


def test_a_finished_evaluation_stays_until_a_longer_one_replaces_it(table, played, tmp_path):
    evaluate.run(make_config(num_episodes=2), str(tmp_path), "expert")
    played.clear()
    evaluate.run(make_config(num_episodes=2), str(tmp_path), "expert")
    assert played == []
    played.kill_at = ("close_drawer", 2)
    with pytest.raises(Killed):
        evaluate.run(make_config(num_episodes=4), str(tmp_path), "expert")
    kept = {row.task: row.episodes for row in tables.load(f"{tmp_path}/evaluation/expert.json")}
    assert kept == {"open_drawer": 4, "close_drawer": 2}
    assert played == [("open_drawer", 2, 3), ("close_drawer", 2, 3)]


def test_films_show_the_first_episodes_and_are_made_up_for(table, played, tmp_path):
    evaluate.run(make_config(), str(tmp_path), "expert")
    rows = (tmp_path / "table.json").read_bytes()
    played.clear()
    evaluate.run(make_config(), str(tmp_path), "expert", save_videos=3)
    assert played == [(task, *numbers) for task in TASKS for numbers in ((0, 1), (2,))]
    for task in TASKS:
        names = sorted(path.name for path in (tmp_path / "videos/expert" / task).iterdir())
        assert names == ["000.gif", "001.gif", "002.gif"]
    with Image.open(tmp_path / "videos/expert/open_drawer/002.gif") as film:
        assert film.n_frames > 1 and film.size == (2 * 3 * 64, 3 * 64 + 22)
    assert (tmp_path / "table.json").read_bytes() == rows
    played.clear()
    os.remove(tmp_path / "videos/expert/close_drawer/002.gif")
    evaluate.run(make_config(), str(tmp_path), "expert", save_videos=99)
    assert played == [("open_drawer", 3, 4), ("close_drawer", 2, 3), ("close_drawer", 4)]


def test_too_few_starts_are_an_error_before_an_episode_is_played(table, played, tmp_path):
    table.check_starts = mock.Mock(side_effect=ValueError("2 starts"))
    with pytest.raises(ValueError, match="2 starts"):
        evaluate.run(make_config(), str(tmp_path), "expert")
    table.check_starts.assert_called_once_with("open_drawer", 5)
    assert played == [] and content(tmp_path) == {}


def test_what_nobody_saw_makes_no_difference_to_a_result(table, played, tmp_path):
    table.facts = {"pybullet": "3", "pixels": "64 and 64"}
    evaluate.run(make_config(), str(tmp_path), "expert")
    table.facts = {"pybullet": "3", "pixels": "200 and 84"}
    played.clear()
    rows = evaluate.run(make_config(), str(tmp_path), "expert", save_videos=1)  # goes on from what is there
    assert {row.simulator for row in rows} == {"pybullet 3"}
    assert played == [(task, 0) for task in TASKS]


def test_results_of_other_starts_are_not_mixed(table, played, tmp_path):
    table.facts = {"pybullet": "3", "starts": "a.npz"}
    played.kill_at = ("open_drawer", 2)
    with pytest.raises(Killed):
        evaluate.run(make_config(), str(tmp_path), "expert")
    table.facts = {"pybullet": "3", "starts": "random"}
    with pytest.raises(
        ValueError, match="its results are of starts a.npz, not of starts random; use another --workdir"
    ):
        evaluate.run(make_config(), str(tmp_path), "expert")


def test_the_row_of_a_policy_that_ppo_left_alone_says_so(table, monkeypatch, tmp_path):
    values = make_config().to_dict()
    config = FrozenConfigDict({**values, "ppo": {**values["ppo"], "min_trust": 0.5}})
    monkeypatch.setattr(evaluate, "load", lambda *_: None)
    json_files.write(tmp_path / "ppo/trust.json", {TASKS[0]: {"trusted": True}})
    with pytest.raises(
        ValueError, match="ppo/trust.json has no verdict on close_drawer, .*min_trust=0.5; delete .*ppo"
    ):
        evaluate.run(config, str(tmp_path), "ppo")
    json_files.write(tmp_path / "ppo/trust.json", {TASKS[0]: {"trusted": True}, TASKS[1]: {"trusted": False}})
    for stage in ("bc", "ppo"):
        evaluate.run(config, str(tmp_path), stage)
    rows = tables.load(str(tmp_path / "table.json"))
    assert [(row.stage, row.untrained) for row in rows] == [("bc", 0), ("bc", 0), ("ppo", 0), ("ppo", 1)]


def test_flags_of_calvin_are_refused_for_another_environment(monkeypatch):
    for name in ("starts", "calvin_assets"):
        monkeypatch.setattr(flags.FLAGS[name], "present", 1)
    with pytest.raises(ValueError, match="--calvin_assets, --starts: for CALVIN only, and config.environment='playtab"):
        simulators.make(make_config())


@needs_simulator
def test_the_experts_binary_evaluates_and_films_in_calvin(tmp_path):
    done = helpers.run_python(
        *("-m", "experiments.evaluate", "--environment=calvin", "--policy=expert", f"--workdir={tmp_path}"),
        *(f"--calvin_assets={ASSETS}", f"--starts={SHARED / 'eval_starts.npz'}", "--save_videos=1"),
        *("--config=experiments/configs/calvin_d_scripted.py", "--config.tasks=('turn_off_led',)"),
        *("--config.evaluation.num_episodes=2", "--config.evaluation.max_steps=40"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (row,) = tables.load(str(tmp_path / "table.json"))
    assert (row.stage, row.task, row.successes, row.episodes) == ("expert", "turn_off_led", 2, 2)
    assert "starts " in row.simulator and "pixels" not in row.simulator
    with Image.open(tmp_path / "videos/expert/turn_off_led/000.gif") as film:
        assert film.n_frames > 20


@needs_simulator
def test_the_expert_is_evaluated_in_calvin_from_given_starts(monkeypatch, tmp_path):
    path = str(SHARED / "eval_starts.npz")
    calvin = environments.make("calvin", assets=str(ASSETS), starts_file=path, pictures=False, num_workers=2)
    monkeypatch.setattr(simulators, "make", lambda config, pictures: calvin)
    third = calvin.reset_to_task(None, np.array([specs.task_index("turn_off_led")]), np.array([2]))
    with np.load(path) as file:
        np.testing.assert_allclose(third.robot_obs[0, 7:14], file["turn_off_led_robot_obs"][2, 7:14], atol=1e-4)
    config = helpers.make_config()
    config.update(environment="calvin", tasks=("turn_off_led",))
    config.evaluation.update(num_episodes=30, batch_size=2, max_steps=40)
    with pytest.raises(
        ValueError,
        match="holds 29 starts of turn_off_led, fewer than the 30 .* --config.evaluation.num_episodes=29",
    ):
        evaluate.run(helpers.freeze(config), str(tmp_path), "expert")
    config.evaluation.num_episodes = 3
    (row,) = evaluate.run(helpers.freeze(config), str(tmp_path), "expert")
    calvin.close()
    assert (row.environment, row.task, row.episodes, row.successes) == ("calvin", "turn_off_led", 3, 3)
    assert "starts " in row.simulator and "renderer TinyRenderer" in row.simulator
