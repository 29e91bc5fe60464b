"""Rows of results and their tables: one format for every evaluation of the project."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

import numpy as np

from wam_jax import intervals, json_files
from wam_jax.specs import TASKS

STAGES = ("expert", "bc", "ppo")  # in the order of the printed columns
_MARK = " †"  # of a cell whose policy PPO left as it was
UNTRAINED = (
    "† No step of PPO, in one seed or more: imagination is not trusted there (config.ppo.min_trust), and the policy is "
    "still the cloned one."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One evaluation: a method's policy at one stage on one task."""

    environment: str
    method: str  # wam, dreamer_v2, ...; "-" where no world model takes part
    task: str
    stage: str
    successes: int
    episodes: int
    success: float  # successes / episodes
    low: float  # 95 % Wilson interval
    high: float
    imagined_success: float | None  # of the same policy from the same starts inside the world model
    seed: int
    simulator: str = ""  # versions and assets that decide its last bits; empty where only this repository does
    untrained: bool = False  # of stage ppo: imagination was not trusted, and the policy is the cloned one


@dataclasses.dataclass(frozen=True)
class Episode:
    """One evaluated episode; a row sums up those of its task."""

    task: str
    number: int  # of its start
    success: bool
    steps: int  # until the oracle found it solved; the limit where it did not
    simulator: str = ""  # as in Row


def make_row(
    *,
    environment: str,
    method: str,
    task: str,
    stage: str,
    successes: int,
    episodes: int,
    imagined_success: float | None,
    seed: int,
    simulator: str = "",
) -> Row:
    """A row with its success rate and 95 % Wilson interval."""
    low, high = intervals.wilson(successes, episodes)
    rate = successes / episodes
    return Row(
        environment, method, task, stage, successes, episodes, rate, low, high, imagined_success, seed, simulator
    )


def save(path: str, rows: Sequence[Row | Episode]) -> None:
    """Writes rows, or episodes, as a JSON list."""
    json_files.write(path, [dataclasses.asdict(row) for row in rows])


def load(path: str) -> list[Row]:
    """Reads rows.

    Raises:
      ValueError: there is no such table, or it is not one.
    """
    if not os.path.exists(path):
        raise ValueError(
            f"no table {path}; run experiments.evaluate (or experiments.reproduce) with its --workdir first"
        )
    return _load(path, Row)


def load_episodes(path: str) -> list[Episode]:
    """Reads episodes; there are none where there is no file.

    Raises:
      ValueError: the file does not hold episodes.
    """
    return _load(path, Episode) if os.path.exists(path) else []


def _load(path: str, kind: type) -> list:
    mend = "remove it and evaluate again"
    try:
        found = [kind(**row) for row in json_files.read(path, mend, list)]
    except TypeError as error:
        raise ValueError(f"{path} is not a table of results ({error}); {mend}") from error
    for number, one in enumerate(found):
        if wrong := _wrong(one):
            raise ValueError(f"{path}, entry {number}: {wrong}={getattr(one, wrong)!r} cannot be; {mend}")
    return found


def _wrong(one: Row | Episode) -> str:
    """The name of a field whose value cannot be; empty where all can."""
    for field in dataclasses.fields(one):
        value, kind = getattr(one, field.name), cast(Any, field.type)
        kind = kind | int if float in (kind, *get_args(kind)) else kind  # JSON has 1.0 as 1, too
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            return field.name
    if one.task not in TASKS:
        return "task"
    if isinstance(one, Row):
        rate = one.imagined_success
        possible = {
            "stage": one.stage in STAGES,
            "episodes": one.episodes >= 1,
            "successes": 0 <= one.successes <= one.episodes,
            "imagined_success": rate is None or 0 <= rate <= 1,
        }
        possible["success"] = possible["episodes"] and math.isclose(one.success, one.successes / one.episodes)
        return next((name for name, can_be in possible.items() if not can_be), "")
    return "" if min(one.number, one.steps) >= 0 else "number" if one.number < 0 else "steps"


def success(
    cells: Sequence[Sequence[Row]], outcomes: Mapping[str, np.ndarray] | None = None
) -> tuple[float, float, float]:
    """Success over tasks and seeds with its 95 % interval, as `intervals.of_success` has it.

    Args:
      cells: of each task its rows, one for each seed.
      outcomes: for each task bool [S, N], success of each seed, rising, from each start; None or empty: not known.

    Returns:
      mean, low and high.

    Raises:
      ValueError: a seed stands twice, is missing from a task, or has another number of episodes than the others.
    """
    seeds = sorted(row.seed for row in cells[0])
    for rows in cells:
        name = f"{_title(_column(rows[0]))}, {rows[0].task}"
        found = sorted(row.seed for row in rows)
        for twice in sorted({seed for seed in found if found.count(seed) > 1}):
            raise ValueError(f"two rows for {name}, seed {twice}; give each once")
        if found != seeds:
            raise ValueError(f"{name} has seeds {found}, {cells[0][0].task} has {seeds}; evaluate all of them")
        if len({row.episodes for row in rows}) > 1:
            counts = ", ".join(f"{row.episodes} (seed {row.seed})" for row in rows)
            raise ValueError(f"{name}: {counts} episodes; evaluate all seeds with one config.evaluation.num_episodes")
    ordered = [sorted(rows, key=lambda row: row.seed) for rows in cells]
    successes = np.array([[row.successes for row in rows] for rows in ordered]).T
    by_start = [outcomes[rows[0].task] for rows in cells] if outcomes else []
    return intervals.of_success(successes, np.array([rows[0].episodes for rows in ordered]), by_start)


def own_starts(titles: Sequence[str]) -> str:
    """What is to be said of columns of several seeds whose single episodes are not known."""
    return (
        f"Of {', '.join(titles)} a run lacks evaluation/STAGE.episodes.json: its episodes are drawn as if each seed "
        "had its own starts, which makes the interval too narrow where seeds fail at the same starts."
    )


def markdown(
    rows: Sequence[Row], outcomes: Mapping[tuple[str, str, str], Mapping[str, np.ndarray]] | None = None
) -> str:
    """A Markdown table: a line per task, a column per (environment, method, stage), and the mean of complete columns.

    A cell of several seeds is their mean, with an interval over seeds and starts (`success`).

    Args:
      rows: of any number of columns.
      outcomes: by (environment, method, stage) those of `success`, of columns of several seeds where they are known.

    Raises:
      ValueError: two rows are the same evaluation, which would count its episodes twice, or seeds are not alike.
    """
    known = outcomes or {}
    columns = sorted({_column(row) for row in rows}, key=lambda c: (c[0], STAGES.index(c[2]), c[1]))
    tasks = [task for task in TASKS if any(row.task == task for row in rows)]
    cells = {
        (task, column): [row for row in rows if row.task == task and _column(row) == column]
        for task in tasks
        for column in columns
    }
    lines = [line("task", [_title(c) for c in columns]), line("---", ["---"] * len(columns))]
    lines += [line(task.replace("_", " "), [_cell(cells[task, c], known.get(c)) for c in columns]) for task in tasks]
    lines.append(line("**mean**", [_mean([cells[task, c] for task in tasks]) for c in columns]))
    episodes = sorted({row.episodes for row in rows})
    seeds = sorted({len(cell) for cell in cells.values() if cell})
    several = max(seeds, default=1) > 1
    kind = "95 % interval over seeds and starts" if several else "95 % Wilson interval"
    counts = f"{join(seeds)} seeds of {join(episodes)}" if several else join(episodes)
    lines += [
        "",
        f"Success in the environment, % [{kind}], {counts} episodes a task; "
        "in parentheses: success of the same policy from the same starts imagined by the world model.",
        *(("", UNTRAINED) if any(row.untrained for row in rows) else ()),
    ]
    unknown = [c for c in columns if not known.get(c) and any(len(cells[task, c]) > 1 for task in tasks)]
    if unknown:
        lines += ["", own_starts([_title(c) for c in unknown])]
    return "\n".join(lines) + "\n"


def line(first: str, cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {first} | {' | '.join(cells)} |"


def join(values: Sequence[object]) -> str:
    """Alternatives as text, "64 or 256"."""
    return " or ".join(map(str, values))


def mark(cell: str, untrained: bool) -> str:
    """A cell of a table, marked where `UNTRAINED` holds of it."""
    return cell + _MARK * untrained


def percent(mean: float, low: float, high: float, decimals: int = 0) -> str:
    """A success rate and its interval, as every table prints them; `decimals` are the interval's."""
    return f"{100 * mean:.1f} [{100 * low:.{decimals}f}, {100 * high:.{decimals}f}]"


def _column(row: Row) -> tuple[str, str, str]:
    return row.environment, row.method, row.stage


def _title(column: tuple[str, str, str]) -> str:
    environment, method, stage = column
    return f"{environment}: {stage if method == '-' else f'{method} {stage}'}"


def _cell(rows: Sequence[Row], outcomes: Mapping[str, np.ndarray] | None) -> str:
    if not rows:
        return ""
    imagined = _imagined(rows)
    text = percent(*success([rows], outcomes)) + ("" if imagined is None else f" ({100 * imagined:.0f})")
    return mark(text, any(row.untrained for row in rows))


def _imagined(rows: Sequence[Row]) -> float | None:
    known = [row.imagined_success for row in rows if row.imagined_success is not None]
    return sum(known) / len(known) if known else None


def _mean(cells: Sequence[Sequence[Row]]) -> str:
    if not all(cells):  # a mean over other tasks than the column beside it would mislead
        return ""
    rates = [sum(row.success for row in rows) / len(rows) for rows in cells]
    imagined = [value for value in map(_imagined, cells) if value is not None]
    text = f"**{100 * sum(rates) / len(rates):.1f}**"
    return f"{text} ({100 * sum(imagined) / len(imagined):.0f})" if imagined else text
