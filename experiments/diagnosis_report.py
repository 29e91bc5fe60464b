"""Pictures and summary of a diagnosis, drawn from its JSON files alone."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments import diagnosis_tables
from wam_jax import intervals, json_files
from wam_jax.calibration import STARTS, Point, rates

_TITLES = {
    "demonstrations": "imagined from PPO's starts",
    "real": "imagined from the real episodes' starts",
}
_MARKERS = {"bc": "o", "ppo": "s", " x ": "^", "noise": "x"}  # by what the policy's name holds; the last counts
_QUANTITIES = ("hand", "slider", "drawer", "switch", "lightbulb", "led", "block 1", "translation")
_COLOURS = {"success": "tab:green", "failure": "tab:red"}


def draw(part: str, record: dict[str, Any], path: str) -> None:
    """Draws one part's picture, to a temporary name first.

    Args:
      part: one of diagnoses.PARTS.
      record: what its JSON file holds.
      path: of the PNG.
    """
    figure = _DRAWINGS[part](record)
    figure.savefig(path + ".tmp", format="png", dpi=90)
    plt.close(figure)
    os.replace(path + ".tmp", path)


def write_summary(directory: str, left_out: dict[str, str]) -> str:
    """Writes summary.md over all parts that are in the folder; returns it.

    Args:
      directory: with the JSON files.
      left_out: by part, why it could not be measured now.
    """
    paths = {part: os.path.join(directory, f"{part}.json") for part in _DRAWINGS}
    mend = "delete it; the same command measures again"
    records = {part: json_files.read(path, mend) for part, path in paths.items() if os.path.exists(path)}
    text = diagnosis_tables.summary(records, {part: why for part, why in left_out.items() if part not in records})
    json_files.write_text(os.path.join(directory, "summary.md"), text)
    return text


def _trust(record: dict[str, Any]):
    units = record["units"]
    place = np.arange(len(units))
    figure, axes = plt.subplots(1, 2, figsize=(4 + 1.2 * len(units), 4.5), constrained_layout=True, sharey=True)
    for axis, key in zip(axes, ("successes", "failures"), strict=True):
        for shift, (source, title) in enumerate(diagnosis_tables.TRUST_SOURCES.items()):
            shares = _numbers([unit[source][f"{key}_imagined"] for unit in units.values()])
            axis.bar(place + 0.27 * (shift - 1), shares, 0.25, label=title)
        axis.set(title=f"recorded {key}", xlim=(-0.5, len(units) - 0.5), ylim=(0, 1.05))
        axis.set_xticks(place, [task.replace("_", " ") for task in units], rotation=45, ha="right", fontsize=8)
    axes[0].set_ylabel("share that imagination ends alike")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figure


def _calibration(record: dict[str, Any]):
    points = [Point(**unit) for unit in record["units"].values()]
    tasks = list(dict.fromkeys(point.task for point in points))
    figure, axes = plt.subplots(1, 2, figsize=(13, 6), constrained_layout=True, sharey=True)
    for axis, starts in zip(axes, STARTS, strict=True):
        axis.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":")
        for point in points:
            if both := rates(point, starts):
                _calibration_point(axis, point, both, f"C{tasks.index(point.task)}")
        figures = record["summary"].get(starts)
        axis.set(
            title=f"{_TITLES[starts]}\n"
            + (f"Pearson {diagnosis_tables.interval(figures['all']['pearson'])}" if figures else "there are none"),
            xlabel="success imagined", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03),
        )  # fmt: skip
    axes[0].set_ylabel("success outside")
    handles = [plt.Line2D([], [], color=f"C{i}", marker="o", linestyle="") for i in range(len(tasks))]
    handles += [plt.Line2D([], [], color="black", marker=m, linestyle="") for m in _MARKERS.values()]
    kinds = ["cloned", "PPO", "between (or past) the two", "with noise"]
    axes[1].legend(handles, [t.replace("_", " ") for t in tasks] + kinds, fontsize=8, loc="center left",
                   bbox_to_anchor=(1.01, 0.5))  # fmt: skip
    return figure


def _calibration_point(axis, point: Point, both: tuple[float, float], colour: str) -> None:
    x, y = both
    spans = [intervals.wilson(round(rate * point.episodes), point.episodes) for rate in (x, y)]
    marker = [mark for name, mark in _MARKERS.items() if name in point.policy][-1]
    (x_low, x_high), (y_low, y_high) = spans
    axis.errorbar(
        x, y, xerr=[[max(x - x_low, 0)], [max(x_high - x, 0)]], yerr=[[max(y - y_low, 0)], [max(y_high - y, 0)]],
        color=colour, marker=marker, markersize=6, linewidth=0.6, alpha=0.8,
    )  # fmt: skip


def _classifier(record: dict[str, Any]):
    units = record["units"]
    names = list(units)
    figure, axes = plt.subplots(1, 3, figsize=(5 + 0.9 * len(names), 5), constrained_layout=True)
    place = np.arange(len(names))
    for axis, key in zip(axes, ("precision", "recall"), strict=False):
        held_out = [diagnosis_tables.held_out(unit).get(key) for unit in units.values()]
        frames = [unit["frames"][key] for unit in units.values()]
        rule = [unit["rule"][key]["share"] for unit in units.values()]
        spans = [_span(unit["rule"][key], "share") for unit in units.values()]
        axis.bar(place - 0.27, _numbers(held_out), 0.25, label="frames, held-out play")
        axis.bar(place, _numbers(frames), 0.25, label="frames, this policy's episodes")
        axis.bar(place + 0.27, _numbers(rule), 0.25, yerr=np.transpose(spans), label="rule, this policy's episodes")
        axis.set(title=key, ylim=(0, 1.05))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    alarms = [unit["rule"]["episodes_with_false_alarms"] for unit in units.values()]
    spans = [_span(alarm, "share") for alarm in alarms]
    axes[2].bar(place, _numbers([alarm["share"] for alarm in alarms]), 0.5, yerr=np.transpose(spans), color="tab:red")
    axes[2].set(title="episodes with false alarms (share)", ylim=(0, None))
    for axis in axes:
        axis.set_xticks(place, [name.replace("_", " ") for name in names], rotation=60, ha="right", fontsize=7)
    return figure


def _open_loop(record: dict[str, Any]):
    units, horizons = record["units"], record["settings"]["horizons"]
    base = units.get("probes", {})
    lines = {name: unit for name, unit in units.items() if name != "probes"}
    figure, axes = plt.subplots(2, 4, figsize=(17, 8), constrained_layout=True)
    for axis, name in zip(axes.ravel(), _QUANTITIES, strict=True):
        for line, curves in lines.items():
            style = {"linestyle": "-" if line.endswith("soft") else "--", "label": line}
            style["color"] = f"C{sorted({key.split(',')[0] for key in lines}).index(line.split(',')[0])}"
            _band(axis, horizons, curves[name]["rmse"], curves[name]["low"], curves[name]["high"], **style)
        for reference, colour in (("filtered", "black"), ("standing_still", "grey")):
            curve = base.get(reference, {}).get(name)
            if curve:
                label = "filter that sees every frame" if reference == "filtered" else "state of the last seen frame"
                axis.plot(horizons, _numbers(curve["rmse"]), color=colour, linestyle=":", label=label)
        unit = next(iter(lines.values()), base.get("filtered", {})).get(name, {}).get("unit", "")
        ends = np.concatenate([_numbers(curves[name]["high"]) for curves in lines.values()] or [np.ones(1)])
        limits = (0, 1.2 * np.nanmax(ends))  # standing still may leave the picture
        axis.set(title=name, xlabel="step imagined", ylabel=f"RMSE ({unit})", ylim=limits)
    axes[0, 0].legend(fontsize=7)
    return figure


def _divergence(record: dict[str, Any]):
    """A row for each task; for each of its policies hand and mechanism side by side."""
    tasks: dict[str, list[str]] = {}
    for name in record["units"]:
        tasks.setdefault(name.partition("/")[0], []).append(name)
    shape = len(tasks), 2 * max(map(len, tasks.values()))
    figure, axes = plt.subplots(
        *shape, figsize=(4 * shape[1], 0.6 + 2.6 * shape[0]), constrained_layout=True, squeeze=False, sharex=True
    )
    for row, names in zip(axes, tasks.values(), strict=True):
        for place, name in enumerate(names):
            unit, pair = record["units"][name], row[2 * place : 2 * place + 2]
            for group, figures in unit["groups"].items():
                for axis, what in zip(pair, ("hand", "mechanism"), strict=True):
                    for kind, style in (("imagined", "-"), ("filtered", ":")):
                        _error_line(axis, figures, what, kind, color=_COLOURS[group], linestyle=style)
            title = name.replace("_", " ")
            pair[0].set(title=title, ylabel="error of the hand (cm)", ylim=(0, None))
            pair[1].set(title=title, ylabel=f"error of the {unit['mechanism']} ({unit['unit']})", ylim=(0, None))
    for axis in axes[-1]:
        axis.set_xlabel("step")
    handles = [plt.Line2D([], [], color=colour) for colour in _COLOURS.values()]
    handles += [plt.Line2D([], [], color="black", linestyle=style) for style in ("-", ":")]
    labels = ["real successes", "real failures", "imagined, same actions", "filter that sees every frame"]
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8)
    return figure


def _error_line(axis, figures: dict[str, Any], what: str, kind: str, **style) -> None:
    """A group's mean error by step, as long as five of its episodes run."""
    curve, length = figures["errors"][what][kind], sum(number >= 5 for number in figures["running"])
    steps = np.arange(1, length + 1)
    _band(axis, steps, *(curve[key][:length] for key in ("mean", "low", "high")), **style)


def _band(axis, x: Sequence[float] | np.ndarray, mean: Sequence, low: Sequence, high: Sequence, **style) -> None:
    if len(x):
        axis.plot(x, _numbers(mean), linewidth=1.2, **style)
        axis.fill_between(x, _numbers(low), _numbers(high), color=style["color"], alpha=0.12, linewidth=0)


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)


def _span(figures: dict[str, Any], key: str) -> tuple[float, float]:
    """Distances from a value to the ends of its interval, for error bars."""
    value, low, high = (0.0 if figures[k] is None else figures[k] for k in (key, "low", "high"))
    return max(value - low, 0.0), max(high - value, 0.0)


_DRAWINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "trust": _trust,
    "calibration": _calibration,
    "classifier": _classifier,
    "open_loop": _open_loop,
    "divergence": _divergence,
}
