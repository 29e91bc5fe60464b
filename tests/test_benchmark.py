"""The benchmark runs, writes rows, compares them with earlier ones, and names what it does not know."""

import helpers
import pytest
import smoke_config
from ml_collections import FrozenConfigDict

from experiments import benchmark, workloads
from wam_jax import json_files

quick_compilation = helpers.quick_compilation


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "rows.json"
    done = run("--only=playtable_step,input_pipeline/mmap", f"--output={path}")
    assert done.returncode == 0, done.stderr[-3000:]
    return path, done


def run(*flags):
    return helpers.run_python("-m", "experiments.benchmark", "--seconds=0", *flags, JAX_PLATFORMS="cpu")


def test_rows_say_what_was_measured(output):
    path, done = output
    rows = {row["name"]: row for row in json_files.read(path, "")}
    assert set(rows) == {"playtable_step", "input_pipeline"}
    for row in rows.values():
        assert min(row["wall_s"], row["cpu_s"], row["items"]) > 0 and row["calls"] >= 5
    assert rows["playtable_step"]["compile_s"] > 0 and rows["playtable_step"]["peak_bytes"] > 0
    assert "| input pipeline mmap | uint8 | 50 | 50 | 1 |" in done.stdout


def test_an_earlier_file_gives_ratios(output):
    done = run("--only=playtable_step", f"--baseline={output[0]}")
    assert "against baseline" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("| playtable step")]
    assert float(line.rstrip("| ").rpartition("|")[2]) > 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--only=playtable", "error: --only=playtable: no workload is called so; there are world_model_update/4x50/"),
        ("--baseline=nowhere.json", "error: [Errno 2] No such file or directory: 'nowhere.json'"),
        ("--output=/proc/benchmark/rows.json", "error: [Errno 2] No such file or directory: '/proc/benchmark'"),
        ("--devices=99", "error: num_devices=99, but this host has 1"),
    ],
)
def test_what_is_not_known_is_named(flag, message):
    done = run(flag)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(message)


@pytest.mark.parametrize(
    "label",
    [
        *("world_model_update/4x50/float32", "imagination/bfloat16", "bc_update/float32", "encoder/float32"),
        *("dispatch", "training/device", "training_quickstart/none"),
        *("ppo_iteration_without_bc/float32", "ppo_iteration_of_tasks/float32"),
        *("input_pipeline/device", "input_pipeline/memory", "playtable_render"),
    ],
)
def test_workloads_run_call_after_call(label, monkeypatch):
    config = smoke_config.get_config()
    config.world_model.update(kind="conv", encoder_width=2, decoder_width=2, window_length=4)
    config.reward.disagreement_quantile = 0.5  # so that the ensemble judges, too
    monkeypatch.setattr(workloads, "_quickstart", lambda config, devices: config)
    monkeypatch.setattr(benchmark, "_time", lambda call: (call(), call(), (1.0, 1.0, 1))[-1])
    row = benchmark.measure(workloads.cases(FrozenConfigDict(config))[label](), matmul=1e12)
    name, *rest = label.split("/")
    assert name.startswith(row.name) and min(row.items, row.calls) > 0
    assert row.dtype == ("uint8" if name == "input_pipeline" else "bfloat16" if "bfloat16" in rest else "float32")
    fed = name.startswith("training") or label == "input_pipeline/memory"
    assert (row.waiting_s is not None) == fed
    assert (row.share_of_matmul is not None) == (row.flops > 0)


def test_devices_are_compared_by_the_batch_of_one():
    row = dict(
        name="x", variant="", dtype="float32", length=1, compile_s=0.0, wall_s=1.0, cpu_s=1.0, unit="rows", flops=0,
        share_of_matmul=None, peak_bytes=0, calls=5, date="", machine="test (cpu)",
    )  # fmt: skip
    one, eight = (benchmark.Row(**row, batch=4 * n, devices=n, items=3 * n) for n in (1, 8))
    assert one.key == eight.key
    assert benchmark.markdown([eight], {one.key: one}).splitlines()[-1].endswith("| 8.00 |")


def test_one_workload_that_fails_costs_only_itself(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "_time", lambda call: (call(), (1.0, 1.0, 1))[-1])

    def fails():
        raise RuntimeError("out of memory")

    rows, path = [], str(tmp_path / "rows.json")
    failed = benchmark.measure_all({"first": fails, "playtable_render": workloads.playtable_render}, path, rows)
    assert failed == ["error: first: RuntimeError: out of memory"]
    assert [row.name for row in rows] == ["playtable_render"] and benchmark.load(path) == rows
