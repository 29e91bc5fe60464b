"""WAM's Tables III and IV: success of cloned and of fine-tuned policies, ours beside the paper's."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wam_jax import intervals, paper, tables
from wam_jax.specs import TASKS

NUMBERS = {"bc": "III", "ppo": "IV"}  # of the paper's tables, by stage
_CAPTIONS = {"bc": "after behavioural cloning", "ppo": "after PPO"}
_PLAYTABLE = (
    "**Playtable is another environment than the paper's**: an embedded table without an arm, with its own contacts, "
    "pictures and starts, and scripted play and demonstrations. Its columns are comparable with each other, not with "
    "the paper's."
)
_CALVIN = (
    "Columns of CALVIN are of its simulator, but their starts, play, demonstrations and sizes are the runs' own, not "
    "the paper's; docs/results says which."
)
_INTERACTIONS = (
    "Steps of a task's PPO, imagined and in the environment: iterations x rollouts x decisions x steps of a chunk. "
    "They are upper bounds: a rollout that succeeds ends early. What collecting and evaluating took is not counted."
)


@dataclasses.dataclass(frozen=True)
class Column:
    """One config's runs, which differ in their seed alone."""

    title: str
    environment: str
    rows: tuple[tables.Row, ...]  # of one stage, every seed and task
    demonstrations: int  # a task, of which the policy is cloned; of a given dataset at most, which may hold fewer
    demonstrations_given: bool  # a dataset was given, not collected for the run
    updates: int  # of the world model
    imagined_steps: int  # of PPO, a task
    environment_steps: int  # likewise
    outcomes: Mapping[str, np.ndarray]  # for each task bool [S, N] of rising seeds; empty: one seed, or not known


def compute(stage: str, columns: Sequence[Column], notes: Sequence[str] = ()) -> dict[str, Any]:
    """The table as JSON has it; `markdown` prints it.

    Args:
      stage: "bc" (Table III) or "ppo" (Table IV).
      columns: ours, in the order to print.
      notes: what else is to stand below.

    Raises:
      ValueError: a seed stands twice, is missing from a task, or has another number of episodes than the others.
    """
    environments = {column.environment for column in columns}
    notes = [
        f"Table {NUMBERS[stage]}: success in the environment {_CAPTIONS[stage]}, %.",
        _intervals(columns),
        *([_INTERACTIONS] if stage == "ppo" else []),
        *([tables.UNTRAINED] if any(row.untrained for column in columns for row in column.rows) else []),
        *([_PLAYTABLE] if "playtable" in environments else []),
        *([_CALVIN] if "calvin" in environments else []),
        *notes,
        paper.NOTES[stage],
    ]
    papers: dict[str, Any] = {
        method: {"tasks": paper.SUCCESS[stage][method], "means": paper.MEANS[stage][method]} for method in paper.METHODS
    }
    return {"stage": stage, "columns": [_column(column) for column in columns], "paper": papers, "notes": notes}


def _column(column: Column) -> dict[str, Any]:
    cells = {task: [row for row in column.rows if row.task == task] for task in TASKS}
    found = {task: rows for task, rows in cells.items() if rows}
    complete = len(found) == len(TASKS)  # the paper's mean is over all of them
    return {
        "title": column.title,
        "seeds": sorted({row.seed for row in column.rows}),
        "episodes": sorted({row.episodes for row in column.rows}),
        "tasks": {task: _estimate([rows], column.outcomes) for task, rows in found.items()},
        "untrained": [task for task, rows in found.items() if any(row.untrained for row in rows)],
        "mean": _estimate(list(found.values()), column.outcomes) if complete else None,
        "demonstrations": column.demonstrations,
        "demonstrations_given": column.demonstrations_given,
        "updates": column.updates,
        "imagined_steps": column.imagined_steps,
        "environment_steps": column.environment_steps,
    }


def _estimate(cells: Sequence[Sequence[tables.Row]], outcomes: Mapping[str, np.ndarray]) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), tables.success(cells, outcomes), strict=True))


def _intervals(columns: Sequence[Column]) -> str:
    numbers = [len({row.seed for row in column.rows}) for column in columns]
    unknown = [
        column.title for column, seeds in zip(columns, numbers, strict=True) if seeds > 1 and not column.outcomes
    ]
    texts = []
    if 1 in numbers:
        texts.append(
            "With one seed: the Wilson interval over its episodes, of the mean those of all tasks by square-and-add; "
            "another seed may lie outside."
        )
    if max(numbers) > 1:
        texts.append(
            "With several seeds: their mean; the interval is a bootstrap over seeds, drawn for all tasks together, and "
            f"over the starts, which all seeds share ({intervals.TABLE_RESAMPLES:,} draws); never narrower than one "
            "seed's with this success. With so few seeds it is rather too narrow where seeds differ."
        )
    if unknown:
        texts.append(tables.own_starts(unknown))
    return f"In brackets 95 % intervals. {' '.join(texts)}"


def markdown(table: dict[str, Any]) -> str:
    """The Markdown of a table that `compute` made: a line a task, the mean, then what each column used."""
    stage, columns = table["stage"], table["columns"]
    titles = [*(column["title"] for column in columns), *(f"paper: {method}" for method in table["paper"])]
    lines = [tables.line("task", titles), tables.line("---", ["---"] * len(titles))]
    for task in TASKS:
        ours = [tables.mark(_ours(column["tasks"].get(task)), task in column["untrained"]) for column in columns]
        theirs = [_theirs(found["tasks"].get(task)) for found in table["paper"].values()]
        lines.append(tables.line(task.replace("_", " "), [*ours, *theirs]))
    means = [_means(found["means"]) for found in table["paper"].values()]
    lines.append(tables.line("**mean**", [*(_ours(column["mean"], decimals=1) for column in columns), *means]))
    for label, cells, theirs in _used(stage, columns):
        lines.append(tables.line(label, [*cells, *theirs]))
    return "\n".join([*lines, *(line for note in table["notes"] for line in ("", note))]) + "\n"


def _used(stage: str, columns: Sequence[dict[str, Any]]) -> list[tuple[str, list[str], list[str]]]:
    """Label, our cells and the paper's of the lines below the mean."""

    def ours(key):
        return [f"{column[key]:,}" for column in columns]

    demonstrations = [
        f"at most {column['demonstrations']}, of a given dataset"
        if column["demonstrations_given"]
        else str(column["demonstrations"])
        for column in columns
    ]
    lines = [
        (
            "training seeds",
            [", ".join(map(str, column["seeds"])) for column in columns],
            [paper.SEEDS[stage][method] for method in paper.METHODS],
        ),
        ("episodes a task and seed", [tables.join(column["episodes"]) for column in columns], [paper.EPISODES] * 2),
        ("demonstrations a task", demonstrations, [str(paper.DEMONSTRATIONS)] * 2),
        ("updates of the world model", ours("updates"), [paper.UPDATES[method] for method in paper.METHODS]),
    ]
    if stage == "ppo":
        for index, (label, key) in enumerate((("imagined", "imagined_steps"), ("environment", "environment_steps"))):
            steps = [paper.INTERACTIONS[method][index] for method in paper.METHODS]
            lines.append((f"{label} steps of PPO a task", [_steps(column, key) for column in columns], steps))
    return lines


def _steps(column: dict[str, Any], key: str) -> str:
    steps = f"{column[key]:,}"
    return f"{steps}, at † 0" if column["untrained"] and column[key] else steps


def _ours(cell: dict[str, float] | None, decimals: int = 0) -> str:
    return "" if cell is None else tables.percent(cell["mean"], cell["low"], cell["high"], decimals)


def _theirs(cell: Sequence[float] | None) -> str:
    if cell is None:
        return paper.NOT_GIVEN
    decimals = max(len(str(value).partition(".")[2]) for value in cell)  # as many as the paper has
    return " ± ".join(f"{value:.{decimals}f}" for value in cell)


def _means(means: dict[str, float]) -> str:
    (_, first), (source, second) = means.items()
    return f"{first} ({source}: {second})"
