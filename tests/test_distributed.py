"""Two processes train as one does: the same losses, the same parameters, one log."""

import os
import socket
import subprocess
import sys

import helpers
import pytest
import smoke_config
from ml_collections import FrozenConfigDict

from experiments import train_world_model
from wam_jax import metrics, rlds


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("play")
    episodes = [rlds.Episode(helpers.make_steps(i, (12,)), "test", str(i)) for i in range(3)]
    return helpers.write_dataset(directory, "play", {"train": episodes})


def command(data, workdir, *flags):
    config = ["--config=tests/smoke_config.py", f"--config.dataset.play={data}", "--config.num_devices=0"]
    return [sys.executable, "-m", "experiments.train_world_model", f"--workdir={workdir}", *config, *flags]


def run_processes(commands, **environment):
    """Runs them side by side; returns what each wrote to stderr."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "True"} | environment
    processes = [
        subprocess.Popen(c, cwd=helpers.ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for c in commands
    ]
    ends = [process.communicate(timeout=600)[1] for process in processes]
    for process, stderr in zip(processes, ends, strict=True):
        assert process.returncode == 0, stderr[-4000:]
    return ends


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    """The workdir of a training by one process with two devices."""
    workdir = tmp_path_factory.mktemp("one")
    run_processes([command(data, workdir)], XLA_FLAGS="--xla_force_host_platform_device_count=2")
    return workdir


def by_flags(index, port):
    """What a command of one of two processes begins with, and its flags."""
    return [], [f"--coordinator_address=localhost:{port}", "--num_processes=2", f"--process_id={index}"]


def by_slurm(index, port):
    """The same with the variables that SLURM sets; JAX makes a port of the job's number."""
    job = {"JOB_ID": port, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": index, "LOCALID": index}
    return ["env", *(f"SLURM_{name}={value}" for name, value in job.items())], ["--distributed"]


@pytest.mark.parametrize(("start", "cache"), [(by_flags, "memory"), (by_slurm, "device")])
def test_two_processes_train_as_one_with_as_many_devices(data, one_process, tmp_path, start, cache):
    starts = [start(index, port) for port in [free_port()] for index in range(2)]
    cached = f"--config.dataset.cache={cache}"
    first, second = run_processes([[*before, *command(data, tmp_path, cached, *flags)] for before, flags in starts])
    assert "world_model: 100%" in first and "world_model:" not in second
    rows = [metrics.read(str(workdir), "world_model") for workdir in (one_process, tmp_path)]
    assert [row["step"] for row in rows[1]] == [1, 2]
    for one, other in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    helpers.assert_close(params(data, one_process), params(data, tmp_path), rtol=1e-4, atol=1e-6)


def params(data, workdir):
    """What a later stage would load, on one device."""
    config = smoke_config.get_config()
    config.dataset.play = str(data)
    return train_world_model.load(FrozenConfigDict(config), str(workdir))[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_processes=2",), "--coordinator_address, --process_id missing: --coordinator_address, --num_processes"),
        (
            ("--coordinator_address=localhost:1", "--num_processes=2", "--process_id=2"),
            "--process_id=2; expected less than --num_processes",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_named(data, tmp_path, flags, message):
    done = helpers.run_python(*command(data, tmp_path / "run", *flags)[1:])
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert message in done.stderr
    assert not (tmp_path / "run").exists()
