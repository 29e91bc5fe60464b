"""Compares every shard of datasets with its checksum, then decodes every field of every step.

python -m experiments.verify_dataset shards/calvin_d runs/mine/data/playtable_play

Exits 1 with a line for each fault.
"""

import sys
from collections.abc import Sequence

from absl import app

from wam_jax import datasets


def main(argv: Sequence[str]) -> None:
    """Verifies the directories given as arguments."""
    if len(argv) < 2:
        raise app.UsageError("no dataset given; give one or more directories")
    faults = [fault for directory in argv[1:] for fault in _faults(directory)]
    if faults:
        sys.exit("\n".join(f"error: {fault}" for fault in faults))
    print(f"verified: {', '.join(argv[1:])}")


def _faults(directory: str) -> list[str]:
    try:
        return datasets.verify(directory)
    except ValueError as error:
        return [str(error)]


if __name__ == "__main__":
    app.run(main)
