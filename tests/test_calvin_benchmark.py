"""The benchmark of the converter measures, kills, compares, and leaves nothing but its file."""

import json

import helpers
from calvin_files import make_input


def test_a_small_tree_is_converted_measured_and_the_same_after_a_kill(tmp_path):
    make_input(tmp_path / "source")
    workspace, output = tmp_path / "workspace", tmp_path / "results"
    flags = [f"--source={tmp_path / 'source'}", f"--workspace={workspace}", f"--output={output}"]
    sizes = ["--frames=150", "--frames_per_shard=40", "--workers=1", "--kills=1", "--seed=0"]
    done = helpers.run_python("-m", "data.calvin.benchmark_convert", *flags, *sizes)
    assert done.returncode == 0, done.stderr
    (file,) = output.iterdir()
    result = json.loads(file.read_text())
    assert result == json.loads(done.stdout)
    assert result["identical_after_kills"] is True
    assert len(result["killed_after_seconds"]) == 1
    for name in ("conversion", "verification"):
        figures = result[name]
        assert figures["frames_per_cpu_second"] == round(150 / figures["cpu_seconds"], 1)
        assert 50e6 < figures["peak_memory_bytes"] < 2e9
    assert list(workspace.iterdir()) == []
