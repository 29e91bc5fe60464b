"""Rows and tables: intervals against known numbers, one line a task, errors that name the file."""

import dataclasses
import json
import re

import pytest

from experiments import print_table
from wam_jax import intervals, json_files, specs, tables


def make_row(task="open_drawer", stage="bc", successes=8, episodes=10, **changes):
    row = dict(environment="playtable", method="wam", imagined_success=None, seed=0)
    return tables.make_row(**(row | dict(task=task, stage=stage, successes=successes, episodes=episodes) | changes))


def lines(rows):
    """The table's cells: {first cell: the others}."""
    table = [line for line in tables.markdown(rows).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert len({len(row) for row in cells}) == 1
    return {row[0]: row[1:] for row in cells}


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(successes, episodes, low, high):
    assert intervals.wilson(successes, episodes) == pytest.approx((low, high), abs=2e-4)


def test_a_row_says_rate_and_interval():
    row = make_row(imagined_success=0.5, seed=3)
    assert (row.success, row.imagined_success, row.seed) == (0.8, 0.5, 3)
    assert (row.low, row.high) == intervals.wilson(8, 10)


def test_round_trip(tmp_path):
    rows = [make_row(), make_row(task="turn_on_led", stage="ppo", imagined_success=0.25)]
    path = str(tmp_path / "new" / "table.json")
    tables.save(path, rows)
    assert tables.load(path) == rows
    with open(path) as file:
        assert json.load(file) == [dataclasses.asdict(row) for row in rows]
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["table.json"]


def test_a_line_for_each_task_and_a_column_for_each_stage():
    rows = [make_row(task=task, stage=stage) for stage in ("ppo", "bc") for task in reversed(specs.TASKS)]
    rows.append(make_row(stage="expert", method="-", successes=10))
    table = lines(rows)
    assert list(table) == ["task", "---", *(task.replace("_", " ") for task in specs.TASKS), "**mean**"]
    assert table["task"] == ["playtable: expert", "playtable: wam bc", "playtable: wam ppo"]
    assert table["open drawer"] == ["100.0 [72, 100]", "80.0 [49, 94]", "80.0 [49, 94]"]
    assert table["close drawer"] == ["", "80.0 [49, 94]", "80.0 [49, 94]"]


def test_seeds_of_a_cell_are_pooled():
    rows = [make_row(seed=0, successes=3, imagined_success=0.2), make_row(seed=1, successes=8, imagined_success=0.6)]
    (cell,) = lines(rows)["open drawer"]
    low, high = map(int, cell.partition("[")[2].partition("]")[0].split(", "))
    narrow = intervals.wilson(5.5, 10)  # of one seed with as much success
    assert cell == f"55.0 [{low}, {high}] (40)" and low < 100 * narrow[0] and high > 100 * narrow[1]
    assert "% [95 % interval over seeds and starts], 2 seeds of 10 episodes a task;" in tables.markdown(rows)
    with pytest.raises(ValueError, match=r"open_drawer: 10 .seed 0., 20 .seed 1. episodes; evaluate all seeds"):
        tables.markdown([make_row(), make_row(episodes=20, seed=1)])


def test_the_mean_counts_every_task_alike():
    rows = [make_row(successes=1, episodes=1, imagined_success=1.0), make_row("turn_on_led", successes=0, episodes=99)]
    assert lines(rows)["**mean**"] == ["**50.0** (100)"]


def test_a_column_that_lacks_a_task_has_no_mean():
    rows = [make_row(), make_row("turn_on_led"), make_row("turn_on_led", stage="ppo")]
    assert lines(rows)["**mean**"] == ["**80.0**", ""]


def test_no_episode_counts_twice():
    with pytest.raises(ValueError, match="two rows for playtable: wam bc, open_drawer, seed 3"):
        tables.markdown([make_row(seed=3), make_row(seed=3)])


def test_runs_of_one_method_stand_apart_unless_their_seeds_are_pooled():
    runs = {"a": [make_row(successes=3)], "b": [make_row(successes=8, seed=1)]}
    apart = lines(print_table.combine(runs, pool_seeds=False))
    assert apart["task"] == ["a, playtable: wam bc", "b, playtable: wam bc"]
    assert [cell.split()[0] for cell in apart["open drawer"]] == ["30.0", "80.0"]
    pooled = lines(print_table.combine(runs, pool_seeds=True))
    assert (pooled["task"], pooled["open drawer"][0].split()[0]) == (["playtable: wam bc"], "55.0")
    with pytest.raises(ValueError, match="b/table.json has no rows"):
        print_table.combine(runs | {"b": []}, pool_seeds=False)
    methods = {"a": [make_row()], "b": [make_row(method="dreamer_v2")]}
    assert lines(print_table.combine(methods, pool_seeds=False))["task"] == [
        "playtable: dreamer_v2 bc", "playtable: wam bc",
    ]  # fmt: skip


def test_methods_stand_side_by_side():
    rows = [make_row(method=method, stage=stage) for method in ("wam", "dreamer_v2") for stage in ("bc", "ppo")]
    assert set(lines(rows)["task"]) == {f"playtable: {m} {s}" for m in ("wam", "dreamer_v2") for s in ("bc", "ppo")}


def test_no_table_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"no table {tmp_path}/table.json; run experiments.evaluate"):
        tables.load(str(tmp_path / "table.json"))


@pytest.mark.parametrize("content", ["", "[{", '[{"task": "open_drawer"}]', "3", '["text"]'])
def test_another_file_is_named(tmp_path, content):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="table.json is (damaged|not a table of results) .*; remove it"):
        tables.load(str(path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("successes", "9"),
        ("successes", 11),
        ("episodes", 0),
        ("episodes", 2.5),
        ("imagined_success", "0.5"),
        ("imagined_success", 5.0),
        ("success", 0.123),
        ("task", ["a"]),
        ("task", "open_drawr"),
        ("episodes", True),
        ("stage", "foo"),
    ],
)
def test_a_row_that_cannot_be_is_named(tmp_path, field, value):
    path = str(tmp_path / "table.json")
    tables.save(path, [make_row()])
    assert tables.load(path) == [make_row()]
    json_files.write(path, [{**dataclasses.asdict(make_row()), field: value}])
    with pytest.raises(
        ValueError, match=rf"table.json, entry 0: {field}=.*{re.escape(repr(value))} cannot be; remove it"
    ):
        tables.load(path)


def test_whole_numbers_may_be_written_without_a_point(tmp_path):
    path = str(tmp_path / "table.json")
    whole = {"successes": 10, "success": 1, "imagined_success": 0, "high": 1}
    json_files.write(path, [{**dataclasses.asdict(make_row()), **whole}])
    assert (tables.load(path)[0].success, tables.load(path)[0].imagined_success) == (1, 0)


def test_a_table_that_is_no_list_is_named(tmp_path):
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(ValueError, match="it holds a dict, not a list"):
        tables.load(str(tmp_path / "table.json"))
