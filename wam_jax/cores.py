"""How many cores this process may use; without JAX."""

import os


def count() -> int:
    """At least 1; fewer than the machine has where the process is bound to some of them (taskset, SLURM)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
