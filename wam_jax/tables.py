"""Rows of results and their tables: one format for every evaluation of the project."""

import dataclasses
import os
from collections.abc import Sequence

from scipy.stats import binomtest

from wam_jax import json_files
from wam_jax.specs import TASKS

STAGES = ("expert", "bc", "ppo")  # in the order of the printed columns


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
    low, high = wilson(successes, episodes)
    rate = successes / episodes
    return Row(
        environment, method, task, stage, successes, episodes, rate, low, high, imagined_success, seed, simulator
    )


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a success rate."""
    interval = binomtest(successes, episodes).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


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
        return [kind(**row) for row in json_files.read(path, mend)]
    except TypeError as error:
        raise ValueError(f"{path} is not a table of results ({error}); {mend}") from error


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table: a line per task, a column per (environment, method, stage), and the mean of complete columns.

    Several seeds of one cell are pooled: their successes and episodes are added up.

    Raises:
      ValueError: two rows are the same evaluation, which would count its episodes twice.
    """
    seen = set()
    for row in rows:
        key = (*_column(row), row.task, row.seed)
        if key in seen:
            raise ValueError(f"two rows for {_title(_column(row))}, {row.task}, seed {row.seed}; give each once")
        seen.add(key)
    columns = sorted({_column(row) for row in rows}, key=lambda c: (c[0], STAGES.index(c[2]), c[1]))
    tasks = [task for task in TASKS if any(row.task == task for row in rows)]
    cells = {(task, column): _pool(rows, task, column) for task in tasks for column in columns}
    lines = [_line("task", [_title(c) for c in columns]), _line("---", ["---"] * len(columns))]
    lines += [_line(task.replace("_", " "), [_cell(cells[task, c]) for c in columns]) for task in tasks]
    lines.append(_line("**mean**", [_mean([cells[task, c] for task in tasks]) for c in columns]))
    episodes = sorted({pool[1] for pool in cells.values() if pool})
    lines += [
        "",
        f"Success in the environment, % [95 % Wilson interval], {' or '.join(map(str, episodes))} episodes a task; "
        "in parentheses: success of the same policy from the same starts imagined by the world model.",
    ]
    return "\n".join(lines) + "\n"


def _column(row: Row) -> tuple[str, str, str]:
    return row.environment, row.method, row.stage


def _title(column: tuple[str, str, str]) -> str:
    environment, method, stage = column
    return f"{environment}: {stage if method == '-' else f'{method} {stage}'}"


def _pool(rows, task, column) -> tuple[int, int, float | None] | None:
    chosen = [row for row in rows if row.task == task and _column(row) == column]
    if not chosen:
        return None
    imagined = [row.imagined_success for row in chosen if row.imagined_success is not None]
    mean_imagined = sum(imagined) / len(imagined) if imagined else None
    return sum(row.successes for row in chosen), sum(row.episodes for row in chosen), mean_imagined


def _cell(pool) -> str:
    if pool is None:
        return ""
    successes, episodes, imagined = pool
    low, high = wilson(successes, episodes)
    text = f"{100 * successes / episodes:.1f} [{100 * low:.0f}, {100 * high:.0f}]"
    return text if imagined is None else f"{text} ({100 * imagined:.0f})"


def _mean(pools) -> str:
    if not all(pools):  # a mean over other tasks than the column beside it would mislead
        return ""
    imagined = [pool[2] for pool in pools if pool[2] is not None]
    text = f"**{100 * sum(pool[0] / pool[1] for pool in pools) / len(pools):.1f}**"
    return f"{text} ({100 * sum(imagined) / len(imagined):.0f})" if imagined else text


def _line(first: str, cells: Sequence[str]) -> str:
    return f"| {first} | {' | '.join(cells)} |"
