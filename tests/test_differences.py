"""Differences paired by start, of made-up runs whose answers are known by hand, by scipy or by slow loops."""

import json
import math

import numpy as np
import pytest
from made_up_runs import CLOSE, OPEN, every_task, lines, maker, of
from scipy import stats

from experiments import print_table


@pytest.fixture
def make_run(tmp_path):
    return maker(tmp_path)


def correlated(rng, shape, *, flips, gain):
    """Two policies' outcomes that mostly share their starts' difficulty; the first gains some more."""
    second = rng.random(shape) < 0.6
    first = np.where(rng.random(shape) < flips, ~second, second) | (rng.random(shape) < gain)
    return first, second


def test_a_difference_is_paired_by_start(make_run):
    first, second = correlated(np.random.default_rng(5), 200, flips=0.05, gain=0.1)
    run = make_run("a", {"bc": {OPEN: second, CLOSE: of(3)}, "ppo": {OPEN: first, CLOSE: of(3)}})
    text, values = print_table.build("differences", [run])
    (column,) = values["columns"]
    cell = column["tasks"][OPEN]
    more, less = int((first & ~second).sum()), int((~first & second).sum())
    assert (cell["first_only"], cell["second_only"]) == (more, less)
    assert cell["mean"] == pytest.approx(100 * (first.mean() - second.mean()))
    assert cell["p"] == pytest.approx(
        min(1, 2 * sum(math.comb(more + less, i) for i in range(less + 1)) / 2 ** (more + less))
    )
    difference = 100.0 * (first.astype(float) - second)
    paired = stats.bootstrap(
        (difference,), np.mean, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (cell["low"], cell["high"]) == pytest.approx((paired.low, paired.high), abs=0.8)
    unpaired = stats.bootstrap(
        (first, second), lambda x, y, axis: 100 * (x.mean(axis) - y.mean(axis)), method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert cell["high"] - cell["low"] < 0.8 * (unpaired.high - unpaired.low)
    assert column["tasks"][CLOSE] == dict(mean=0, low=0, high=0, first_only=0, second_only=0, p=1)
    mean = column["mean"]
    assert (mean["mean"], mean["first_only"], mean["p"]) == (pytest.approx(cell["mean"] / 2), more, cell["p"])
    assert (mean["low"], mean["high"]) == pytest.approx((cell["low"] / 2, cell["high"] / 2), abs=0.4)
    table = lines(text)
    assert table["task"] == ["playtable: wam, ppo - bc"] and table["close drawer"] == [
        "+0.0 [+0.0, +0.0] (0 : 0; p 1.000)"
    ]
    assert (
        table["open drawer"][0].startswith(f"{cell['mean']:+.1f} [")
        and f"({more} : {less}; p " in table["open drawer"][0]
    )


def slow_crossed(differences, draws=2000):
    """Percentiles of the mean of [T][S, N]: seeds for all tasks together, starts for all seeds together."""
    rng, means = np.random.default_rng(3), []
    for _ in range(draws):
        seeds = rng.integers(len(differences[0]), size=len(differences[0]))
        drawn = [values[seeds][:, rng.integers(values.shape[1], size=values.shape[1])].mean() for values in differences]
        means.append(np.mean(drawn))
    return np.percentile(means, [2.5, 97.5])


def test_several_seeds_are_drawn_with_the_starts(make_run):
    rng = np.random.default_rng(0)
    hard = {task: rng.random(30) for task in (OPEN, CLOSE)}  # of each start, for every seed
    outcomes, names = {}, []
    for seed in range(3):
        for method, skill in (("dreamer_v2", 0.4), ("wam", 0.5 + 0.1 * seed)):
            outcomes[method, seed] = {task: (hard[task] < skill) ^ (rng.random(30) < 0.1) for task in hard}
            names.append(make_run(f"{method}{seed}", {"bc": outcomes[method, seed]}, method=method, seed=seed))
    text, values = print_table.build("differences", names)
    (column,) = values["columns"]
    assert (column["title"], column["seeds"]) == ("playtable: wam - dreamer_v2, bc", [0, 1, 2])
    differences = [
        100.0 * np.array([outcomes["wam", s][task].astype(int) - outcomes["dreamer_v2", s][task] for s in range(3)])
        for task in hard
    ]
    cells = {**column["tasks"], "mean": column["mean"]}
    for name, parts in ((OPEN, differences[:1]), (CLOSE, differences[1:]), ("mean", differences)):
        cell = cells[name]
        assert cell["mean"] == pytest.approx(np.mean(parts))
        assert (cell["low"], cell["high"]) == pytest.approx(slow_crossed(parts), abs=1.5)
        assert cell["first_only"] == sum(int((values > 0).sum()) for values in parts)
        assert cell["p"] is None  # starts are shared, so the pairs of several seeds are not independent
    assert "; p " not in text and "Several seeds are drawn anew" in text


def test_a_seed_is_drawn_for_all_tasks_together(make_run):
    """One of two seeds gains everything everywhere: with 8 tasks drawn apart, no mean would reach 0 or 100."""
    names = [make_run(f"seed_{s}", {"bc": every_task(of(0)), "ppo": every_task(of(10 * s))}, seed=s) for s in range(2)]
    mean = print_table.build("differences", names)[1]["columns"][0]["mean"]
    assert (mean["mean"], mean["low"], mean["high"]) == (50, 0, 100)


def test_an_ablation_on_some_tasks_is_compared_on_those(make_run):
    both = make_run("a", {"ppo": {OPEN: of(8), CLOSE: of(9)}}, **{"ppo.bc_weight": 0.5})
    some = make_run("b", {"ppo": {OPEN: of(3)}}, tasks=(OPEN,))
    with pytest.raises(ValueError, match="close_drawer on one side alone"):
        print_table.build("differences", [both], against=[some])
    text, _ = print_table.build("differences", [both], against=[some], tasks=[OPEN])
    assert lines(text)["open drawer"][0].startswith("+50.0") and "close drawer" not in lines(text)
    assert lines(text)["**mean**"][0].startswith("+50.0")
    assert "configs differ in ppo.bc_weight (0.5, 0.025)." in text
    with pytest.raises(ValueError, match="--tasks=close_drawer: .* has not both sides of it, but of open_drawer"):
        print_table.build("differences", [both], against=[some], tasks=[CLOSE])
    with pytest.raises(ValueError, match="--tasks: one of 'open_drawer', '' is empty; name each, with single commas"):
        print_table.build("differences", [both], against=[some], tasks=[OPEN, ""])


def test_a_run_with_half_of_its_tasks_fine_tuned_is_compared_on_those(make_run):
    half = make_run("a", {"bc": {OPEN: of(3), CLOSE: of(9)}, "ppo": {OPEN: of(8)}})
    with pytest.raises(ValueError, match=r"close_drawer on one side alone; .*\(print_table --tasks\)"):
        print_table.build("differences", [half])
    text, values = print_table.build("differences", [half], tasks=[OPEN])
    assert values["columns"][0]["mean"]["mean"] == pytest.approx(50) and "close drawer" not in lines(text)
    with pytest.raises(ValueError, match="--tasks belongs to --table=differences, not to ppo"):
        print_table.build("ppo", [half], tasks=[OPEN])


def test_nothing_is_subtracted_from_itself(make_run):
    run = make_run("a", {"bc": {OPEN: of(3)}})
    with pytest.raises(ValueError, match="a is named twice"):
        print_table.build("differences", [run], against=[run])
    other = make_run("b", {"bc": {OPEN: of(3)}})
    with pytest.raises(ValueError, match="--tasks has open_drawer twice"):
        print_table.build("differences", [run], against=[other], tasks=[OPEN, OPEN])


def test_the_runs_named_minus_those_of_against(make_run):
    base = make_run("base", {"bc": {OPEN: of(2)}, "ppo": {OPEN: of(4)}}, **{"world_model.open_loop_weight": 0.5})
    ours = make_run("ours", {"bc": {OPEN: of(5)}, "ppo": {OPEN: of(3)}}, **{"world_model.open_loop_weight": 2.0})
    text, values = print_table.build("differences", [ours], against=[base])
    assert [column["mean"]["mean"] for column in values["columns"]] == pytest.approx([30, -10])
    assert "Their configs differ in world_model.open_loop_weight (2.0, 0.5)." in text
    other = make_run("other", {"bc": {OPEN: of(2)}}, seed=1)
    with pytest.raises(ValueError, match="seeds 0 and 1; differences pair equal seeds"):
        print_table.build("differences", [ours], against=[other])
    with pytest.raises(ValueError, match="the runs named are of several configs .*; name the seeds of one"):
        print_table.build(
            "differences", [ours, make_run("b", {"bc": {OPEN: of(2)}}, method="dreamer_v2")], against=[base]
        )


@pytest.mark.parametrize(
    ("changes", "simulator", "message"),
    [
        (
            {"evaluation.seed": 7},
            "",
            "config.evaluation.seed=1000, .* has 7: their episodes of one number do not begin",
        ),
        ({"evaluation.max_steps": 36}, "", "config.evaluation.max_steps=72, .* has 36"),
        ({}, "pybullet 1", "were evaluated in different simulators .* / pybullet 1.; evaluate both in one"),
    ],
)
def test_episodes_of_other_starts_are_not_paired(make_run, changes, simulator, message):
    first, second = (
        make_run("a", {"bc": {OPEN: of(2)}}),
        make_run("b", {"bc": {OPEN: of(2)}}, simulator=simulator, **changes),
    )
    with pytest.raises(ValueError, match=message):
        print_table.build("differences", [first], against=[second])


def change_episodes(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_episodes_that_are_missing_double_or_others_are_named(make_run, tmp_path):
    outcomes = {"bc": {OPEN: of(2)}, "ppo": {OPEN: of(4)}}
    path = tmp_path / "a/evaluation/ppo.episodes.json"
    run = make_run("a", outcomes)
    extra = {"task": OPEN, "number": 10, "success": True, "steps": 3, "simulator": ""}
    change_episodes(path, lambda episodes: [*episodes, extra])  # of a longer evaluation before: not in the row
    assert print_table.build("differences", [run])[1]["columns"][0]["mean"]["mean"] == pytest.approx(20)
    change_episodes(path, lambda episodes: [*episodes, extra])
    with pytest.raises(ValueError, match="ppo.episodes.json has episode 10 of open_drawer twice"):
        print_table.build("differences", [run])
    change_episodes(path, lambda episodes: [e for e in episodes if e["number"] not in (3, 10)])
    with pytest.raises(ValueError, match="lacks 1 of 10 episodes of open_drawer, the first is number 3"):
        print_table.build("differences", [run])
    change_episodes(path, lambda episodes: [*episodes, extra | {"number": 3, "success": False}])
    with pytest.raises(ValueError, match="has 3 successes of open_drawer, table.json has 4"):
        print_table.build("differences", [run])
    path.unlink()
    with pytest.raises(ValueError, match="no .*ppo.episodes.json: differences are paired by start .*holds rows alone"):
        print_table.build("differences", [run])


def test_runs_with_nothing_to_compare_are_named(make_run):
    run = make_run("a", {"bc": {OPEN: of(2)}})
    with pytest.raises(ValueError, match="nothing to compare in .*a: differences need the stages bc and ppo"):
        print_table.build("differences", [run])
