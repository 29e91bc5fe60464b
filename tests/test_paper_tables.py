"""Tables III and IV of made-up runs whose answers are known by hand or by slow loops."""

import json
from pathlib import Path

import helpers
import numpy as np
import pytest
from made_up_runs import CLOSE, OPEN, every_task, lines, maker, of, write
from scipy import stats

from experiments import print_table, runs
from wam_jax import specs, tables


@pytest.fixture
def make_run(tmp_path):
    return maker(tmp_path)


def wilson(successes, episodes):
    interval = stats.binomtest(successes, episodes).proportion_ci(method="wilson")
    return np.array([interval.low, interval.high])


def test_table_three_stands_beside_the_paper_s(make_run):
    baseline = make_run("a", {"bc": every_task(of(5))}, method="dreamer_v2")
    wam = make_run("b", {"bc": every_task(of(8)) | {OPEN: of(10)}, "ppo": every_task(of(0))})
    text, values = print_table.build("bc", [wam, baseline])
    table = lines(text)
    assert table["task"] == ["playtable: dreamer_v2", "playtable: wam", "paper: DiWA", "paper: WAM"]
    low, high = 100 * wilson(10, 10)
    assert table["open drawer"] == ["50.0 [24, 76]", f"100.0 [{low:.0f}, {high:.0f}]", "53.3", "73.3"]
    assert table["turn off led"][1:] == ["80.0 [49, 94]", "not given", "not given"]
    assert table["**mean**"][2:] == ["45.8 (abstract: 59.4)", "61.7 (abstract: 71.2)"]
    # Eight independent rates: their margins add by squares.
    margins = np.sqrt(7 * (wilson(8, 10) - 0.8) ** 2 + (wilson(10, 10) - 1) ** 2) / 8
    mean = values["columns"][1]["mean"]
    assert mean["mean"] == pytest.approx((7 * 0.8 + 1) / 8)
    assert (mean["low"], mean["high"]) == pytest.approx((mean["mean"] - margins[0], mean["mean"] + margins[1]))
    assert table["training seeds"][:2] == ["0", "0"] and table["episodes a task and seed"][:2] == ["10", "10"]
    assert "another environment than the paper's" in text and "55.2" in text and "Wilson" in text
    assert "several seeds" not in text and not any("steps" in label for label in table)


def test_table_four_counts_the_steps_of_ppo_where_they_happen(make_run, tmp_path):
    changes = {"ppo.num_iterations": 3, "ppo.num_rollouts": 5, "evaluation.max_steps": 24}
    imagined = make_run("a", {"ppo": {OPEN: of(5)}}, **changes)
    with open(f"{imagined}/config.json") as file:
        config = json.load(file)
    config["ppo"].pop("rollouts", None)  # written before the value existed
    write(imagined, config, {"ppo": {OPEN: of(5)}})
    config["ppo"].update(rollouts="environment", num_iterations=7, max_steps=8)
    online = write(str(tmp_path / "b"), config, {"ppo": {OPEN: of(9)}})
    table = lines(print_table.build("ppo", [imagined, online])[0])
    titles = ["playtable: wam, ppo.rollouts=environment", "playtable: wam, ppo.rollouts=imagination"]
    assert table["task"][:2] == titles
    assert table["imagined steps of PPO a task"] == ["0", "360", "about 5,000,000", "2,880,000"]
    assert table["environment steps of PPO a task"] == ["280", "0", "0", "0"]
    assert table["open drawer"] == ["90.0 [60, 98]", "50.0 [24, 76]", "74.44 ± 1.92", "96.7 ± 2.4"]
    assert table["**mean**"] == ["", "", "83.74 (text: 79.8)", "92.88 (text: 92.8)"]  # ours are of one task
    config["ppo"]["rollouts"] = "elsewhere"
    with pytest.raises(ValueError, match="config.ppo.rollouts='elsewhere'; expected one of imagination, environment"):
        print_table.build("ppo", [write(online, config, {"ppo": {OPEN: of(9)}})])


def test_a_task_that_ppo_left_alone_is_marked_in_every_table(make_run):
    outcomes = {"bc": {OPEN: of(5), CLOSE: of(6)}, "ppo": {OPEN: of(7), CLOSE: of(6)}}
    changes = {"ppo.num_iterations": 3, "ppo.num_rollouts": 5, "evaluation.max_steps": 24}
    names = [make_run(f"seed_{seed}", outcomes, seed=seed, untrained=[CLOSE][:seed], **changes) for seed in range(2)]
    for table, cells in (("ppo", 1), ("differences", 1), ("success", 1), ("bc", 0)):
        text = print_table.build(table, names, **({"pool_seeds": True} if table == "success" else {}))[0]
        assert (tables.UNTRAINED in text) == bool(cells), table
        assert [
            line.startswith("| close drawer") for line in text.splitlines() if "] † |" in line or ") † |" in line
        ] == [True] * cells
    assert lines(print_table.build("ppo", names)[0])["imagined steps of PPO a task"][0] == "360, at † 0"
    assert lines(print_table.build("ppo", names)[0])["environment steps of PPO a task"][0] == "0"
    assert tables.UNTRAINED not in print_table.build("ppo", names[:1])[0]


def slow_crossed(outcomes, draws=2000):
    """Percentiles of the mean of [S, T, N]: seeds for all tasks together, and each task's starts for all seeds."""
    rng, means = np.random.default_rng(7), []
    num_seeds, num_tasks, num_starts = outcomes.shape
    for _ in range(draws):
        seeds = rng.integers(num_seeds, size=num_seeds)
        starts = [rng.integers(num_starts, size=num_starts) for _ in range(num_tasks)]
        means.append(np.mean([outcomes[seeds, task][:, starts[task]] for task in range(num_tasks)]))
    return np.percentile(means, [2.5, 97.5])


def test_seeds_are_gathered_and_their_interval_respects_both_levels(make_run):
    successes = np.array([[20, 30] + [20] * 6, [28, 36] + [28] * 6, [14, 38] + [14] * 6])
    names = [
        make_run(f"seed_{s}", {"bc": {t: of(k, 40) for t, k in zip(specs.TASKS, row, strict=True)}}, seed=s)
        for s, row in enumerate(successes)
    ]
    text, values = print_table.build("bc", names[::-1])
    (column,) = values["columns"]
    assert (column["seeds"], column["episodes"], lines(text)["training seeds"][0]) == ([0, 1, 2], [40], "0, 1, 2")
    outcomes = np.array([[of(k, 40) for k in row] for row in successes])
    for cell, some in ((column["tasks"][OPEN], outcomes[:, :1]), (column["mean"], outcomes)):
        assert cell["mean"] == pytest.approx(some.mean())
        assert (cell["low"], cell["high"]) == pytest.approx(slow_crossed(some), abs=0.015)
        narrow = wilson(int(some[:, 0].sum()), 120)
        assert cell["high"] - cell["low"] > narrow[1] - narrow[0]  # seeds differ by more than their episodes
    assert "With several seeds" in text and "With one seed" not in text and "lacks" not in text
    assert print_table.build("bc", names) == (text, values)


def test_seeds_that_fail_at_the_same_starts_are_no_more_certain_than_one(make_run):
    """And where it is not known at which starts they failed, the table says so."""
    names = [make_run(f"seed_{s}", {"bc": every_task(of(28, 40))}, seed=s) for s in range(3)]
    alone = print_table.build("bc", names[:1])[1]["columns"][0]
    text, values = print_table.build("bc", names)
    for one, three in (
        (alone["mean"], values["columns"][0]["mean"]),
        (alone["tasks"][OPEN], values["columns"][0]["tasks"][OPEN]),
    ):
        assert three["mean"] == pytest.approx(one["mean"])
        assert three["low"] <= one["low"] + 1e-12 and three["high"] >= one["high"] - 1e-12
    pooled, _ = print_table.build("success", names, pool_seeds=True)
    assert lines(pooled)["open drawer"] == lines(text)["open drawer"][:1] and "lacks" not in pooled
    (episodes,) = (Path(names[1]) / "evaluation").iterdir()
    episodes.unlink()
    for table, options in (("bc", {}), ("success", {"pool_seeds": True})):
        text, _ = print_table.build(table, names, **options)
        assert "Of playtable: wam" in text and "a run lacks evaluation/STAGE.episodes.json" in text
    assert "lacks" not in print_table.build("bc", names[:1])[0]


def test_each_start_is_drawn_for_all_seeds_at_once(make_run):
    """Seeds with equal counts: their mean is certain where each start is solved by just one of two."""
    halves = np.arange(40) < 20
    apart = [make_run(f"apart_{s}", {"bc": {OPEN: halves == (s == 0)}}, seed=s) for s in range(2)]
    alike = [make_run(f"alike_{s}", {"bc": {OPEN: halves}}, seed=s) for s in range(2)]
    widths = [
        np.diff([print_table.build("bc", names)[1]["columns"][0]["tasks"][OPEN][k] for k in ("low", "high")])
        for names in (apart, alike)
    ]
    assert widths[0] < widths[1]


def test_seeds_that_never_fail_are_not_certain(make_run):
    names = [make_run(f"seed_{s}", {"bc": every_task(of(10))}, seed=s) for s in range(3)]
    _, values = print_table.build("bc", names)
    cell = values["columns"][0]["tasks"][OPEN]
    assert (cell["low"], cell["high"]) == pytest.approx(tuple(wilson(10, 10)))  # 30 episodes, but ten starts


def test_runs_of_other_configs_are_refused_or_stand_apart(make_run):
    bc = {"bc": every_task(of(5))}
    names = [make_run("a", bc), make_run("b", bc, seed=1, **{"policy.num_steps": 777})]
    for table in ("bc", "differences"):
        with pytest.raises(ValueError, match=r"a has config.policy.num_steps=\d+, .*b has 777: .* --apart=policy.num_"):
            print_table.build(table, names)
    with pytest.raises(ValueError, match="config.policy.num_steps"):
        print_table.build("success", names, pool_seeds=True)
    table = lines(print_table.build("bc", names, apart=["policy.num_steps"])[0])
    assert table["task"][1] == "playtable: wam, policy.num_steps=777"
    some = [
        make_run(name, {"bc": {OPEN: of(5)}}, tasks=tasks) for name, tasks in (("f", (OPEN,)), ("g", (OPEN, CLOSE)))
    ]
    table = lines(print_table.build("bc", some, apart=["tasks"])[0])
    assert table["task"][:2] == [f"playtable: wam, tasks={tasks}" for tasks in ((OPEN, CLOSE), (OPEN,))]
    with pytest.raises(ValueError, match="no config has 'policy.steps'"):
        print_table.build("bc", names, apart=["policy.steps"])
    # What decides nothing may differ, and where data lie is said.
    free = make_run("c", bc, seed=1, **{"ppo.tasks_at_once": 8, "evaluation.batch_size": 3, "dataset.play": "play"})
    text, values = print_table.build("bc", [names[0], free])
    assert values["columns"][0]["seeds"] == [0, 1]
    assert "Seeds of playtable: wam had different dataset.play: its own, play." in text
    number = {"dataset.demonstrations_per_task": 8}
    text = print_table.build("bc", [make_run("d", bc, **number)])[0]
    assert lines(text)["demonstrations a task"][0] == "8"
    names = [make_run("d", bc, **number), make_run("e", bc, seed=1, **number, **{"dataset.demonstrations": "data"})]
    assert lines(print_table.build("bc", names)[0])["demonstrations a task"][0] == "at most 8, of a given dataset"


def test_what_tells_the_methods_apart_besides_the_action_loss_is_said(make_run):
    bc = {"bc": every_task(of(5))}
    wam = make_run("a", bc, **{"world_model.num_steps": 50})
    text, _ = print_table.build("bc", [wam, make_run("b", bc, method="dreamer_v2")])
    assert "The configs of playtable: dreamer_v2 and playtable: wam also differ in world_model.num_steps." in text


def test_no_run_counts_twice(make_run):
    names = [make_run(name, {"bc": every_task(of(5)), "ppo": every_task(of(5))}) for name in ("a", "b")]
    for table in ("bc", "ppo", "differences"):
        with pytest.raises(ValueError, match="b are both playtable: wam, seed 0: their episodes would count twice"):
            print_table.build(table, names)
        with pytest.raises(ValueError, match="a is named twice"):
            print_table.build(table, [names[0], names[0]])
    with pytest.raises(ValueError, match="a/? is named twice"):
        print_table.build("success", [names[0], names[0] + "/"])
    with pytest.raises(ValueError, match=r"one of the runs '', .* has no name; name each"):
        print_table.build("success", ["", names[0]])
    rows = tables.load(f"{names[0]}/table.json")
    tables.save(f"{names[0]}/table.json", [*rows, rows[0]])
    with pytest.raises(ValueError, match=f"a/table.json has {rows[0].task} at stage bc twice"):
        runs.load(names[0])


def test_what_a_table_lacks_is_named(make_run, tmp_path):
    run = make_run("a", {"bc": {OPEN: of(5), CLOSE: of(5)}})
    with pytest.raises(
        ValueError, match="a/table.json has no rows of stage ppo; run experiments.evaluate --policy=ppo"
    ):
        print_table.build("ppo", [run])
    with pytest.raises(ValueError, match="b/table.json has no row of close_drawer at stage bc; run"):
        print_table.build("bc", [run, make_run("b", {"bc": {OPEN: of(5)}}, seed=1)])
    with pytest.raises(ValueError, match=r"open_drawer: 10 .seed 0., 20 .seed 1. episodes"):
        print_table.build("bc", [run, make_run("c", {"bc": {OPEN: of(5, 20), CLOSE: of(5)}}, seed=1)])
    with open(f"{run}/config.json", "w") as file:
        json.dump({"method": "wam"}, file)
    with pytest.raises(ValueError, match="a/config.json has no environment, seed, .*take the run's own"):
        print_table.build("bc", [run])
    config = json.loads((tmp_path / "b/config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps({**config, "seed": 0, "policy": {"chunk": "x"}}))
    with pytest.raises(ValueError, match="a/config.json has policy.chunk='x', expected a whole number from 1"):
        print_table.build("bc", [run])
    config["ppo"]["max_steps"] = -3
    (tmp_path / "a/config.json").write_text(json.dumps({**config, "seed": 0}))
    with pytest.raises(ValueError, match="a/config.json has ppo.max_steps=-3, expected a whole number from 0"):
        print_table.build("bc", [run])
    (tmp_path / "a/config.json").write_text('{"method": ["wam"]}')
    with pytest.raises(ValueError, match="a/config.json is no config of a run"):
        print_table.build("bc", [run])
    (tmp_path / "a/config.json").unlink()
    with pytest.raises(ValueError, match="no .*a/config.json; every run writes one"):
        print_table.build("bc", [run])


def test_a_config_of_another_run_is_refused(make_run, tmp_path):
    run, other = (make_run(name, {"bc": {OPEN: of(5)}}, seed=seed) for name, seed in (("a", 0), ("b", 1)))
    (tmp_path / "a/config.json").write_text((tmp_path / "b/config.json").read_text())
    with pytest.raises(ValueError, match="row of playtable, wam, seed 0, its config.json says playtable, wam, seed 1"):
        print_table.build("bc", [run, other])


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ("bc", {"against": ["x"]}, "--against belongs to --table=differences, not to bc"),
        ("success", {"apart": ["seed"]}, "--apart belongs to --table=bc or ppo or differences, not to success"),
        ("ppo", {"pool_seeds": True}, "--pool_seeds belongs to --table=success, not to ppo"),
    ],
)
def test_an_option_of_another_table_is_refused(table, options, message):
    with pytest.raises(ValueError, match=message):
        print_table.build(table, ["somewhere"], **options)


@pytest.mark.parametrize("flag", ["apart", "against", "tasks"])
def test_an_empty_list_is_not_taken_for_no_list(make_run, flag):
    run = make_run("a", {"bc": every_task(of(5))})
    done = helpers.run_python("-m", "experiments.print_table", "--table=differences", run, f"--{flag}=")
    assert (done.returncode, done.stderr) == (
        1,
        f"error: --{flag}= is empty; name some, comma separated, or leave it out\n",
    )


def test_the_command_writes_what_it_prints(make_run, tmp_path):
    run = make_run("a", {"bc": every_task(of(5))})
    text, values = print_table.build("bc", [run])
    done = helpers.run_python(
        "-m", "experiments.print_table", "--table=bc", run, f"--output={tmp_path}/new/bc.md"
    )  # fmt: skip
    assert (done.returncode, done.stdout.rstrip("\n")) == (0, text.rstrip("\n")), done.stderr
    assert (tmp_path / "new/bc.md").read_text() == text
    print_table.save(f"{tmp_path}/bc.json", text, values)
    assert json.loads((tmp_path / "bc.json").read_text()) == json.loads(json.dumps(values))
