"""A two-step smoke run of every binary, through its command line."""

import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import helpers
import pytest
import smoke_config
from PIL import Image

from wam_jax import intervals, metrics, specs, tables

CONFIG = smoke_config.get_config()
STAGES = [
    "world_model",
    "prior_ensemble",
    *(f"{stage}/{task}" for stage in ("policy", "reward", "ppo") for task in CONFIG.tasks),
]
SINGLE = (  # in order; where a folder is named, nothing may change it afterwards
    ("collect_playtable", (), "data"),
    ("train_world_model", (), "world_model"),
    ("train_policy", (), "policy"),
    ("train_reward", (), "reward"),
    ("finetune_policy", (), "ppo"),
    ("evaluate", ("--policy=bc",), None),
    ("evaluate", ("--policy=ppo",), None),
)


class Chain(NamedTuple):
    """A workdir in which the single binaries have done their work, and then `reproduce` the rest."""

    workdir: Path
    frozen: dict[str, dict[str, str]]  # by folder: its files when its stage had finished
    worked: dict[str, int]  # the files before `reproduce`
    printed: str  # by `reproduce`


def run(binary, workdir, *arguments, **environment):
    """Runs a binary to its good end, with what it printed."""
    done = helpers.run_python(
        "-m", f"experiments.{binary}", "--config=tests/smoke_config.py", f"--workdir={workdir}", *arguments,
        timeout=1200, **{"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "True"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def files(workdir):
    """Every file that a finished stage should leave alone, with its time of change."""
    kept = [path for stage in STAGES for path in (workdir / stage).rglob("*") if path.is_file()]
    kept += [
        *(workdir / "data").rglob("*.array_record*"),
        workdir / "metrics.jsonl",
        *workdir.glob("rollout.gif"),
        *(workdir / "evaluation").iterdir(),
    ]
    return {str(path.relative_to(workdir)): path.stat().st_mtime_ns for path in kept}


def digests(folder):
    """The content of every file of a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    workdir, frozen = tmp_path_factory.mktemp("smoke") / "run", {}
    for binary, arguments, folder in SINGLE:
        computes = binary == "collect_playtable"  # longer than it compiles, unlike all others
        run(binary, workdir, *arguments, JAX_DISABLE_MOST_OPTIMIZATIONS=str(not computes))
        if folder:
            frozen[folder] = digests(workdir / folder)
    return Chain(workdir, frozen, files(workdir), run("reproduce", workdir).stdout)


@pytest.mark.parametrize("folder", [folder for *_, folder in SINGLE if folder])
def test_what_a_stage_has_finished_is_frozen(chain, folder):
    assert len(chain.frozen[folder]) > 1
    assert digests(chain.workdir / folder) == chain.frozen[folder]


def test_reproduce_films_and_prints_what_the_single_binaries_made(chain):
    workdir, printed = chain.workdir, chain.printed
    assert [line for line in printed.splitlines() if line.startswith("[")][-1].startswith("[8/8]")
    for name in ("table.md", "table.json", "config.json", "stages.json", "metrics.jsonl", "rollout.gif"):
        assert (workdir / name).stat().st_size > 0, name
    assert (workdir / "table.md").read_text() in printed
    after = files(workdir)
    assert set(after) - set(chain.worked) == {"rollout.gif"}
    assert {name: after[name] for name in chain.worked} == chain.worked


def test_every_stage_leaves_checkpoints_and_metrics(chain):
    workdir = chain.workdir
    for stage in STAGES:
        assert sorted(path.name for path in (workdir / stage).iterdir() if path.name.isdigit()) == ["1", "2"], stage
        assert [row["step"] for row in metrics.read(str(workdir), stage)] == [1, 2]
        assert list((workdir / "tensorboard" / stage).iterdir())
    with open(workdir / "reward" / "quality.json") as file:
        quality = json.load(file)
    assert set(quality) == set(CONFIG.tasks)
    assert all(set(q["train"]) == {"precision", "recall", "accuracy", "success_share"} for q in quality.values())


def test_the_table_has_a_row_for_each_task_and_stage(chain):
    workdir = chain.workdir
    rows = tables.load(str(workdir / "table.json"))
    assert [(row.task, row.stage) for row in rows] == [(task, s) for s in ("bc", "ppo") for task in CONFIG.tasks]
    for row in rows:
        assert (row.environment, row.method, row.seed) == ("playtable", "wam", 0)
        assert (row.episodes, row.success) == (1, row.successes)
        assert 0 <= row.imagined_success <= 1
        assert (row.low, row.high) == intervals.wilson(row.successes, 1)
    assert (workdir / "table.md").read_text() == tables.markdown(rows)


def test_the_film_shows_a_whole_episode(chain):
    with Image.open(chain.workdir / "rollout.gif") as film:
        assert film.n_frames > 1
        assert film.size[0] == film.size[1] - 22 == 2 * 3 * 64


def test_a_second_reproduce_does_no_work(chain):
    workdir = chain.workdir
    before, table = files(workdir), (workdir / "table.json").read_bytes()
    again = run("reproduce", workdir, JAX_LOG_COMPILES="True")
    assert again.stdout == chain.printed
    assert "Compiling jit" not in again.stderr
    assert (workdir / "table.json").read_bytes() == table
    assert files(workdir) == before


def test_baselines_are_config_values(chain, tmp_path):
    workdir, data = tmp_path / "run", chain.workdir / "data"
    values = {
        "dataset.play": data / "playtable_play",
        "dataset.demonstrations": data / "playtable_demonstrations",
        "tasks": "('turn_on_led',)",
        "world_model.proprioception_input": False,
        "world_model.scene_weight": 1,
        "reward.kind": "scene",
        "policy.kind": "gaussian",
    }
    changes = [f"--config.{key}={value}" for key, value in values.items()]
    printed = run("reproduce", workdir, *changes).stdout
    assert "there is nothing to train" in printed and not (workdir / "reward").exists()
    rows = tables.load(str(workdir / "table.json"))
    assert [(row.task, row.stage) for row in rows] == [("turn_on_led", "bc"), ("turn_on_led", "ppo")]
    assert all(0 <= row.imagined_success <= 1 for row in rows)
    only = run(
        "diagnose", workdir, *changes, *DIAGNOSE, "--num_episodes=2", "--num_windows=4", "--only=classifier"
    ).stdout
    assert "| turn_on_led/ppo 2 |" in only


def test_the_expert_is_evaluated_beside_the_others(chain):
    workdir = chain.workdir
    printed = run("evaluate", workdir, "--policy=expert").stdout
    rows = tables.load(str(workdir / "table.json"))
    experts = [row for row in rows if row.stage == "expert"]
    assert [row.task for row in experts] == list(CONFIG.tasks)
    assert {(row.method, row.imagined_success) for row in experts} == {("-", None)}
    assert "playtable: expert" in printed
    others = [row for row in rows if row.stage != "expert"]
    assert [(row.task, row.stage) for row in others] == [(task, s) for s in ("bc", "ppo") for task in CONFIG.tasks]


DIAGNOSE = ("--tasks=turn_on_led", "--shares=0.5", "--contexts=1,2", "--horizons=1,4", "--train_windows=8")


def test_a_run_is_diagnosed_part_by_part(chain, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(chain.workdir, folder, ignore=shutil.ignore_patterns("reward", "tensorboard"))
    half = run("diagnose", folder, *DIAGNOSE, "--num_episodes=3", "--num_windows=4").stdout
    assert re.findall(r"^Not measured: (\w+) \(.*train_reward", half, re.MULTILINE) == [
        "trust", "calibration", "classifier", "divergence"
    ]  # fmt: skip
    shutil.copytree(chain.workdir / "reward", folder / "reward")
    open_loop = (folder / "diagnose/open_loop.json").read_bytes()
    printed = run("diagnose", folder, *DIAGNOSE, "--num_episodes=3", "--num_windows=4").stdout
    assert (folder / "diagnose/open_loop.json").read_bytes() == open_loop
    assert (folder / "diagnose/summary.md").read_text() in printed and "Not measured" not in printed
    units = {}
    for part in ("trust", "calibration", "classifier", "open_loop", "divergence"):
        with open(folder / f"diagnose/{part}.json") as file:
            units[part] = json.load(file, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["units"]
        with Image.open(folder / f"diagnose/{part}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    assert units["trust"]["turn_on_led"]["demonstrations"]["successes"] == 2
    names = ["bc", "ppo 2", "ppo 2 x 0.5"]  # the first iteration only warms the critic up
    assert list(units["calibration"]) == [f"turn_on_led/{name}" for name in names]
    assert list(units["open_loop"]) == ["probes", *(f"context {c}, {k}" for c in (1, 2) for k in ("soft", "sampled"))]
    assert len(units["open_loop"]["context 1, soft"]["hand"]["rmse"]) == 2
    assert list(units["classifier"]) == list(units["divergence"]) == ["turn_on_led/bc", "turn_on_led/ppo 2"]
    for name, unit in units["divergence"].items():  # of the same episodes
        assert unit["real"] == units["calibration"][name]["real"]
        assert unit["rule_on_real_frames"] == units["classifier"][name]["rule"]["fires"]


def test_a_table_of_several_runs(chain, tmp_path):
    workdir = chain.workdir
    rows = [row for row in tables.load(str(workdir / "table.json")) if row.stage != "expert"]
    tables.save(str(tmp_path / "table.json"), [dataclasses.replace(row, method="dreamer_v2") for row in rows])
    done = helpers.run_python("-m", "experiments.print_table", str(workdir), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "playtable: wam ppo" in done.stdout and "playtable: dreamer_v2 ppo" in done.stdout
    assert "| open drawer |" in done.stdout


def test_predictions_are_measured_and_printed(chain):
    workdir = chain.workdir
    measured = run("evaluate_prediction", workdir).stdout
    assert "| PSNR, dB (up) | both |" in measured
    assert {path.name for path in workdir.glob("prediction*")} == {
        "prediction.json", "prediction.png", "prediction_horizon.png",
    }  # fmt: skip
    done = helpers.run_python("-m", "experiments.print_table", "--table=prediction", str(workdir))
    assert (done.stdout, done.returncode) == (measured, 0)


def test_print_architecture_sets_configs_side_by_side():
    configs = [f"tests/smoke_config.py{method}" for method in ("", ":dreamer_v2")]
    done = helpers.run_python("-m", "experiments.print_architecture", *configs, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    assert f"| {' | '.join(configs)} | paper | public code, counted |" in done.stdout
    assert "| inverse dynamics | " in done.stdout
    assert "| prior ensemble | 1,152 | 1,152 | none |" in done.stdout  # 2 x (16 x 16 + 16, LayerNorm 32, 16 x 16 + 16)


@pytest.mark.parametrize(
    ("arguments", "message"), [((), "name at least one workdir"), (("nowhere",), "no table nowhere")]
)
def test_print_table_names_what_is_missing(arguments, message):
    done = helpers.run_python("-m", "experiments.print_table", *arguments)
    assert done.returncode != 0
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_plot_curves_draws_the_runs(chain, tmp_path):
    path = tmp_path / "curves.png"
    done = helpers.run_python("-m", "experiments.plot_curves", f"--workdir={chain.workdir}", f"--output={path}")
    assert done.returncode == 0, done.stderr
    with Image.open(path) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.parametrize("name", ["environment_success", "imagined_success"])
def test_plot_curves_shows_where_ppos_rollouts_succeeded(name):
    probe = f"from experiments import plot_curves; print(plot_curves.success([{{'step': 1, '{name}': 0.5}}]))"
    assert helpers.run_python("-c", probe).stdout.strip() == name


def test_plot_curves_names_mistakes(tmp_path):
    done = helpers.run_python("-m", "experiments.plot_curves", f"--workdir={tmp_path}", f"--output={tmp_path}")
    assert done.stderr.startswith(f"error: --output={tmp_path} ends in none of .png")
    done = helpers.run_python("-m", "experiments.plot_curves", f"--workdir={tmp_path},")
    assert done.stderr == f"error: --workdir={tmp_path},: name each run, with single commas\n"
    done = helpers.run_python("-m", "experiments.plot_curves", f"--workdir={tmp_path}")
    assert done.returncode != 0
    assert done.stderr == f"error: {tmp_path}/metrics.jsonl has no rows of the world model; train it first\n"


def test_measure_playtable_writes_its_figures_and_every_expert(tmp_path):
    flags = (f"--output={tmp_path}", "--num_environments=1", "--num_episodes=1")
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "True"}
    done = helpers.run_python("-m", "experiments.measure_playtable", *flags, **quick)
    assert done.returncode == 0, done.stderr[-4000:]
    with open(tmp_path / "environment.json") as file:
        figures = json.load(file)
    assert figures["environments"] == 1
    assert min(figures["frames_per_second"]["wall"], figures["control_steps_per_second"]["wall"]) > 0
    rows = tables.load(str(tmp_path / "experts.json"))
    assert [(row.task, row.stage, row.episodes) for row in rows] == [(task, "expert", 1) for task in specs.TASKS]
