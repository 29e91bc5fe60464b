"""Compares every shard of datasets and their raw caches with the checksums, then decodes every field of every step.

python -m experiments.verify_dataset shards/calvin_d runs/mine/data/playtable_play

Exits 1 with a line for each fault.
"""

import sys
from collections.abc import Sequence

from wam_jax import cli, datasets, raw_cache


def main(argv: Sequence[str]) -> None:
    """Verifies the directories given as arguments."""
    if not argv:
        raise ValueError("no dataset given; name the folder of one, or of several")
    faults = [fault for directory in argv for fault in _faults(directory)]
    if faults:
        sys.exit("\n".join(f"error: {fault}" for fault in faults))
    print(f"verified: {', '.join(argv)}")


def _faults(directory: str) -> list[str]:
    try:
        return datasets.verify(directory) + raw_cache.verify(directory)
    except ValueError as error:
        return [str(error)]


if __name__ == "__main__":
    cli.run(main, takes="datasets")
