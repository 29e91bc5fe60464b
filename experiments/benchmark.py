"""Measures the throughput of every stage: compilation, steps, FLOPs against the device's own matrix rate, memory.

python -m experiments.benchmark --output=docs/benchmarks/FILE.json

Sizes are the paper's unless --config names others; windows are 4, 10 and 50 of 50 steps. Each stage's own compiled
program runs on made-up inputs. On a CPU, seconds of the processor count, which other programs disturb little;
`taskset -c 0` in front makes it one core's speed.
--only picks workloads, by whole parts of what is printed: --only=world_model_update/10x50,bc_update. It also picks what
is else left out on the device, such as bfloat16 on a CPU.
--baseline prints ratios of rates against an earlier file. --devices=N lets N devices work together, each on a batch of
that size; with the file of one device as the baseline, that is weak scaling (on a CPU: of items a second of processor).
"""

import dataclasses
import functools
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from ml_collections import FrozenConfigDict
from tqdm import tqdm

from experiments import launch, workloads
from experiments.configs import base
from experiments.workloads import FedProgram, Feed, Program, Workload
from wam_jax import json_files, metrics
from wam_jax.input_pipeline import Batches

_LEAST_CALLS, _MOST_CALLS = 5, 200
# What is left out unless it is asked for: on a CPU what takes a minute a call; elsewhere what would make the whole take
# more than ten minutes, compilation included.
_LEFT_OUT = {
    "cpu": ("bfloat16", "50x50", "of_tasks", "training/"),
    "others": (
        *("4x50", "10x50", "without_bc", "training/none", "training/memory", "training_quickstart"),
        *(f"{name}/float32" for name in ("imagination", "bc_update", "ppo_iteration", "of_tasks", "encoder")),
    ),
}
_MATRIX_SIZE = {"cpu": 2048}  # of the matrix product that everything is compared with; elsewhere 8192


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured workload; medians over calls."""

    name: str
    variant: str
    dtype: str
    batch: int
    length: int
    devices: int
    compile_s: float  # tracing and compilation, without a cache
    wall_s: float  # of a call
    cpu_s: float  # of this process, in a call
    items: int  # in a call
    unit: str
    flops: int  # of matrix products and convolutions in a call, over all devices
    share_of_matmul: float | None  # of the devices' rate in a plain matrix product of that dtype
    peak_bytes: int  # of a device, as the compiler plans arguments, results and temporaries
    calls: int
    date: str
    machine: str
    waiting_s: float | None = None  # for the next batch, in a call; None: nothing is waited for

    @property
    def rate(self) -> float:
        """Items a second: of the processor on a CPU, else of the clock."""
        return self.items / (self.cpu_s if "(cpu)" in self.machine else self.wall_s)

    @property
    def key(self) -> tuple:
        """What is the same in two rows that can be compared; the batch is a device's."""
        return self.name, self.variant, self.dtype, self.batch // self.devices, self.length


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes."""
    try:
        if argv[1:]:
            raise ValueError(f"unexpected argument {argv[1]!r}; options are written --name=value")
        launch.before_devices()
        baseline = {row.key: row for row in load(_BASELINE.value)} if _BASELINE.value else {}
        config = launch.CONFIG.value or base.get_config()
        config.num_devices = _DEVICES.value
        chosen = choose(workloads.cases(FrozenConfigDict(config)), [name for name in _ONLY.value if name])
        if _OUTPUT.value:
            _check_writable(_OUTPUT.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    logging.set_verbosity(logging.WARNING)
    rows: list[Row] = []
    try:
        failed = measure_all(chosen, _OUTPUT.value, rows)
    except KeyboardInterrupt:
        failed = ["interrupted: the table holds what was measured before"]
    print(markdown(rows, baseline))
    if failed:
        print("\n".join(failed), file=sys.stderr)
        sys.exit(130 if failed[0].startswith("interrupted") else 1)


def _check_writable(path: str) -> None:
    """Raises an OSError where a file cannot be written, before there is anything to lose."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    if os.path.isdir(path):
        raise IsADirectoryError(f"--output={path} is a folder; name a file in it")
    with tempfile.TemporaryFile(dir=folder):
        pass


def choose(cases: Mapping[str, Callable[[], Workload]], only: Sequence[str]) -> dict[str, Callable[[], Workload]]:
    """The workloads whose labels begin with one of `only`.

    Raises:
      ValueError: there is none of that name.
    """
    if not only:
        left_out = _LEFT_OUT["cpu" if jax.default_backend() == "cpu" else "others"]
        return {label: case for label, case in cases.items() if not any(part in label for part in left_out)}
    for name in only:
        if not any((label + "/").startswith(name + "/") for label in cases):
            raise ValueError(f"--only={name}: no workload is called so; there are {', '.join(cases)}")
    return {label: case for label, case in cases.items() if any((label + "/").startswith(name + "/") for name in only)}


def measure_all(chosen: Mapping[str, Callable[[], Workload]], output: str, rows: list[Row]) -> list[str]:
    """Measures one workload after another and adds to `rows`; what is measured is written at once.

    Returns:
      one line for each workload that failed, for want of memory, say.
    """
    failed: list[str] = []
    jax.config.update("jax_enable_compilation_cache", False)
    rates: dict[str, float] = {}
    for label, case in tqdm(chosen.items(), desc="benchmark", unit="workload", disable=None):
        try:
            workload = case()
            if workload.flops and workload.dtype not in rates:
                rates[workload.dtype] = matmul_rate(workload.dtype)
                tqdm.write(f"matrix product, {workload.dtype}: {rates[workload.dtype] / 1e9:,.0f} GFLOP/s", sys.stderr)
            rows.append(measure(workload, rates.get(workload.dtype, 0)))
        except Exception as error:  # whatever a compiler or a device says to one workload; the others go on
            failed.append(f"error: {label}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            continue
        tqdm.write(f"{label}: {rows[-1].rate:,.4g} {workload.unit}/s", sys.stderr)
        if output:
            json_files.write(output, [dataclasses.asdict(row) for row in rows])
    return failed


def measure(workload: Workload, matmul: float) -> Row:
    """Compiles a workload and runs it for a while.

    Args:
      workload: what to run.
      matmul: FLOP/s of one device, or of the processor, in a plain matrix product.
    """
    waits: list[float] = []
    call, compile_s, peak_bytes = _compile(workload, waits)
    wall, cpu, calls = _time(call)
    if isinstance(workload, Feed | FedProgram):
        workload.feed.close()  # or its threads would work beside the next workload
    on_cpu = jax.default_backend() == "cpu"
    seconds = cpu if on_cpu else wall * workload.devices
    return Row(
        name=workload.name,
        variant=workload.variant,
        dtype=workload.dtype,
        batch=workload.batch,
        length=workload.length,
        devices=workload.devices,
        compile_s=round(compile_s, 3),
        wall_s=wall,
        cpu_s=cpu,
        items=workload.items,
        unit=workload.unit,
        flops=workload.flops,
        share_of_matmul=round(workload.flops / seconds / matmul, 4) if workload.flops else None,
        peak_bytes=peak_bytes,
        calls=calls,
        date=time.strftime("%Y-%m-%d"),
        machine=metrics.machine(),
        waiting_s=statistics.median(waits[-calls:]) if waits else None,
    )


def _compile(workload: Workload, waits: list[float]) -> tuple[Callable[[], None], float, int]:
    """Prepares a workload.

    Args:
      workload: what to run.
      waits: gets the seconds that each call waits for its batch.

    Returns:
      what makes a call, the seconds that compilation took, and the bytes that the compiler plans.
    """

    def fetch(feed: Batches) -> Any:
        start = time.perf_counter()
        batch = jax.block_until_ready(next(feed))
        waits.append(time.perf_counter() - start)
        return batch

    if isinstance(workload, Feed):
        return functools.partial(fetch, workload.feed), 0.0, 0
    assert isinstance(workload, Program)
    start = time.perf_counter()
    compiled = workload.program.lower(*workload.arguments).compile()
    compile_s = time.perf_counter() - start
    plan = compiled.memory_analysis()
    planned = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    arguments = list(jax.block_until_ready(jax.device_put(workload.arguments)))

    def call() -> None:
        if isinstance(workload, FedProgram):
            arguments[1] = fetch(workload.feed)
        result = jax.block_until_ready(compiled(*arguments))
        if workload.carried:
            arguments[0] = result[0]

    return call, compile_s, planned - plan.alias_size_in_bytes


def matmul_rate(dtype: str) -> float:
    """FLOP/s in a plain matrix product: of one device by the clock, on a CPU of the processor.

    Of noise: a GPU multiplies ones or zeros faster, since it draws less power on them.
    """
    size = _MATRIX_SIZE.get(jax.default_backend(), 8192)
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    wall, cpu, _ = _time(lambda: jax.block_until_ready(product(matrix, matrix)))
    return 2 * size**3 / (cpu if jax.default_backend() == "cpu" else wall)


def _time(call: Callable[[], None]) -> tuple[float, float, int]:
    """Median seconds of a call, by the clock and of the processor, and the number of calls."""
    call()  # the first may still allocate
    wall: list[float] = []
    cpu: list[float] = []
    while len(wall) < _LEAST_CALLS or (sum(wall) < _SECONDS.value and len(wall) < _MOST_CALLS):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    return statistics.median(wall), statistics.median(cpu), len(wall)


def load(path: str) -> list[Row]:
    """Reads an earlier output.

    Raises:
      ValueError: it is not one.
    """
    try:
        rows = [Row(**row) for row in json_files.read(path, "give a file that --output wrote")]
    except TypeError as error:
        raise ValueError(
            f"{path} is no list of rows as --output writes it; it was written by something else"
        ) from error
    if not all(min(row.cpu_s, row.wall_s, row.items) > 0 for row in rows):
        raise ValueError(f"{path} has a row without items or seconds; measure it anew")
    return rows


def markdown(rows: Sequence[Row], baseline: Mapping[tuple, Row]) -> str:
    """The rows as a table, with ratios of rates where a row of the baseline is of the same kind."""
    if not rows:
        return "nothing was measured"
    per = "CPU s" if jax.default_backend() == "cpu" else "s"
    lines = [
        f"{rows[0].machine}, {rows[0].date}",
        "",
        f"| workload | dtype | batch | length | devices | rate, per {per} | call, ms | waiting, ms | GFLOP | "
        "share of matmul | compile, s | memory, GB |" + (" against baseline |" if baseline else ""),
        "| --- " * (13 if baseline else 12) + "|",
    ]
    for row in rows:
        seconds = row.cpu_s if per == "CPU s" else row.wall_s
        share = "" if row.share_of_matmul is None else f"{100 * row.share_of_matmul:.0f} %"
        name = f"{row.name.replace('_', ' ')} {row.variant}".strip()
        cells = [
            name, row.dtype, row.batch, row.length, row.devices, f"{row.rate:,.4g} {row.unit}",
            f"{1000 * seconds:,.4g}", "" if row.waiting_s is None else f"{1000 * row.waiting_s:,.4g}",
            f"{row.flops / 1e9:,.4g}" if row.flops else "", share, f"{row.compile_s:.1f}",
            f"{row.peak_bytes / 1e9:.3g}",
        ]  # fmt: skip
        if baseline:
            cells.append(f"{row.rate / baseline[row.key].rate:.2f}" if row.key in baseline else "")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":  # its flags are those of the binary alone: tests import many binaries into one process
    _ONLY = flags.DEFINE_list("only", [], "Which workloads; if not given, all that are quick on this device")
    _OUTPUT = flags.DEFINE_string("output", "", "JSON file for the rows")
    _BASELINE = flags.DEFINE_string("baseline", "", "An earlier --output to compare with")
    _DEVICES = flags.DEFINE_integer("devices", 1, "How many devices train together; 0: all of this host", lower_bound=0)
    _SECONDS = flags.DEFINE_float("seconds", 5.0, "Least time for each workload, after its compilation", lower_bound=0)
    app.run(main, flags_parser=launch.parse_flags)
