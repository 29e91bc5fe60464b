"""A two-step smoke run of every binary, through its command line."""

import dataclasses
import json
import time

import helpers
import pytest
import smoke_config
from PIL import Image

from wam_jax import metrics, tables

CONFIG = smoke_config.get_config()
STAGES = ["world_model", *(f"{stage}/{task}" for stage in ("policy", "reward", "ppo") for task in CONFIG.tasks)]
SINGLE = {
    "collect_playtable": (),
    "train_world_model": (),
    "train_policy": (),
    "train_reward": (),
    "finetune_policy": (),
    "evaluate": ("--policy=bc",),
}


def run(binary, workdir, *arguments, optimized=False):
    """Runs a binary to its good end; returns what it printed, and its seconds."""
    started = time.monotonic()
    done = helpers.run_python(
        "-m", f"experiments.{binary}", "--config=tests/smoke_config.py", f"--workdir={workdir}", *arguments,
        timeout=1200, JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS=str(not optimized),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout, time.monotonic() - started


def files(workdir):
    """Every file that a finished stage should leave alone, with its time of change."""
    kept = [path for stage in STAGES for path in (workdir / stage).rglob("*") if path.is_file()]
    kept += [
        *(workdir / "data").rglob("*.array_record*"),
        workdir / "metrics.jsonl",
        workdir / "rollout.gif",
        *(workdir / "evaluation").iterdir(),
    ]
    return {str(path.relative_to(workdir)): path.stat().st_mtime_ns for path in kept}


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("smoke") / "run"
    run("collect_playtable", workdir, optimized=True)  # the one stage that computes longer than it compiles
    return workdir, *run("reproduce", workdir)


def test_reproduce_goes_through_every_stage(reproduced):
    workdir, printed, _ = reproduced
    assert [line for line in printed.splitlines() if line.startswith("[")][-1].startswith("[8/8]")
    for name in ("table.md", "table.json", "config.json", "stages.json", "metrics.jsonl", "rollout.gif"):
        assert (workdir / name).stat().st_size > 0, name
    assert (workdir / "table.md").read_text() in printed


def test_every_stage_leaves_checkpoints_and_metrics(reproduced):
    workdir, *_ = reproduced
    for stage in STAGES:
        assert sorted(path.name for path in (workdir / stage).iterdir() if path.name.isdigit()) == ["1", "2"], stage
        assert [row["step"] for row in metrics.read(str(workdir), stage)] == [1, 2]
        assert list((workdir / "tensorboard" / stage).iterdir())
    with open(workdir / "reward" / "quality.json") as file:
        quality = json.load(file)
    assert set(quality) == set(CONFIG.tasks)
    assert all(set(q["train"]) == {"precision", "recall", "accuracy", "success_share"} for q in quality.values())


def test_the_table_has_a_row_for_each_task_and_stage(reproduced):
    workdir, *_ = reproduced
    rows = tables.load(str(workdir / "table.json"))
    assert [(row.task, row.stage) for row in rows] == [(task, s) for s in ("bc", "ppo") for task in CONFIG.tasks]
    for row in rows:
        assert (row.environment, row.method, row.seed) == ("playtable", "wam", 0)
        assert (row.episodes, row.success) == (1, row.successes)
        assert 0 <= row.imagined_success <= 1
        assert (row.low, row.high) == tables.wilson(row.successes, 1)
    assert (workdir / "table.md").read_text() == tables.markdown(rows)


def test_the_film_shows_a_whole_episode(reproduced):
    with Image.open(reproduced[0] / "rollout.gif") as film:
        assert film.n_frames > 1
        assert film.size[0] == film.size[1] - 22 == 2 * 3 * 64


def test_a_second_run_does_no_work(reproduced):
    workdir, printed, seconds = reproduced
    before, table = files(workdir), (workdir / "table.json").read_bytes()
    printed_again, seconds_again = run("reproduce", workdir)
    assert (workdir / "table.json").read_bytes() == table
    assert files(workdir) == before
    assert printed_again == printed
    assert seconds_again < seconds


@pytest.mark.parametrize("binary", SINGLE)
def test_single_binaries_run_in_the_same_workdir(reproduced, binary):
    workdir, *_ = reproduced
    before = files(workdir)
    run(binary, workdir, *SINGLE[binary])
    assert files(workdir) == before


def test_the_expert_is_evaluated_beside_the_others(reproduced, tmp_path):
    workdir, *_ = reproduced
    printed, _ = run("evaluate", workdir, "--policy=expert")
    rows = tables.load(str(workdir / "table.json"))
    experts = [row for row in rows if row.stage == "expert"]
    assert [row.task for row in experts] == list(CONFIG.tasks)
    assert {(row.method, row.imagined_success) for row in experts} == {("-", None)}
    assert "playtable: expert" in printed
    others = [row for row in rows if row.stage != "expert"]
    assert [(row.task, row.stage) for row in others] == [(task, s) for s in ("bc", "ppo") for task in CONFIG.tasks]


def test_a_table_of_several_runs(reproduced, tmp_path):
    workdir, *_ = reproduced
    rows = [row for row in tables.load(str(workdir / "table.json")) if row.stage != "expert"]
    tables.save(str(tmp_path / "table.json"), [dataclasses.replace(row, method="dreamer_v2") for row in rows])
    done = helpers.run_python("-m", "experiments.print_table", str(workdir), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "playtable: wam ppo" in done.stdout and "playtable: dreamer_v2 ppo" in done.stdout
    assert "| open drawer |" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"), [((), "name at least one workdir"), (("nowhere",), "no table nowhere")]
)
def test_print_table_names_what_is_missing(arguments, message):
    done = helpers.run_python("-m", "experiments.print_table", *arguments)
    assert done.returncode != 0
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1
