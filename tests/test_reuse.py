"""A run takes over from another what its config would make just the same, and nothing else."""

import json
import os
from unittest import mock

import helpers
import pytest

from experiments import collect_playtable, finetune_policy, reuse, train_reward
from wam_jax import json_files, metrics, rlds, shards, tables

TASK = "open_drawer"
TASKS = (TASK, "close_drawer")
DATA = {"data/playtable_play", "data/playtable_demonstrations"}
PPO = {f"ppo/{TASK}", "ppo/trust.json"}
REWARD = {f"reward/{TASK}", "reward/quality.json", "reward/disagreement.json"}
LATER = {"prior_ensemble", f"policy/{TASK}", *REWARD, *PPO}
EVALUATION = {"evaluation/bc.json", "evaluation/bc.episodes.json"}


def make_config(**changes):
    config = helpers.make_config()
    config.tasks = (TASK,)
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def source(tmp_path):
    """A run with a file in each of its parts."""
    folder = tmp_path / "source"
    for name in (
        *DATA,
        "world_model",
        "prior_ensemble",
        f"policy/{TASK}",
        f"reward/{TASK}",
        f"ppo/{TASK}",
        "ppo/close_drawer",
    ):
        (folder / name / "4").mkdir(parents=True)
        (folder / name / "4" / "file").write_text(name)
    (folder / "evaluation").mkdir()
    json_files.write(folder / "ppo/trust.json", {task: {"trusted": True} for task in TASKS})
    json_files.write(folder / "reward/quality.json", {task: {"train": {}} for task in TASKS})
    json_files.write(folder / "reward/disagreement.json", dict.fromkeys(TASKS, 1.5))
    fixed = dict(environment="playtable", method="wam", stage="bc", imagined_success=0.5, seed=0)
    rows = [tables.make_row(task=task, successes=1, episodes=2, **fixed) for task in TASKS]
    tables.save(str(folder / "evaluation/bc.json"), rows)
    episodes = [tables.Episode(task, number, bool(number), 12) for number in range(2) for task in TASKS]
    tables.save(str(folder / "evaluation/bc.episodes.json"), episodes)
    plan = folder / "data/playtable_demonstrations/plan.json"
    plan.write_text(json.dumps({"tasks": [TASK]}))
    (folder / "config.json").write_text(make_config().to_json_best_effort())
    rows = [{"stage": stage, "step": 4, "loss": 0.5} for stage in ("world_model", f"ppo/{TASK}")]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {*DATA, "world_model", *LATER, *EVALUATION}),
        ({"ppo.save_every": 3, "num_devices": 2}, {*DATA, "world_model", *LATER, *EVALUATION}),
        ({"ppo.epochs": 7}, {*DATA, "world_model", *LATER, *EVALUATION} - PPO),
        ({"reward.threshold": 0.7}, {*DATA, "world_model", "prior_ensemble", f"policy/{TASK}"}),
        ({"prior_ensemble.num_members": 2}, {*DATA, "world_model", f"policy/{TASK}"}),
        ({"policy.learning_rate": 0.1}, {*DATA, "world_model", "prior_ensemble", *REWARD}),
        ({"evaluation.max_steps": 24}, {*DATA, "world_model", *LATER} - PPO),
        ({"dataset.demonstrations_per_task": 8}, {"data/playtable_play", "world_model", "prior_ensemble"}),
        ({"world_model.kl_weight": 0.3}, DATA),
        ({"dataset.play_steps": 100}, {"data/playtable_demonstrations"}),
        ({"dataset.disturbed_share": 0.1}, {"data/playtable_demonstrations"}),
        ({"ppo.max_steps": 24}, {*DATA, "world_model", *LATER, *EVALUATION} - PPO),
        ({"seed": 1}, set()),
        ({"tasks": ("turn_on_led",)}, {"data/playtable_play", "world_model", "prior_ensemble"}),
    ],
)
def test_what_depends_on_a_change_is_made_anew(source, tmp_path, changes, expected):
    workdir = tmp_path / "run"
    assert set(reuse.take_over(make_config(**changes), str(workdir), str(source))) == expected
    for name in expected:
        assert os.path.exists(workdir / name)
    if not expected:
        return
    assert json_files.read(str(workdir / "reused.json"), "") == dict.fromkeys(expected, str(source))
    for stage in ("world_model", f"ppo/{TASK}"):
        assert bool(metrics.read(str(workdir), stage)) == (stage in expected)


@pytest.mark.parametrize("tasks", [TASKS, TASKS[1:], (TASK, "turn_on_led")])
def test_rows_of_the_tasks_of_the_config_are_taken_over_and_no_others(source, tmp_path, tasks):
    workdir, expected = str(tmp_path / "run"), [task for task in TASKS if task in tasks]
    reuse.take_over(make_config(tasks=tasks), workdir, str(source))
    rows, before = (tables.load(f"{folder}/evaluation/bc.json") for folder in (workdir, source))
    assert rows == [row for row in before if row.task in tasks] and [row.task for row in rows] == expected
    episodes = tables.load_episodes(f"{workdir}/evaluation/bc.episodes.json")
    assert [(e.task, e.number) for e in episodes] == [(task, number) for number in range(2) for task in expected]
    assert list(train_reward.read_quality(workdir)) == list(finetune_policy.read_trust(workdir)) == expected
    assert list(train_reward.read_limits(workdir)) == expected


def collect(config, workdir):
    """Collects into a workdir; returns the tasks that were demonstrated for it."""
    shown = []

    def demonstrations(seed, task, count):
        shown.append(task)
        for number in range(count):
            yield rlds.Episode(helpers.make_steps(seed + number, (9,)), source="test", episode_id=f"{task}-{number}")

    def play(rng, size, steps, name):
        for number in range(size):
            yield rlds.Episode(helpers.make_steps(number, (9,)), source="test", episode_id=f"{name}-{number}")

    with (
        mock.patch.object(collect_playtable, "_demonstrations", demonstrations),
        mock.patch.object(collect_playtable, "_play_episodes", play),
    ):
        collect_playtable.run(config, str(workdir))
    return shown


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (TASKS, []),
        (TASKS[::-1], []),
        (TASKS[1:], []),  # of more tasks than are needed
        ((*TASKS, "turn_on_led"), [*TASKS, "turn_on_led"]),  # of fewer: collected anew
    ],
)
def test_collection_goes_on_with_demonstrations_that_were_taken_over(tmp_path, tasks, expected):
    first, second = (make_config(**{"tasks": t, "dataset.demonstrations_per_task": 2}) for t in (TASKS, tasks))
    collect(first, tmp_path / "first")
    (tmp_path / "first/config.json").write_text(first.to_json_best_effort())
    taken = reuse.take_over(second, str(tmp_path / "second"), str(tmp_path / "first"))
    assert ("data/playtable_demonstrations" in taken) == (not expected) and "data/playtable_play" in taken
    assert collect(second, tmp_path / "second") == expected
    assert collect(second, tmp_path / "second") == []


def test_demonstrations_under_way_serve_the_same_tasks_alone(tmp_path):
    first = make_config(tasks=TASKS)
    collect(first, tmp_path / "first")
    (tmp_path / "first/config.json").write_text(first.to_json_best_effort())
    (tmp_path / "first/data/playtable_demonstrations" / shards.INFO_FILE).unlink()
    for tasks in (TASKS, TASKS[1:]):
        workdir = tmp_path / str(len(tasks))
        taken = reuse.take_over(make_config(tasks=tasks), str(workdir), str(tmp_path / "first"))
        assert ("data/playtable_demonstrations" in taken) == (tasks == TASKS)
        collect(make_config(tasks=tasks), workdir)


def test_what_the_run_has_already_stays(source, tmp_path):
    own = tmp_path / "run" / "world_model" / "2"
    own.mkdir(parents=True)
    taken = reuse.take_over(make_config(), str(tmp_path / "run"), str(source))
    assert "world_model" not in taken and f"policy/{TASK}" in taken
    assert os.listdir(own.parent) == ["2"]
    assert reuse.take_over(make_config(), str(tmp_path / "run"), str(source)) == []


def test_saves_under_way_are_left_behind(source, tmp_path):
    (source / "world_model" / "6.orbax-checkpoint-tmp").mkdir()
    reuse.take_over(make_config(), str(tmp_path / "run"), str(source))
    assert os.listdir(tmp_path / "run" / "world_model") == ["4"]


def test_an_option_that_came_after_the_other_run_counts_at_its_default(source, tmp_path):
    old = json.loads((source / "config.json").read_text())
    del old["ppo"]["starts"], old["world_model"]["soft_prior"]
    (source / "config.json").write_text(json.dumps(old))
    same = make_config(**{"world_model.soft_prior": False})
    assert "world_model" in reuse.take_over(same, str(tmp_path / "same"), str(source))
    other = make_config(**{"world_model.soft_prior": True})
    assert "world_model" not in reuse.take_over(other, str(tmp_path / "other"), str(source))


def test_a_source_that_is_no_run_is_named(source, tmp_path):
    with pytest.raises(ValueError, match="--reuse=.*nowhere holds no run .*config.json.*; name the workdir of one"):
        reuse.take_over(make_config(), str(tmp_path / "run"), str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is this run's own workdir; name another run's"):
        reuse.take_over(make_config(), str(source), str(source))
