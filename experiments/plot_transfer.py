"""Draws what imagination says beside what happens outside, over the policies of several finished runs.

python -m experiments.plot_transfer runs/wam_1 runs/wam_2 --output=transfer.png

Left, success imagined against success outside, an arrow from each cloned policy to what PPO made of it; right, what PPO
gained outside by what imagination gave the cloned policy. The same in numbers is printed, and written beside the
picture as Markdown. Read from the runs' config.json and table.json; imagination begins where the evaluated episodes do.
Where every run has diagnose/trust.json (experiments.diagnose --only=trust) with successes and failures of each task,
success imagined is also shown corrected for how often imagination misses play's successes and makes up others.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from absl import flags

from experiments import runs
from experiments.diagnosis_tables import interval, table
from wam_jax import calibration, cli, intervals, json_files, tables

EDGES = (0.0, 0.6, 0.8, 0.9, 1.0)  # of success imagined of the cloned policy
_LOSS = 0.02  # a task that falls by more has lost
_NO_CORRELATION = "-"
_SPLITS = ("train", "validation")  # of play, whose attempts say how imagination errs
_TRUST_MEND = "delete it and run experiments.diagnose --only=trust with the run's config and workdir again"


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """What imagination makes of a task's recorded attempts in play, under their own actions."""

    recall: float  # share of the successes that is imagined solved
    false_alarms: float  # share of the failures that is imagined solved


@dataclasses.dataclass(frozen=True)
class Change:
    """What PPO made of one cloned policy: success imagined, success outside."""

    run: str
    task: str
    before: tuple[float, float]
    after: tuple[float, float]
    verdicts: Verdicts | None = None  # None where diagnose/trust.json has no successes and failures of the task

    @property
    def gain(self) -> float:
        """In success outside."""
        return self.after[1] - self.before[1]

    @property
    def corrected(self) -> "Change | None":
        """With the success imagined that `calibration.corrected` makes of it; None without verdicts."""
        if self.verdicts is None:
            return None
        before, after = (
            (calibration.corrected(imagined, self.verdicts.recall, self.verdicts.false_alarms), real)
            for imagined, real in (self.before, self.after)
        )
        return dataclasses.replace(self, before=before, after=after)


def main(workdirs: Sequence[str]) -> None:
    """Prints the numbers and writes the picture, both where --output says."""
    path = _OUTPUT.value
    text_path = path.removesuffix(".png") + ".md"
    cli.check_output(path, ".png")
    cli.check_output(text_path, ".md")
    changes = load(workdirs)
    text = markdown(changes)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    draw(changes, path)
    json_files.write_text(text_path, text)
    print(text)
    print(f"written to {path} and {text_path}")


def load(workdirs: Sequence[str]) -> list[Change]:
    """Reads the policies of finished runs.

    Raises:
      ValueError: there is none; or one is named twice, of another environment, or lacks a stage or imagination of one.
    """
    if not workdirs or "" in workdirs:
        raise ValueError("name at least one workdir, e.g. python -m experiments.plot_transfer runs/quickstart")
    runs.check_distinct(workdirs)
    loaded = [runs.load(workdir) for workdir in workdirs]
    environments = sorted({run.config["environment"] for run in loaded})
    if len(environments) > 1:
        raise ValueError(f"runs of {' and '.join(environments)}: draw them apart, their tasks differ in all but name")
    return [change for run in loaded for change in _changes(run)]


def _changes(run: runs.Run) -> list[Change]:
    rows = {(row.task, row.stage): row for row in run.rows}
    tasks = list(dict.fromkeys(row.task for row in run.rows if row.stage == "ppo" and not row.untrained))
    if not tasks:
        raise ValueError(f"{run.name}/table.json has no policy that PPO trained; run experiments.evaluate --policy=ppo")
    both = {(task, stage): _rates(run.name, rows.get((task, stage)), task, stage)
            for task in tasks for stage in ("bc", "ppo")}  # fmt: skip
    verdicts = _verdicts(run.name, tasks)
    return [Change(run.name, task, both[task, "bc"], both[task, "ppo"], verdicts.get(task)) for task in tasks]


def _verdicts(name: str, tasks: Sequence[str]) -> dict[str, Verdicts]:
    """Of each task, over both splits of play.

    Without tasks that were not judged, or of which play has no success or no failure.
    """
    path = _trust_path(name)
    if not os.path.exists(path):
        return {}
    units = json_files.read(path, _TRUST_MEND, dict).get("units")
    if not isinstance(units, dict):
        raise ValueError(f"{path} has no units of tasks; {_TRUST_MEND}")
    found = {}
    for task in (task for task in tasks if task in units):
        unit = units[task] if isinstance(units[task], dict) else {}
        counts = np.sum([_counts(f"{path}: {task}, {split}", unit.get(split)) for split in _SPLITS], axis=0)
        successes, solved, failures, alarms = counts
        if successes and failures:
            found[task] = Verdicts(float(solved / successes), float(alarms / failures))
    return found


def _counts(where: str, figures: Any) -> tuple[float, float, float, float]:
    """Successes, those imagined solved, failures, those imagined solved, of a split's figures of `trust.agreement`."""
    figures = figures if isinstance(figures, dict) else {}

    def number(key, low, high, kinds, *, empty=False):
        value = figures.get(key)
        if empty and value is None:
            return 0.0
        if type(value) not in kinds or not low <= value <= high:
            raise ValueError(f"{where}: {key} is {value!r}, expected {low} to {high}; {_TRUST_MEND}")
        return value

    attempts = number("attempts", 0, 10**9, (int,))
    successes = number("successes", 0, attempts, (int,))
    failures = attempts - successes
    solved = number("successes_imagined", 0, 1, (int, float), empty=not successes)
    failed = number("failures_imagined", 0, 1, (int, float), empty=not failures)
    return successes, successes * solved, failures, failures * (1 - failed)


def _rates(name: str, row: tables.Row | None, task: str, stage: str) -> tuple[float, float]:
    if row is None or row.imagined_success is None:
        missing = "row" if row is None else "imagined success"
        raise ValueError(
            f"{name}/table.json has no {missing} of {task} at stage {stage}; run experiments.evaluate --policy={stage} "
            "with this --workdir"
        )
    return row.imagined_success, row.success


def _names(workdirs: Sequence[str]) -> list[str]:
    """Short names, whole paths where those are not enough."""
    short = [os.path.basename(os.path.normpath(workdir)) for workdir in workdirs]
    return short if len(set(short)) == len(short) else list(workdirs)


def markdown(changes: Sequence[Change]) -> str:
    """The numbers behind the picture."""
    scopes = _scopes(changes) | {
        "what PPO changed": [(c.task, c.after[0] - c.before[0], c.gain) for c in changes],
        "imagined of the cloned policy, and gain outside": [(c.task, c.before[0], c.gain) for c in changes],
    }
    if corrected := _corrected(changes):
        scopes |= {f"{name}, corrected": points for name, points in _scopes(corrected).items()}
    correlations = [
        [scope, str(len(points)), *(_correlation(points, centred=centred) for centred in (False, True))]
        for scope, points in scopes.items()
    ]
    groups = [(low, high, [c for c in changes if low <= c.before[0] < high or c.before[0] == high == 1])
              for low, high in zip(EDGES, EDGES[1:], strict=False)]  # fmt: skip
    gains = [_line(f"{100 * low:.0f} to {100 * high:.0f}", group) for low, high, group in groups if group]
    return "\n\n".join([
        f"{len(changes)} cloned policies and what PPO made of them; runs: "
        f"{', '.join(_names(list(dict.fromkeys(c.run for c in changes))))}.",
        table(["success imagined and outside, over", "points", "Pearson [95 %]", "within tasks [95 %]"], correlations),
        table(["imagined of the cloned policy, %", "policies", "cloned outside, %", "gain outside, points [95 %]",
                f"lose more than {100 * _LOSS:.0f} points"], [*gains, _line("all", changes)]),
        "Intervals draw tasks anew, then each task's policies (correlations), or policies (gains); policies of one run "
        "share a world model, which makes them rather too narrow.",
        *[f"{_NO_CORRELATION}: too few points differ."] * any(_NO_CORRELATION in row for row in correlations),
        *_uncorrected(changes),
    ]) + "\n"  # fmt: skip


def _trust_path(run: str) -> str:
    return os.path.join(run, "diagnose", "trust.json")


def _corrected(changes: Sequence[Change]) -> list[Change]:
    """All of them corrected, but for those whose verdicts say nothing; none at all if one has no verdicts."""
    corrected = [change.corrected for change in changes]
    known = [change for change in corrected if change]
    return [change for change in known if np.isfinite(change.before[0])] if len(known) == len(changes) else []


def _uncorrected(changes: Sequence[Change]) -> list[str]:
    """A sentence on the policies that could not be corrected, where any run has been asked for it."""
    lacking = [change for change in changes if change.verdicts is None]
    mute = [c for c in changes if c.corrected and not np.isfinite(c.corrected.before[0])]
    asked = any(os.path.exists(_trust_path(change.run)) for change in changes)
    if lacking and asked:
        why = "Nothing is corrected: diagnose/trust.json (--only=trust) has no successes and failures of play of these"
        return [f"{why}: {_listed(lacking)}."]
    if mute:
        why = "Left out of what is corrected, as play's failures are imagined solved as often as its successes"
        return [f"{why}: {_listed(mute)}."]
    return []


def _listed(changes: Sequence[Change]) -> str:
    tasks: dict[str, list[str]] = {}
    for change in changes:
        tasks.setdefault(change.run, []).append(change.task)
    return "; ".join(f"{run}: {', '.join(of_run)}" for run, of_run in tasks.items())


def _scopes(changes: Sequence[Change]) -> dict[str, list[tuple[str, float, float]]]:
    """Task, success imagined and outside of the policies that each row is about."""
    return {
        "all policies": [(c.task, *end) for c in changes for end in (c.before, c.after)],
        "cloned": [(c.task, *c.before) for c in changes],
        "after PPO": [(c.task, *c.after) for c in changes],
    }


def _correlation(points: Sequence[tuple[str, float, float]], *, centred: bool) -> str:
    tasks = dict.fromkeys(task for task, *_ in points)
    groups = [np.array([both for task, *both in points if task == name]) for name in tasks]
    found = intervals.of_groups(intervals.pearson, groups, centred=centred)
    return interval(found) if np.isfinite(found["low"]) else _NO_CORRELATION


def _line(title: str, changes: Sequence[Change]) -> list[str]:
    gains = 100 * np.array([change.gain for change in changes])
    low, high = intervals.of_mean(gains)
    span = f" [{low:+.1f}, {high:+.1f}]" if len(gains) > 1 else ""
    return [title, str(len(changes)), f"{100 * np.mean([c.before[1] for c in changes]):.1f}",
            f"{gains.mean():+.1f}{span}", str(int((gains < -100 * _LOSS).sum()))]  # fmt: skip


def draw(changes: Sequence[Change], path: str) -> None:
    """Writes the picture, to a temporary name first."""
    scatters = {"success imagined, %": list(changes)}
    if corrected := _corrected(changes):
        scatters["success imagined, corrected by play's attempts, %"] = corrected
    figure, (*lefts, right) = plt.subplots(
        1, len(scatters) + 1, figsize=(7 * (len(scatters) + 1), 6), constrained_layout=True
    )
    tasks = list(dict.fromkeys(change.task for change in changes))
    colours = {task: f"C{i}" for i, task in enumerate(tasks)}
    for axis, (title, points) in zip(lefts, scatters.items(), strict=True):
        _scatter(axis, points, colours)
        axis.set_xlabel(title)
    right.axhline(0, color="grey", linewidth=1, linestyle=":")
    for change in changes:
        right.plot(100 * change.before[0], 100 * change.gain, "o", color=colours[change.task])
    right.set(
        title="what PPO gained", xlim=(-3, 103),
        xlabel="success imagined of the cloned policy, %", ylabel="gain in success outside, points",
    )  # fmt: skip
    handles = [plt.Line2D([], [], color=colours[task], marker="o", linestyle="") for task in tasks]
    right.legend(handles, [task.replace("_", " ") for task in tasks], fontsize=9)
    figure.savefig(path + ".tmp", format="png", dpi=90)
    plt.close(figure)
    os.replace(path + ".tmp", path)


def _scatter(axis, changes: Sequence[Change], colours: dict[str, str]) -> None:
    axis.plot([0, 100], [0, 100], color="grey", linewidth=1, linestyle=":")
    for change in changes:
        before, after = (100 * np.array(end) for end in (change.before, change.after))
        colour = colours[change.task]
        axis.annotate("", after, before, arrowprops={"arrowstyle": "->", "color": colour, "alpha": 0.5})
        axis.plot(*before, "o", markerfacecolor="white", color=colour)
        axis.plot(*after, "o", color=colour)
    axis.set(
        title="hollow: cloned; filled: after PPO in imagination", xlim=(-3, 103), ylim=(-3, 103), aspect="equal",
        ylabel="success outside, %",
    )  # fmt: skip


if __name__ == "__main__":  # its flags are its own: tests import many binaries into one process
    _OUTPUT = flags.DEFINE_string("output", "transfer.png", "Picture to write; the numbers go beside it, as .md")
    cli.run(main, takes="workdirs")
