"""The Beam pipeline, on the direct runner, writes what the processes of one machine write."""

import importlib.util
import shutil

import helpers
import numpy as np
import pytest
from calvin_files import make_input, rewrite

from data.calvin import convert, npz_folder
from data.calvin.conversion import Settings

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="needs apache-beam: pip install -e '.[beam]'"
)


def run(input_folder, output):
    flags = [f"--input={input_folder}", f"--output={output}", "--frames_per_shard=6", "--image_size=32"]
    return helpers.run_python("-m", "data.calvin.convert_beam", *flags, "--", "--runner=DirectRunner")


def test_the_pipeline_writes_the_same_bytes_and_lists_refused_files(tmp_path):
    folder = make_input(tmp_path / "input")
    convert.convert(folder, tmp_path / "expected", Settings(image_size=32, frames_per_shard=6))
    frame = npz_folder.frame_path(folder / "training", 113)
    good = shutil.copy(frame, tmp_path / "good.npz")
    rewrite(frame, actions=np.full(7, np.inf))
    output = tmp_path / "out"
    failed = run(folder, output)
    assert failed.returncode == 1
    message = f"error: {frame}: actions[0] is inf, expected a finite number"
    assert failed.stderr.strip().splitlines()[-1].startswith(message)
    assert (output / "refused_files.txt").read_text().startswith(message.removeprefix("error: "))
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("calvin-*")}
    assert len(kept) == 2  # the other shards
    shutil.copy(good, frame)
    done = run(folder, output)
    assert done.returncode == 0, done.stderr
    assert "train: 18 frames, 2 episodes from 2 ranges, 2 annotations, 2 shards" in done.stdout
    found, expected = ({path.name: path.read_bytes() for path in d.iterdir()} for d in (output, tmp_path / "expected"))
    assert found == expected
    assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept
