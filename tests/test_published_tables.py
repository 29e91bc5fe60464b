"""The tables under docs/results are what the command prints of the files beside them."""

import os
from pathlib import Path

import helpers
import pytest

from experiments import print_table

THREE_SEEDS = tuple(f"../{method}_{seed}" for method in ("dreamer_v2", "wam") for seed in (1, 2, 3))
BEST = ("wam_1", "wam_2", "wam_3")
# Of playtable_ensemble: four tasks, one thing changed.
LEVERS = ("limit_2", "mixture_2", "bc_weight_2", "undisturbed_2", "horizon_2", "longer_2", "vision_2")
ENSEMBLE_RUNS = ("wam_1", "wam_2", "wam_3", "dreamer_v2_1", "dreamer_v2_2", "dreamer_v2_3")


@pytest.mark.parametrize(
    ("name", "table", "runs"),
    [
        ("playtable", "bc", ("dreamer_v2", "wam")),
        ("playtable", "ppo", ("dreamer_v2", "wam")),
        ("calvin_d_scripted", "bc", ("wam",)),
        ("calvin_d_scripted", "ppo", ("wam",)),
        ("playtable_few/imagination", "differences", (".",)),
        ("playtable_few/environment", "differences", (".",)),
        ("playtable_few/no_signal", "differences", (".",)),
        ("playtable_transfer/sampled", "differences", (".",)),
        ("playtable_transfer/limit_bootstraps_drawer", "differences", (".",)),
        ("playtable_transfer/limit_is_failure", "differences", (".",)),
        ("playtable_transfer", "differences", ("dreamer_v2_1", "wam_1")),
        ("playtable_transfer/wam_1", "differences", (".",)),
        ("playtable_transfer/wam_2", "differences", (".",)),
        ("playtable_transfer/wam_3", "differences", (".",)),
        ("playtable_transfer/bootstrapped_2", "differences", (".",)),
        ("playtable_transfer/disagreement_2", "differences", (".",)),
        *((f"playtable_ensemble/{run}", "differences", (".",)) for run in (*ENSEMBLE_RUNS, *LEVERS)),
        ("playtable_ensemble", "differences", ENSEMBLE_RUNS[:3]),
        *(("playtable_ensemble", table, (*ENSEMBLE_RUNS[3:], *ENSEMBLE_RUNS[:3])) for table in ("bc", "ppo")),
        (
            "playtable_ensemble/methods",
            "differences",
            tuple(f"../{run}" for run in (*ENSEMBLE_RUNS[3:], *ENSEMBLE_RUNS[:3])),
        ),
        *(
            (name, table, ("dreamer_v2_1", "wam_1"))
            for name in ("calvin_transfer", "calvin_ensemble")
            for table in ("differences", "bc", "ppo")
        ),
        ("playtable_transfer/gaussian_2", "differences", (".",)),
        ("playtable_transfer/hybrid_2", "differences", (".",)),
        ("playtable_transfer/online_2", "differences", (".",)),
        ("playtable_transfer/dreamer_v2_2", "differences", (".",)),
        ("playtable_transfer/dreamer_v2_3", "differences", (".",)),
        *(("playtable_transfer/three_seeds", table, THREE_SEEDS) for table in ("differences", "bc", "ppo")),
        ("playtable_transfer/wam_1_50_demonstrations", "differences", (".",)),
        *(("playtable_best", table, ("wam_1", "wam_2", "wam_3")) for table in ("differences", "bc", "ppo")),
        ("playtable_best/ensemble", "differences", ("wam_1", "wam_2")),
        *(("playtable_best/bc_weight", table, BEST) for table in ("differences", "bc", "ppo")),
    ],
)
def test_the_published_tables_are_those_of_the_command(name, table, runs):
    folder = helpers.ROOT / "docs/results" / name
    assert (folder / f"{table}.md").read_text() == print_table.build(table, [str(folder / run) for run in runs])[0]


@pytest.mark.parametrize(
    ("file", "runs", "against"),
    [
        ("playtable_transfer/bootstrapped_2/against.md", ("playtable_transfer/wam_2",), ("bootstrapped_2",)),
        *(
            (f"playtable_ensemble/{x}/against.md", (f"playtable_ensemble/{x}",), (x,))
            for x in ENSEMBLE_RUNS
            if not x.endswith("_1")  # that seed's world models are others there
        ),
        *(
            (f"calvin_ensemble/{x}/against.md", (f"calvin_ensemble/{x}",), (f"calvin_transfer/{x}",))
            for x in ("dreamer_v2_1", "wam_1")
        ),
        ("playtable_ensemble/against.md", ("playtable_ensemble/wam_2", "playtable_ensemble/wam_3"), ("wam_2", "wam_3")),
        (
            "playtable_ensemble/against_dreamer_v2.md",
            ("playtable_ensemble/dreamer_v2_2", "playtable_ensemble/dreamer_v2_3"),
            ("dreamer_v2_2", "dreamer_v2_3"),
        ),
        (
            "playtable_best/ensemble/against.md",
            ("playtable_best/ensemble/wam_1", "playtable_best/ensemble/wam_2"),
            ("playtable_best/wam_1", "playtable_best/wam_2"),
        ),
        (
            "playtable_best/bc_weight/over_ensemble.md",
            ("playtable_best/bc_weight/wam_1", "playtable_best/bc_weight/wam_2"),
            ("playtable_best/ensemble/wam_1", "playtable_best/ensemble/wam_2"),
        ),
        (
            "playtable_best/bc_weight/against.md",
            tuple(f"playtable_best/bc_weight/{run}" for run in BEST),
            tuple(f"playtable_best/{run}" for run in BEST),
        ),
        ("playtable_transfer/gaussian_2/against.md", ("playtable_transfer/wam_2",), ("gaussian_2",)),
        ("playtable_transfer/online_2/against.md", ("playtable_transfer/online_2",), ("wam_2",)),
        (
            "playtable_controls/against_dreamer_v2.md",
            ("playtable_controls/wam", "playtable_controls/wam_2"),
            ("playtable_controls/dreamer_v2", "playtable_controls/dreamer_v2_2"),
        ),
        ("noise_draws/wam.md", ("noise_draws/wam_2", "noise_draws/wam_3"), ("wam_2", "wam_3")),
        ("noise_draws/eight_wam.md", ("noise_draws/eight_wam_2", "noise_draws/eight_wam_3"), ("wam_2", "wam_3")),
        (
            "noise_draws/eight_dreamer_v2.md",
            ("noise_draws/eight_dreamer_v2_2", "noise_draws/eight_dreamer_v2_3"),
            ("dreamer_v2_2", "dreamer_v2_3"),
        ),
        (
            "noise_draws/dreamer_v2.md",
            ("noise_draws/dreamer_v2_2", "noise_draws/dreamer_v2_3"),
            ("dreamer_v2_2", "dreamer_v2_3"),
        ),
    ],
)
def test_the_published_differences_of_two_configs_are_those_of_the_command(monkeypatch, file, runs, against):
    monkeypatch.chdir(helpers.ROOT)  # the table names the runs as the command did
    first = [f"docs/results/{run}" for run in runs]
    second = [f"docs/results/{run if '/' in run else f'playtable_transfer/{run}'}" for run in against]
    text = print_table.build("differences", first, against=second)[0]
    assert Path(f"docs/results/{file}").read_text() == text


@pytest.mark.parametrize(
    ("file", "run", "against"),
    [
        *((f"{part}/against.md", "wam_2", part) for part in LEVERS),
        (
            "../playtable_transfer/hybrid_2/against.md",
            "../playtable_transfer/hybrid_2",
            "../playtable_transfer/dreamer_v2_2",
        ),
        *((f"{run}/over_neither.md", run, "../playtable_transfer/wam_2") for run in ("limit_2", "mixture_2", "wam_2")),
    ],
)
def test_the_published_ablations_are_those_of_the_command(monkeypatch, file, run, against):
    monkeypatch.chdir(helpers.ROOT)
    folder = "docs/results/playtable_ensemble"
    runs = {"workdirs": [os.path.normpath(f"{folder}/{run}")], "against": [os.path.normpath(f"{folder}/{against}")]}
    tasks = ("open_drawer", "move_slider_left", "turn_on_lightbulb", "turn_on_led")
    assert Path(f"{folder}/{file}").read_text() == print_table.build("differences", **runs, tasks=tasks)[0]
