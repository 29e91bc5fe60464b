"""Differences in success between two policies from the same starts: paired intervals and McNemar's test."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from wam_jax import intervals, tables
from wam_jax.specs import TASKS


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two policies a task and training seed; differences are `first` minus `second`."""

    title: str
    seeds: tuple[int, ...]  # S of them, of both
    first: Mapping[str, np.ndarray]  # for each task bool [S, N], success of each seed from each start
    second: Mapping[str, np.ndarray]  # likewise, from the same starts
    untrained: frozenset[str] = frozenset()  # tasks that PPO did not train, on either side


def mcnemar(first_only: int, second_only: int) -> float:
    """McNemar's exact two-sided p of the discordant pairs, those where one of two policies succeeded alone."""
    total = first_only + second_only
    return float(binomtest(first_only, total).pvalue) if total else 1.0


def compute(comparisons: Sequence[Comparison], notes: Sequence[str] = ()) -> dict[str, Any]:
    """The table as JSON has it; `markdown` prints it. Differences are in points, hundredths of success.

    Args:
      comparisons: a column each.
      notes: what else is to stand below.

    Raises:
      ValueError: two sides of a comparison have other tasks or numbers of episodes.
    """
    columns = [_column(comparison) for comparison in comparisons]
    marked = [tables.UNTRAINED] if any(column["untrained"] for column in columns) else []
    return {"columns": columns, "notes": [_caption(columns), *marked, *notes]}


def _column(comparison: Comparison) -> dict[str, Any]:
    first, second = comparison.first, comparison.second
    if first.keys() != second.keys():
        only = sorted(first.keys() ^ second.keys())
        raise ValueError(
            f"{comparison.title}: {', '.join(only)} on one side alone; evaluate the same tasks of "
            "both, or compare those that both have (print_table --tasks)"
        )
    for task in first:
        if first[task].shape != second[task].shape:
            counts = f"{first[task].shape[1]} and {second[task].shape[1]}"
            raise ValueError(
                f"{comparison.title}, {task}: {counts} episodes; evaluate both with one config.evaluation.num_episodes"
            )
    tasks = [task for task in TASKS if task in first]
    differences = [first[task].astype(int) - second[task].astype(int) for task in tasks]
    more = [int((values > 0).sum()) for values in differences]
    less = [int((values < 0).sum()) for values in differences]
    more, less = [*more, sum(more)], [*less, sum(less)]
    mean, low, high = 100 * np.array(intervals.of_starts(differences))
    cells = [
        {
            "mean": float(mean[i]),
            "low": float(low[i]),
            "high": float(high[i]),
            "first_only": more[i],
            "second_only": less[i],
            "p": mcnemar(more[i], less[i]) if len(comparison.seeds) == 1 else None,
        }
        for i in range(len(tasks) + 1)
    ]
    return {
        "title": comparison.title,
        "seeds": list(comparison.seeds),
        "episodes": sorted({values.shape[1] for values in differences}),
        "tasks": dict(zip(tasks, cells[:-1], strict=True)),
        "untrained": sorted(comparison.untrained),
        "mean": cells[-1],
    }


def _caption(columns: Sequence[dict[str, Any]]) -> str:
    text = (
        "Differences in success in the environment, points [95 % interval], paired by start; the mean is over all "
        "tasks of the column. In parentheses the pairs in which the first alone and the second alone succeeded"
    )
    if any(len(column["seeds"]) == 1 for column in columns):
        text += ", with one seed McNemar's exact two-sided p"
    text += (
        f". The interval is a bootstrap over starts ({intervals.TABLE_RESAMPLES:,} draws), the same for all seeds; "
        "where no pair differs it has no width, which proves nothing beyond the number of pairs."
    )
    if any(len(column["seeds"]) > 1 for column in columns):
        text += " Several seeds are drawn anew too, for all tasks together; so few make it rather too narrow."
    if any(len(column["seeds"]) == 1 for column in columns):
        text += " One seed speaks of these trained policies, not of another training."
    return text


def markdown(table: dict[str, Any]) -> str:
    """The Markdown of a table that `compute` made: a line a task, a column for each comparison."""
    columns = table["columns"]
    tasks = [task for task in TASKS if any(task in column["tasks"] for column in columns)]
    lines = [
        tables.line("task", [column["title"] for column in columns]),
        tables.line("---", ["---"] * len(columns)),
        *(
            tables.line(
                task.replace("_", " "),
                [tables.mark(_cell(column["tasks"].get(task)), task in column["untrained"]) for column in columns],
            )
            for task in tasks
        ),
        tables.line("**mean**", [_cell(column["mean"]) for column in columns]),
        tables.line("training seeds", [", ".join(map(str, column["seeds"])) for column in columns]),
        tables.line("episodes a task and seed", [tables.join(column["episodes"]) for column in columns]),
    ]
    return "\n".join([*lines, *(line for note in table["notes"] for line in ("", note))]) + "\n"


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    p = "" if cell["p"] is None else f"; p {cell['p']:.3f}" if cell["p"] >= 0.001 else "; p < 0.001"
    pairs = f"{cell['first_only']} : {cell['second_only']}{p}"
    return f"{cell['mean']:+.1f} [{cell['low']:+.1f}, {cell['high']:+.1f}] ({pairs})"
