"""The table of predictions: WAM's Table I, ours beside its own."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from wam_jax import json_files, paper

FILE = "prediction.json"
METHODS = ("dreamer_v2", "wam")  # in the order of the printed columns
CAMERAS = ("static", "gripper", "both")
METRICS = {"psnr": "PSNR, dB (up)", "ssim": "SSIM (up)", "lpips": "LPIPS (down)", "fvd": "FVD (down)"}
DECIMALS = {"psnr": 2, "ssim": 3, "lpips": 3, "fvd": 2}
_SAME = ("environment", "dataset", "windows", "context", "horizon")  # then windows can be compared one by one
_NEEDED = (
    "environment",
    "method",
    "seed",
    "dataset",
    "num_windows",
    "episodes",
    "horizon",
    "context",
    "windows",
    "metrics",
    "per_window",
)


def load(path: str) -> dict[str, Any]:
    """Reads the results that `experiments.evaluate_prediction` wrote.

    Raises:
      ValueError: there are none, or they are damaged.
    """
    if not os.path.exists(path):
        raise ValueError(f"no predictions {path}; run experiments.evaluate_prediction with its --workdir first")
    mend = "remove it and run experiments.evaluate_prediction again"
    results = json_files.read(path, mend, dict)
    missing = [key for key in _NEEDED if key not in results]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; {mend}")
    for key in ("metrics", "per_window"):
        if not isinstance(results[key], dict):
            raise ValueError(f"{path}: {key} is {results[key]!r}, expected figures by name; {mend}")
    for metric, cameras in results["metrics"].items():
        if not isinstance(cameras, dict) or not all(_is_figure(cameras.get(camera)) for camera in CAMERAS):
            raise ValueError(f"{path}: {metric} has no figure of each of {', '.join(CAMERAS)}; {mend}")
    return results


def _is_figure(found: Any) -> bool:
    """Whether a camera's entry is one number, or a mean with its spread."""
    values = [found.get(key) for key in ("mean", "std", "low", "high")] if isinstance(found, dict) else [found]
    return all(isinstance(value, float | int) for value in values)


def markdown(runs: Mapping[str, dict[str, Any]]) -> str:
    """A Markdown table: a line per metric and camera, a column per run, then the paper's.

    Args:
      runs: by the name of their workdir, what `load` returns.
    """
    order = sorted(runs, key=lambda name: (runs[name]["environment"], METHODS.index(runs[name]["method"])))
    titles = [f"{runs[name]['environment']}: {runs[name]['method']}" for name in order]
    titles = [f"{name}, {x}" if titles.count(x) > 1 else x for name, x in zip(order, titles, strict=True)]
    results = [runs[name] for name in order]
    lines = [_line("", "", [*titles, *(f"paper: {method}" for method in METHODS)])]
    lines.append(_line("---", "---", ["---"] * (len(titles) + len(METHODS))))
    for metric, label in METRICS.items():
        for camera in CAMERAS:
            cells = [_cell(result, metric, camera) for result in results]
            if any(cells) or camera == CAMERAS[-1]:
                papers = [_paper(method, metric) if camera == CAMERAS[-1] else "" for method in METHODS]
                lines.append(_line(label, camera, [*cells, *papers]))
        for camera in CAMERAS if any(f"still_{metric}" in result["metrics"] for result in results) else ():
            cells = [_cell(result, f"still_{metric}", camera) for result in results]
            lines.append(_line(label, f"{camera}, held", [*cells, *[""] * len(METHODS)]))
    return "\n".join([*lines, "", *_notes(results)]) + "\n"


def _line(label: str, camera: str, cells: Sequence[str]) -> str:
    return f"| {label} | {camera} | {' | '.join(cells)} |"


def _cell(result: dict[str, Any], metric: str, camera: str) -> str:
    found = result["metrics"].get(metric)
    if found is None:
        return ""
    decimals = DECIMALS[metric.removeprefix("still_")]
    if not isinstance(found[camera], dict):
        return f"{found[camera]:.{decimals}f}"
    mean, std, low, high = (f"{found[camera][key]:.{decimals}f}" for key in ("mean", "std", "low", "high"))
    return f"{mean} ± {std} [{low}, {high}]"


def _paper(method: str, metric: str) -> str:
    return " ± ".join(f"{x:.{DECIMALS[metric]}f}" for x in paper.PREDICTION[method][metric])


def _notes(results: Sequence[dict[str, Any]]) -> list[str]:
    kinds = {(r["horizon"], r["num_windows"], r["episodes"], r["context"]) for r in results}
    windows = "; ".join(f"{h} steps after {c} real, {n} windows of {e} episodes" for h, n, e, c in sorted(kinds))
    notes = [
        f"Open-loop prediction of validation play from true actions ({windows}): mean ± standard deviation over "
        "windows [95 % interval of the mean, as if windows were independent; those of one episode may overlap]. "
        "`both` is the mean of the cameras, `held` stands for the last real frame seen, held still."
    ]
    notes += _paired(results)
    skipped = [name for name in ("lpips", "fvd") if not all(name in result["metrics"] for result in results)]
    if skipped:
        flags = {"lpips": "--lpips_alexnet and --lpips_linear", "fvd": "--i3d"}
        notes.append(
            f"Empty cells of {' and '.join(name.upper() for name in skipped)}: skipped, since no weights were given "
            f"(evaluate_prediction {' '.join(flags[name] for name in skipped)})."
        )
    if any("fvd" in result["metrics"] for result in results):
        notes.append(
            "FVD of so few videos is too large, so only those of equally many are to be compared. **Of FVD only our "
            "own columns compare**: FVD's reference takes the I3D of TF-Hub, ours is the one that pytorch-i3d "
            "publishes, and the paper does not say which it took."
        )
    return [line for note in (*notes, paper.PREDICTION_NOTE) for line in (note, "")][:-1]


def _paired(results: Sequence[dict[str, Any]]) -> list[str]:
    """WAM minus DreamerV2 window by window, where there is one of each on the same windows."""
    if [result["method"] for result in results] != list(METHODS):
        return []
    baseline, wam = results
    if any(baseline[key] != wam[key] for key in _SAME):
        return []
    texts = []
    for metric, label in METRICS.items():
        if metric in baseline["per_window"] and metric in wam["per_window"]:
            first, second = (np.mean(result["per_window"][metric], axis=0) for result in (baseline, wam))
            interval = scipy.stats.ttest_1samp(second - first, 0).confidence_interval(0.95)
            mean, low, high = (f"{x:+.{DECIMALS[metric] + 1}f}" for x in (np.mean(second - first), *interval))
            texts.append(f"{label.split(',')[0].split(' ')[0]} {mean} [{low}, {high}]")
    return [f"wam minus dreamer_v2, window by window, both cameras: {', '.join(texts)}."]
