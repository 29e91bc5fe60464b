"""Prints the table of one or several runs, side by side.

python -m experiments.print_table runs/quickstart [runs/another ...]
python -m experiments.print_table --pool_seeds runs/seed_0 runs/seed_1
python -m experiments.print_table --table=prediction runs/dreamer_v2 runs/wam
"""

import collections
import dataclasses
import os
from collections.abc import Sequence

from absl import flags

from wam_jax import cli, prediction_tables, tables

_TABLE = flags.DEFINE_enum(
    "table", "success", ("success", "prediction"), "Success of policies, or quality of the world model's predictions"
)
_POOL_SEEDS = flags.DEFINE_bool("pool_seeds", False, "Add up runs of one config that differ in their seed")


def main(argv: Sequence[str]) -> None:
    """Prints a Markdown table of the rows of every workdir named."""
    if not argv:
        raise ValueError("name at least one workdir, e.g. python -m experiments.print_table runs/quickstart")
    if _TABLE.value == "prediction":
        predictions = {name: prediction_tables.load(os.path.join(name, prediction_tables.FILE)) for name in argv}
        print(prediction_tables.markdown(predictions))
        return
    runs = {workdir: tables.load(os.path.join(workdir, "table.json")) for workdir in argv}
    print(tables.markdown(combine(runs, pool_seeds=_POOL_SEEDS.value)))


def combine(runs: dict[str, list[tables.Row]], *, pool_seeds: bool) -> list[tables.Row]:
    """All rows; where two runs have the same column, their names tell the columns apart, unless seeds are pooled.

    Raises:
      ValueError: a run has no rows.
    """
    for name, rows in runs.items():
        if not rows:
            raise ValueError(f"{name}/table.json has no rows; run experiments.evaluate with this --workdir first")
    columns = {name: {(row.environment, row.method, row.stage) for row in rows} for name, rows in runs.items()}
    shared = collections.Counter(column for of_run in columns.values() for column in of_run).most_common(1)
    if pool_seeds or not shared or shared[0][1] == 1:
        return [row for rows in runs.values() for row in rows]
    return [
        dataclasses.replace(row, environment=f"{name}, {row.environment}")
        for name, rows in runs.items()
        for row in rows
    ]


if __name__ == "__main__":
    cli.run(main, takes="workdirs")
