"""Metrics of every stage: one metrics.jsonl a workdir, TensorBoard files, and the stop at the first non-finite loss."""

import json
import os
import platform
from collections.abc import Mapping

import jax
import numpy as np
from tensorboardX import SummaryWriter

from wam_jax import cores


def check_finite(metrics: Mapping[str, np.ndarray], first_step: int) -> None:
    """Raises FloatingPointError naming the first non-finite metric and its step; metrics are [N], one per update."""
    for index in range(len(next(iter(metrics.values())))):
        for name, values in metrics.items():
            if not np.isfinite(values[index]):
                raise FloatingPointError(
                    f"{name} is {values[index]} at step {first_step + index}; the last checkpoint is kept. Lower the "
                    "learning rate, or look at the data of that step"
                )


def fetch(metrics: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Copies the first device's metrics [D, N] to the host: {name: [N]}."""
    return {name: np.asarray(value.addressable_shards[0].data)[0] for name, value in metrics.items()}


def machine() -> str:
    """What this process runs on, for the head of a result: processor, cores it may use, devices, versions."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        processor = names[0] if names else processor
    device = jax.devices()[0]
    devices = f"{jax.device_count()} x {device.device_kind} ({device.platform})"
    return f"{processor}, {cores.count()} cores used, {devices}, jax {jax.__version__}"


class MetricsWriter:
    """Appends one stage's scalars to `workdir/metrics.jsonl` and to TensorBoard."""

    def __init__(self, workdir: str, stage: str, *, first_step: int = 0, active: bool = True):
        """Opens the files; rows of this stage after `first_step` (of a run that was cut off) are dropped.

        Args:
          workdir, stage: as above.
          first_step: updates that are done.
          active: False: nothing is written, since another process does it.
        """
        self.last_row: Mapping[str, float] = {}  # of this stage, before this run
        self._active = active
        if not active:
            return
        self._stage = stage
        self._path = os.path.join(workdir, "metrics.jsonl")
        os.makedirs(workdir, exist_ok=True)
        kept = _drop_rows(self._path, stage, first_step)
        self.last_row = kept[-1] if kept else {}
        self._board = SummaryWriter(os.path.join(workdir, "tensorboard", stage), purge_step=first_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one row: after `step` updates, the scalars had these values."""
        if not self._active:
            return
        row = {"stage": self._stage, "step": step} | {name: float(value) for name, value in scalars.items()}
        with open(self._path, "a") as file:  # anew for each row: another stage's writer may have replaced the file
            file.write(json.dumps(row) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(name, float(value), step)

    def close(self) -> None:
        """Closes TensorBoard's files."""
        if self._active:
            self._board.close()


def read(workdir: str, stage: str) -> list[dict]:
    """Returns the rows of one stage, oldest first; half-written rows of a killed run are left out."""
    path = os.path.join(workdir, "metrics.jsonl")
    return [row for row in _rows(path) if row["stage"] == stage]


def _rows(path: str) -> list[dict]:
    if not os.path.exists(path):
        return []
    rows = []
    with open(path, errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the last line of a killed run
                continue
            if isinstance(row, dict) and "stage" in row and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def _drop_rows(path: str, stage: str, first_step: int) -> list[dict]:
    """Drops a stage's rows after a step; returns those that are left."""
    if not os.path.exists(path):
        return []
    kept = [row for row in _rows(path) if row["stage"] != stage or row["step"] <= first_step]
    with open(path + ".tmp", "w") as file:  # always anew: a killed run's half line must not swallow the next row
        file.writelines(json.dumps(row) + "\n" for row in kept)
    os.replace(path + ".tmp", path)
    return [row for row in kept if row["stage"] == stage]
