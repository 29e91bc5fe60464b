"""Prints the table of one or several runs, side by side.

python -m experiments.print_table runs/quickstart [runs/another ...]
"""

import os
import sys
from collections.abc import Sequence

from absl import app

from wam_jax import tables


def main(argv: Sequence[str]) -> None:
    """Prints a Markdown table of the rows of every workdir named."""
    if len(argv) < 2:
        sys.exit("error: name at least one workdir, e.g. python -m experiments.print_table runs/quickstart")
    try:
        rows = [row for workdir in argv[1:] for row in tables.load(os.path.join(workdir, "table.json"))]
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(tables.markdown(rows))


if __name__ == "__main__":
    app.run(main)
