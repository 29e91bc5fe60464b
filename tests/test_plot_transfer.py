"""Success imagined beside success outside, over runs."""

import json
import math
import re

import helpers
import made_up_runs
import pytest
from made_up_runs import CLOSE, OPEN

from experiments import plot_transfer
from wam_jax import calibration, json_files

WAM = ["wam_1", "wam_2", "wam_3"]
SPLITS = ("train", "validation")


@pytest.fixture
def make_run(tmp_path):
    """Makes a run of cloned and fine-tuned policies from {task: ((imagined, real), (imagined, real))}, in tenths."""
    make = made_up_runs.maker(tmp_path)

    def make_with_imagination(name, policies, **changes):
        stages = dict(enumerate(("bc", "ppo")))
        make(name, {stage: {task: [i < ends[e][1] for i in range(10)] for task, ends in policies.items()}
                    for e, stage in stages.items()}, **changes)  # fmt: skip
        path = tmp_path / name / "table.json"
        rows = json.loads(path.read_text())
        for row in rows:
            imagined = policies[row["task"]][row["stage"] == "ppo"][0]
            row["imagined_success"] = None if imagined is None else imagined / 10
        path.write_text(json.dumps(rows))
        return str(tmp_path / name)

    return make_with_imagination


def rows_of(text):
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells}


def test_gains_are_sorted_by_what_imagination_gave_the_cloned_policy(make_run, tmp_path):
    runs = [
        make_run("a", {OPEN: ((5, 2), (9, 6)), CLOSE: ((10, 8), (10, 7))}),
        make_run("b", {OPEN: ((6, 4), (8, 6)), CLOSE: ((9, 5), (10, 5))}, seed=1),
    ]
    changes = plot_transfer.load(runs)
    rows = rows_of(plot_transfer.markdown(changes))
    found = {name: (int(row[0]), float(row[1]), float(row[2].split()[0]), int(row[3])) for name, row in rows.items()
             if re.fullmatch(r"\d+ to \d+|all", name)}  # fmt: skip
    assert found == {  # 100 % is in the last bin, each edge in the bin above
        "0 to 60": (1, 20.0, 40.0, 0),
        "60 to 80": (1, 40.0, 20.0, 0),
        "90 to 100": (2, 65.0, -5.0, 1),
        "all": (4, 47.5, 12.5, 1),
    }
    assert rows["what PPO changed"][0] == "4" and rows["all policies"][0] == "8"
    assert rows["what PPO changed"][1].startswith("0.9")  # (4, 4), (0, -1), (2, 2), (1, 0)
    plot_transfer.draw(changes, f"{tmp_path}/transfer.png")
    assert (tmp_path / "transfer.png").read_bytes()[1:4] == b"PNG"


def test_what_a_run_lacks_is_named(make_run):
    without = make_run("a", {OPEN: ((None, 2), (9, 6))})
    with pytest.raises(ValueError, match=r"no imagined success of open_drawer at stage bc; run experiments.evaluate"):
        plot_transfer.load([without])
    with pytest.raises(ValueError, match="name at least one workdir"):
        plot_transfer.load([])
    damaged = make_run("c", {OPEN: ((70, 2), (9, 6))})
    with pytest.raises(ValueError, match="entry 0: imagined_success=7.0 cannot be"):
        plot_transfer.load([damaged])
    elsewhere = make_run("d", {OPEN: ((5, 2), (9, 6))}, environment="calvin")
    with pytest.raises(ValueError, match="runs of calvin and playtable: draw them apart"):
        plot_transfer.load([make_run("e", {OPEN: ((5, 2), (9, 6))}), elsewhere])
    with pytest.raises(ValueError, match="a is named twice"):
        plot_transfer.load([without, without + "/."])
    kept = make_run("b", {OPEN: ((5, 2), (5, 2))}, untrained=[OPEN])
    with pytest.raises(ValueError, match="no policy that PPO trained"):
        plot_transfer.load([kept])


def test_success_imagined_is_corrected_by_how_imagination_errs_on_play(make_run, tmp_path):
    """Shares of play decide: of its successes 0.4 are imagined solved, of its failures 0.1."""
    run = make_run("a", {OPEN: ((2, 2), (5, 9)), CLOSE: ((2, 4), (9, 8))})
    write_trust(run, {
        OPEN: {"train": (10, 4, 10, 1), "validation": (0, 0, 10, 1)},
        CLOSE: {"train": (5, 5, 5, 0), "validation": (5, 5, 5, 0)},
    })  # fmt: skip
    drawer, closing = (change.corrected for change in plot_transfer.load([run]))
    assert drawer.before == pytest.approx(((0.2 - 0.1) / (0.4 - 0.1), 0.2))
    assert drawer.after == (1.0, 0.9)  # no more than all
    assert closing.before == (0.2, 0.4) and closing.after == (0.9, 0.8)  # imagination errs nowhere
    rows = rows_of(plot_transfer.markdown(plot_transfer.load([run])))
    assert rows["all policies, corrected"][0] == "4" and rows["cloned, corrected"][0] == "2"
    plot_transfer.draw(plot_transfer.load([run]), f"{tmp_path}/transfer.png")

    bare = make_run("b", {OPEN: ((2, 2), (5, 9))}, seed=1)  # all or none are corrected
    text = plot_transfer.markdown(plot_transfer.load([run, bare]))
    assert "all policies, corrected" not in rows_of(text)
    assert text.endswith(f"has no successes and failures of play of these: {bare}: open_drawer.\n")


def test_verdicts_that_say_nothing_are_left_out_and_named(make_run, tmp_path):
    run = make_run("a", {OPEN: ((2, 2), (5, 9)), CLOSE: ((2, 4), (9, 8))})
    mute, clear = {"train": (10, 2, 10, 3), "validation": (0, 0, 0, 0)}, {split: (5, 5, 5, 0) for split in SPLITS}
    write_trust(run, {OPEN: mute, CLOSE: clear})
    changes = plot_transfer.load([run])
    text = plot_transfer.markdown(changes)
    assert rows_of(text)["all policies, corrected"][0] == "2"
    assert text.endswith(f"solved as often as its successes: {run}: open_drawer.\n")
    write_trust(run, {OPEN: mute, CLOSE: mute})  # no row, no panel
    changes = plot_transfer.load([run])
    assert "all policies, corrected" not in rows_of(plot_transfer.markdown(changes))
    plot_transfer.draw(changes, f"{tmp_path}/transfer.png")
    write_trust(run, {OPEN: {split: (5, 5, 0, 0) for split in SPLITS}})  # asked for, and of no use anywhere
    text = plot_transfer.markdown(plot_transfer.load([run]))
    assert text.endswith(f"has no successes and failures of play of these: {run}: {OPEN}, {CLOSE}.\n")
    assert calibration.corrected(0.05, 0.4, 0.1) == 0  # no less than nothing
    assert math.isnan(calibration.corrected(0.5, float("nan"), 0.1))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("successes_imagined", 7, "open_drawer, train: successes_imagined is 7, expected 0 to 1; delete it"),
        ("failures_imagined", None, "open_drawer, train: failures_imagined is None, expected 0 to 1"),
        ("successes", 30, "open_drawer, train: successes is 30, expected 0 to 20"),
        ("attempts", "many", "open_drawer, train: attempts is 'many', expected 0 to"),
        ("attempts", True, "open_drawer, train: attempts is True"),
    ],
)
def test_damaged_verdicts_are_named(make_run, key, value, message):
    run = make_run("a", {OPEN: ((2, 2), (5, 9))})
    write_trust(run, {OPEN: {"train": (10, 4, 10, 1), "validation": (0, 0, 10, 1)}, "fly": {}})
    plot_transfer.load([run])  # what is said of other tasks is not read
    path = f"{run}/diagnose/trust.json"
    record = json_files.read(path, "")
    record["units"][OPEN]["train"][key] = value
    json_files.write(path, record)
    with pytest.raises(ValueError, match=message):
        plot_transfer.load([run])
    json_files.write(path, [record])
    with pytest.raises(ValueError, match="trust.json is damaged .it holds a list, not a dict.; delete it"):
        plot_transfer.load([run])


def write_trust(run, counts):
    """Of each task and split: successes, those imagined solved, failures, those imagined solved."""

    def figures(successes, solved, failures, alarms):
        return {
            "attempts": successes + failures, "successes": successes,
            "successes_imagined": solved / successes if successes else None,
            "failures_imagined": 1 - alarms / failures if failures else None,
        }  # fmt: skip

    units = {task: {split: figures(*of) for split, of in splits.items()} for task, splits in counts.items()}
    json_files.write(f"{run}/diagnose/trust.json", {"units": units})


@pytest.mark.parametrize(
    ("folder", "names", "text"),
    [
        ("playtable_transfer", ["dreamer_v2_1", "dreamer_v2_2", "dreamer_v2_3", *WAM], "three_seeds/transfer.md"),
        ("playtable_best", WAM, "transfer.md"),
        ("calvin_ensemble", ["dreamer_v2_1", "wam_1"], "transfer.md"),
        ("playtable_best/bc_weight", WAM, "transfer.md"),
        ("playtable_ensemble", ["dreamer_v2_1", "dreamer_v2_2", "dreamer_v2_3", *WAM], "transfer.md"),
    ],
)
def test_the_published_numbers_are_those_of_the_command(folder, names, text):
    folder = helpers.ROOT / "docs/results" / folder
    loaded = plot_transfer.load([str(folder / name) for name in names])
    assert (folder / text).read_text() == plot_transfer.markdown(loaded)
