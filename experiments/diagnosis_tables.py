"""The summary of a diagnosis in Markdown, made from what its JSON files hold."""

from collections.abc import Sequence
from typing import Any

from wam_jax.replay import PARTING

TRUST_SOURCES = {"demonstrations": "demonstrations", "train": "play", "validation": "play, held out"}
_STARTS = {"demonstrations": "PPO's starts", "real": "the real episodes' starts"}


def summary(records: dict[str, dict[str, Any]], left_out: dict[str, str]) -> str:
    """All parts, one after another.

    Args:
      records: by part, what its JSON file holds.
      left_out: by part, why it could not be measured.
    """
    sections = [_SECTIONS[part](record) for part, record in records.items() if record["units"]]
    ladder = _ladder(records)
    notes = [f"Not measured: {part} ({why})." for part, why in left_out.items()]
    return "\n\n".join(["# Diagnosis", *([ladder] if ladder else []), *sections, *notes]) + "\n"


def interval(figures: dict[str, Any], digits: int = 2) -> str:
    """A value with its interval: 0.53 [0.20, 0.80]."""
    ends = ", ".join(_number(figures[key], digits) for key in ("low", "high"))
    return f"{_number(figures['value'], digits)} [{ends}]"


def held_out(unit: dict[str, Any]) -> dict[str, float]:
    """The classifier's figures on held-out play; none where no attempt there succeeded."""
    figures = unit["data"].get("held_out", {})
    return figures if figures.get("success_share") else {}


def _ladder(records: dict[str, dict[str, Any]]) -> str:
    """From success outside to success imagined, step by step: which step loses how much."""
    points = records.get("calibration", {}).get("units", {})
    replays = records.get("divergence", {}).get("units", {})
    names = [name for name in replays if name in points]
    if not names:
        return ""
    header = ["task / policy", "real", "rule, real frames", "rule, same actions imagined", "imagined, real starts",
              "imagined, PPO's starts"]  # fmt: skip
    rows = []
    for name in names:
        replay, point = replays[name], points[name]
        counts = [replay[key] / replay["episodes"] for key in ("real", "rule_on_real_frames", "rule_on_imagination")]
        known = [point[key] for key in ("imagined_real", "demonstrations")]
        counts += [None if count is None else count / point["episodes"] for count in known]
        rows.append([name, *(_percent(count) for count in counts)])
    return "\n\n".join(
        [
            "## From outside to imagined",
            "Success in %. Each column changes one thing: the oracle for the reward rule, real frames for imagined "
            "ones under the actions that were executed, these actions for the policy's own in imagination, the starts.",
            table(header, rows),
        ]
    )


def _trust(record: dict[str, Any]) -> str:
    rows = []
    for task, unit in record["units"].items():
        for source, title in TRUST_SOURCES.items():
            of = unit[source]
            failures = of["attempts"] - of["successes"]
            rows.append(
                [task, title, str(of["successes"]), _percent(of["successes_imagined"]), str(failures),
                 _percent(of["failures_imagined"])]
            )  # fmt: skip
    return "\n\n".join(
        [
            "## Recorded attempts imagined",
            "Their own actions, imagined from the first frame; the reward rule beside the recorded end. No "
            f"step of the environment is needed. At most {record['settings']['num_episodes']} attempts of each kind. "
            "![bars](trust.png)",
            table(["task", "attempts", "solved", "solved in imagination, %", "failed", "failed there, %"], rows),
        ]
    )


def _calibration(record: dict[str, Any]) -> str:
    settings = record["settings"]
    lines = [
        "## Calibration",
        f"{settings['num_episodes']} episodes a policy and task, outside and in imagination each; starts of seed "
        f"{settings['start_seed']}, which are not the evaluation's. ![scatter](calibration.png)",
    ]
    for starts, text in _STARTS.items():
        figures = record["summary"].get(starts)
        if not figures:
            lines += [f"### Imagined from {text}", "There are none: imagination is trusted in no task (ppo.min_trust)."]
            continue
        scopes = {"all points": figures["all"], "within tasks": figures["within_tasks"]} | figures["tasks"]
        rows = [
            [scope, str(of["points"]), interval(of["pearson"]), interval(of["spearman"])]
            for scope, of in scopes.items()
        ]
        ceiling = figures["ceiling"]
        bins = [
            [f"{of['from']:.1f} to {of['to']:.1f}", str(of["points"]), _percent(of["imagined"]), _percent(of["real"])]
            for of in figures["table"]
        ]
        lines += [
            f"### Imagined from {text}",
            f"Imagined minus real: {_signed(figures['mean_error'])} points on average, "
            f"{_percent(figures['mean_absolute_error'])} without sign. A perfect imagination would correlate at "
            f"{_number(ceiling['all'], 2)} (within tasks {_number(ceiling['within_tasks'], 2)}) with so few episodes.",
            table(["over", "points", "Pearson [95 %]", "Spearman [95 %]"], rows),
            table(["imagined", "points", "mean imagined, %", "mean real, %"], bins),
        ]
    return "\n\n".join(lines)


def _classifier(record: dict[str, Any]) -> str:
    header = ["task / policy", "precision: play, held out", "here", "rule", "recall: play, held out", "here", "rule",
              "fires on failures", "false alarms an episode", "episodes with some",
              "delay, steps"]  # fmt: skip
    rows = []
    for name, unit in record["units"].items():
        data, frames, rule = held_out(unit), unit["frames"], unit["rule"]
        columns = [(data.get(key), frames[key], rule[key]["share"]) for key in ("precision", "recall")]
        failures, alarms = rule["fires_on_failures"], rule["episodes_with_false_alarms"]
        rows.append(
            [
                name,
                *(_percent(value) for column in columns for value in column),
                f"{failures['count']} of {failures['of']}",
                interval(rule["false_alarms_per_episode"]),
                f"{alarms['count']} of {alarms['of']} [{_percent(alarms['low'])}, {_percent(alarms['high'])} %]",
                _number(rule["delay"], 0),
            ]
        )
    return "\n\n".join(
        [
            "## Success classifier on real episodes",
            f"{record['settings']['num_episodes']} episodes each, all frames to the limit. Precision and recall in %: "
            "of frames one by one, on held-out play and here, and of the reward rule (frames in a row): of the "
            "episodes in which it fires, those that are solved at its first fire; of those that are solved, "
            "those in which it fires. ![bars](classifier.png)",
            table(header, rows),
        ]
    )


def _open_loop(record: dict[str, Any]) -> str:
    units, horizons = record["units"], record["settings"]["horizons"]
    base = units.get("probes")
    lines = ["## Linear probes and open loop"]
    if base:
        rows = [
            [source, name, figures["unit"], f"{figures['rmse']:.3g} [{figures['low']:.3g}, {figures['high']:.3g}]",
             _number(figures["r2"], 3)]
            for source, of_source in base["held_out"].items() if source != "penalties"
            for name, figures in of_source.items()
        ]  # fmt: skip
        lines += [
            f"Ridge regression on {base['train_windows']} windows of {base['window_length']} steps of play, measured "
            f"on {base['windows']} windows of its validation split. Intervals of 95 % are over windows; too narrow for "
            "what hardly changes within an episode, as the blocks. Latents in a row hold the action that led from one "
            "to the other, embeddings do not.",
            table(["what", "quantity", "unit", "RMSE [95 %]", "R2"], rows),
        ]
    curves = {name: unit for name, unit in units.items() if name != "probes"}
    references = {name.replace("_", " "): base[name] for name in ("filtered", "standing_still")} if base else {}
    lines += ["RMSE by steps imagined with true actions. ![curves](open_loop.png)"]
    for quantity in next(iter(curves.values()), {}):
        rows = [
            [name, *(f"{value:.3g}" for value in of[quantity]["rmse"])]
            for name, of in (curves | references).items()
            if quantity in of
        ]
        unit = next(iter(curves.values()))[quantity]["unit"]
        lines.append(table([f"{quantity} ({unit})", *map(str, horizons)], rows))
    return "\n\n".join(lines)


# Of a group of episodes, what the reward rule calls solved; figures of before they were counted have none.
_SOLVED = ("rule_on_real_frames", "rule_on_imagination", "rule_with_recorded_robot")


def _divergence(record: dict[str, Any]) -> str:
    header = ["task / policy", "episodes", "hand: imagined, step 10", "step 20", "filtered, step 20", "hands part",
              "median step", "agree", "early", "late", "missed", "made up", "median step of disagreement",
              "solved on real frames", "in imagination", "the robot moving as recorded"]  # fmt: skip
    rows = []
    for name, unit in record["units"].items():
        for group, figures in unit["groups"].items():
            hand = figures["errors"]["hand"]
            parting, verdicts = figures["parting"], figures["verdicts"]
            rows.append(
                [
                    name,
                    f"{figures['episodes']} {group}",
                    _at(hand["imagined"]["mean"], 10),
                    _at(hand["imagined"]["mean"], 20),
                    _at(hand["filtered"]["mean"], 20),
                    f"{parting['episodes']} of {parting['of']}",
                    _number(parting["median_step"], 0),
                    *(str(number) for number in verdicts.values()),
                    _number(figures["disagreement"]["median_step"], 0),
                    *(_number(figures.get(key), 0) for key in _SOLVED),
                ]
            )
    parting_cm = record["settings"].get("parting_cm", PARTING)  # figures of before it was noted
    return "\n\n".join(
        [
            "## Where imagination and the environment part",
            "Real episodes, and the actions that were executed in them imagined from their first frame. Errors of the "
            f"hand in cm, while the episode runs; the hands part where imagination and filter from then on decode "
            f"places {parting_cm:g} cm apart. Then the reward rule on imagination beside the oracle: it alone fires "
            "(made up), it never does (missed), it fires early or late. Last, how many the rule calls solved: on the "
            "real frames, in imagination, and in one whose robot's state is the recorded one at each step, of models "
            "that carry it. ![curves](divergence.png)",
            table(header, rows),
        ]
    )


def _at(values: Sequence[float | None], step: int) -> str:
    return _number(values[step - 1], 1) if len(values) >= step else ""


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return _number(None if value is None else 100 * value, 0)


def _signed(value: float) -> str:
    return f"{100 * value:+.0f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_SECTIONS = {
    "trust": _trust,
    "calibration": _calibration,
    "classifier": _classifier,
    "open_loop": _open_loop,
    "divergence": _divergence,
}
