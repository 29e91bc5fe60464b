r"""Measures the converter on a tree of N frames in CALVIN's layout, and kills it on the way.

    python -m data.calvin.benchmark_convert --source=calvin_debug_dataset --workspace=DIR --frames=50000 --kills=10 \
        --output=docs/results/calvin_convert

The tree is made from the frames of `--source`, any folder in CALVIN's layout: their images in several variants, each
with numbers of its own, in npz files as CALVIN's but without depth and tactile images, which the converter leaves
unread. It is converted and verified, which gives frames per CPU second (of all processes, so per core), the
largest resident memory summed over the processes (pages they share counted in each) and wall time. With `--kills` it is
converted once more into another folder, each time killed (SIGKILL to all processes) at a random moment and started
again, and the two folders are compared byte for byte. All that was made is removed at the end; convert.json remains.
"""

import functools
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from absl import flags
from tqdm import tqdm

from data.calvin import npz_folder
from wam_jax import cli, json_files, metrics, specs

_SOURCE = flags.DEFINE_string("source", None, "Folder in CALVIN's layout to take frames from.", required=True)
_WORKSPACE = flags.DEFINE_string("workspace", None, "Where tree and shards are made and removed again.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for convert.json.", required=True)
_FRAMES = flags.DEFINE_integer("frames", 50000, "Frames of the tree.", lower_bound=100)
_WORKERS = flags.DEFINE_integer("workers", 2, "Of the converter.", lower_bound=1)
_FRAMES_PER_SHARD = flags.DEFINE_integer("frames_per_shard", 1000, "Of the converter.", lower_bound=1)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", specs.IMAGE_SIZE, "Of the converter.", lower_bound=0)
_KILLS = flags.DEFINE_integer("kills", 0, "How often the second conversion is killed; 0 makes none.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the tree and of the moments of the kills.")

_VALIDATION_SHARE = 1 / 6  # as in D_D
_VARIANTS = 4  # of each source image
_TASKS = (*specs.TASKS, "lift_red_block_table", "push_into_drawer", "rotate_blue_block_left")


def make_tree(source: Path, tree: Path, num_frames: int, rng: np.random.Generator) -> None:
    """Writes a tree of frames in CALVIN's layout.

    Args:
      source: folder in CALVIN's layout; its frames are varied.
      tree: new folder.
      num_frames: of training and validation together, numbered on.
      rng: of everything random in it.

    Raises:
      ValueError: the source has no frames, or the disk has no room.
    """
    frames = [npz_folder.read_frame(path) for path in sorted(source.glob("*/episode_*.npz"))]
    if not frames:
        raise ValueError(f"{source}: no training/episode_*.npz in it; --source must be a folder in CALVIN's layout")
    images = [_images_as_npz(frame, variant) for frame in frames for variant in range(_VARIANTS)]
    needed = int(num_frames * (np.mean([len(image) for image in images]) + 4096 + 20_000))  # blocks on disk; shards
    free = shutil.disk_usage(tree.parent).free
    if free < needed:
        raise ValueError(f"{tree.parent}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed; take fewer --frames")
    num_validation = int(num_frames * _VALIDATION_SHARE)
    numbers = {"training": range(num_frames - num_validation), "validation": range(num_frames)[-num_validation:]}
    for name, of_folder in numbers.items():
        _make_folder(tree / name, of_folder, frames, images, rng)
    _save_pickled(tree / "training" / "scene_info.npy", {"calvin_scene_D": [0, num_frames - 1]})


def _make_folder(path: Path, numbers: range, frames: list[dict], images: list[bytes], rng: np.random.Generator) -> None:
    path.mkdir(parents=True)
    for number in tqdm(numbers, f"making {path.name}", unit="frame", disable=None):
        choice = int(rng.integers(len(images)))
        vectors = {key: _jitter(frames[choice // _VARIANTS][key], rng) for key in _vector_keys()}
        npz_folder.frame_path(path, number).write_bytes(_with_vectors(images[choice], vectors))
    starts = [numbers[0], *(number for number in numbers[1:] if rng.random() < 1 / 16_000)]  # about as long as in D_D
    ends = [*(start - 1 for start in starts[1:]), numbers[-1]]
    np.save(path / "ep_start_end_ids.npy", np.stack([starts, ends], axis=1))
    firsts = sorted(
        rng.choice(numbers[:-64] if len(numbers) > 64 else numbers[:1], max(1, len(numbers) // 100)).tolist()
    )
    spans = [(first, first + int(rng.integers(33, 65))) for first in firsts]
    tasks = [_TASKS[i % len(_TASKS)] for i in range(len(spans))]
    language = {
        "ann": [f"now {task}" for task in tasks],
        "task": tasks,
        "emb": np.zeros((len(spans), 1, 384), np.float32),
    }
    (path / npz_folder.LANGUAGE_FOLDER).mkdir()
    _save_pickled(
        path / npz_folder.LANGUAGE_FOLDER / "auto_lang_ann.npy",
        {"language": language, "info": {"episodes": [], "indx": spans}},
    )


def _vector_keys() -> list[str]:
    return [key for key, (shape, _) in npz_folder.FRAME_ARRAYS.items() if len(shape) == 1]


def _jitter(vector: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return vector + rng.normal(scale=1e-3, size=vector.shape)


def _images_as_npz(frame: dict, variant: int) -> bytes:
    """The two images, shifted against the original, compressed as CALVIN's are: the dear part of a file, made once."""
    file = io.BytesIO()
    shifted = {key: np.roll(frame[key], 9 * variant, axis=1) for key in ("rgb_static", "rgb_gripper")}
    np.savez_compressed(file, **shifted)
    return file.getvalue()


def _with_vectors(images: bytes, vectors: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO(images)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        for key, vector in vectors.items():
            array = io.BytesIO()
            np.save(array, vector)
            archive.writestr(f"{key}.npy", array.getvalue())
    return file.getvalue()


def _save_pickled(path: Path, value: dict) -> None:
    np.save(path, np.array(value, dtype=object), allow_pickle=True)


def measure(command: Sequence[str]) -> dict[str, float]:
    """Runs a command to its end: wall seconds, CPU seconds and peak memory of all its processes.

    Raises:
      ValueError: it failed.
    """
    peak, done = [0], threading.Event()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    sampler = threading.Thread(target=functools.partial(_sample_memory, process.pid, peak, done))
    sampler.start()
    _, status, usage = os.wait4(process.pid, 0)  # the usage of its finished children included
    done.set()
    sampler.join()
    if status:
        raise ValueError(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}; see above")
    return {
        "wall_seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_bytes": peak[0],
    }


def _sample_memory(pid: int, peak: list[int], done: threading.Event) -> None:
    while not done.wait(0.1):
        resident = 0
        try:
            parent = psutil.Process(pid)
            for process in [parent, *parent.children(recursive=True)]:
                resident += process.memory_info().rss
        except psutil.Error:  # one has just ended
            continue
        peak[0] = max(peak[0], resident)


def convert_with_kills(command: Sequence[str], kills: int, wall: float, rng: np.random.Generator) -> list[float]:
    """Runs a command again and again, killed at random moments, and to its end at last.

    Args:
      command: that goes on where it stopped.
      kills: how often it is killed.
      wall: seconds it takes undisturbed; the kills are spread over about that time.
      rng: of the moments.

    Returns:
      seconds after its start at which each run was killed.

    Raises:
      ValueError: it failed, or was done before the last kill.
    """
    moments: list[float] = []
    while len(moments) < kills:
        moment = float(rng.uniform(0, 2 * wall / (kills + 1)))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            moments.append(round(moment, 2))
        else:
            raise ValueError(f"the conversion ended after {len(moments)} of {kills} kills; take more --frames")
    if code := subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise ValueError(f"{' '.join(command)} failed with status {code} after the kills; see above")
    return moments


def contents(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file below a directory, by name."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def benchmark(workspace: Path) -> dict:
    """Makes the tree, converts, verifies and kills as the flags say; returns what was measured."""
    rng = np.random.default_rng(_SEED.value)
    tree, undisturbed, disturbed = (workspace / name for name in ("tree", "undisturbed", "disturbed"))
    make_tree(Path(_SOURCE.value), tree, _FRAMES.value, rng)
    flags_of_both = [
        f"--input={tree}",
        f"--workers={_WORKERS.value}",
        f"--frames_per_shard={_FRAMES_PER_SHARD.value}",
        f"--image_size={_IMAGE_SIZE.value}",
    ]
    command = [sys.executable, "-m", "data.calvin.convert", *flags_of_both]
    conversion = measure([*command, f"--output={undisturbed}"])
    verification = measure([*command, f"--output={undisturbed}", "--verify"])
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": metrics.machine(),
        "frames": _FRAMES.value,
        "workers": _WORKERS.value,
        "frames_per_shard": _FRAMES_PER_SHARD.value,
        "image_size": _IMAGE_SIZE.value,
        "bytes_per_frame_of_tree": round(_bytes(tree) / _FRAMES.value),
        "bytes_per_frame_of_shards": round(_bytes(undisturbed) / _FRAMES.value),
        "conversion": _with_speed(conversion),
        "verification": _with_speed(verification),
    }
    if _KILLS.value:
        moments = convert_with_kills([*command, f"--output={disturbed}"], _KILLS.value, conversion["wall_seconds"], rng)
        result["killed_after_seconds"] = moments
        result["identical_after_kills"] = contents(undisturbed) == contents(disturbed)
    return result


def _with_speed(measured: dict[str, float]) -> dict[str, float]:
    return measured | {"frames_per_cpu_second": round(_FRAMES.value / measured["cpu_seconds"], 1)}


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes; exits 1 where the killed conversion gave another result."""
    del argv
    os.makedirs(_WORKSPACE.value, exist_ok=True)
    os.makedirs(_OUTPUT.value, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_WORKSPACE.value) as workspace:
        result = benchmark(Path(workspace))
    json_files.write(os.path.join(_OUTPUT.value, "convert.json"), result)
    print(json.dumps(result, indent=1))
    if not result.get("identical_after_kills", True):
        sys.exit("error: the killed conversion gave other bytes than the undisturbed one")


if __name__ == "__main__":
    cli.run(main)
