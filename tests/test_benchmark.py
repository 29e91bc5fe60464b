"""The benchmark runs, writes rows, compares them with earlier ones, and names what it does not know."""

import helpers
import pytest

from wam_jax import json_files


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
        ("--devices=99", "error: num_devices=99, but this host has 1"),
    ],
)
def test_what_is_not_known_is_named(flag, message):
    done = run(flag)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(message)
