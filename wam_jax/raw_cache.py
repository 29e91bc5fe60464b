"""A split decoded once to raw arrays on disk, memory-mapped: any window is there at the speed of the page cache.

It lies beside the shards, in `raw-SPLIT/`: one npy file for each field of a step, episodes one after another (24.7 kB a
step), their checksums, and `source.json`, which names the shards that it was made from.
"""

import contextlib
import fcntl
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.lib import format as npy
from tqdm import tqdm

from wam_jax import datasets, json_files, shards, specs
from wam_jax.types import Observation, StepBatch

SOURCE_FILE = "source.json"


def field_shapes(leading: tuple[int, ...]) -> StepBatch:
    """The fields of steps [*leading, ...] as shapes and dtypes."""

    def shape(size: tuple[int, ...], dtype: type) -> Any:
        return jax.ShapeDtypeStruct((*leading, *size), dtype)

    image = (specs.IMAGE_SIZE, specs.IMAGE_SIZE, 3)
    return StepBatch(
        observation=Observation(
            rgb_static=shape(image, np.uint8),
            rgb_gripper=shape(image, np.uint8),
            robot_obs=shape((specs.ROBOT_OBS_DIM,), np.float32),
            scene_obs=shape((specs.SCENE_OBS_DIM,), np.float32),
        ),
        action=shape((specs.ACTION_DIM,), np.float32),
        is_first=shape((), bool),
        is_last=shape((), bool),
        task=shape((), np.int32),
        reward=shape((), np.float32),
    )


def load(directory: str | Path, split: str) -> StepBatch:
    """Maps a split's steps, [N, ...] over all its episodes, read-only; builds the cache where there is none.

    Args:
      directory: a dataset as `rlds.py` writes it.
      split: "train" or "validation".

    Raises:
      ValueError: no complete dataset there, or no such split.
      OSError: the cache cannot be written.
    """
    folder = Path(directory) / f"raw-{split}"
    lengths = datasets.episode_lengths(directory, split)
    if not is_current(directory, split):
        with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:  # one process builds, others wait for it
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_current(directory, split):
                _build(folder, directory, split, lengths)

    def read(path: Path, field: jax.ShapeDtypeStruct) -> np.ndarray:
        values = np.load(path, mmap_mode="r")
        if (values.shape, values.dtype) != (field.shape, field.dtype):
            raise ValueError(f"{path.name} holds {values.dtype} {values.shape}, not {field.dtype} {field.shape}")
        return values

    try:
        return jax.tree.map(read, _paths(folder), field_shapes((sum(lengths),)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is damaged ({error}); delete it, it is then made anew") from error


def read_attempts(
    directory: str | Path, split: str, tasks: Sequence[int], *, min_steps: int = 8
) -> dict[int, list[StepBatch]]:
    """What `datasets.read_attempts` returns, but as views into the cache: nothing is decoded, or held in memory."""
    if split not in datasets.open_builder(directory).info.splits:
        return {task: [] for task in tasks}
    steps, end = load(directory, split), 0
    labels = np.asarray(steps.task)
    attempts: dict[int, list[StepBatch]] = {task: [] for task in tasks}
    for length in datasets.episode_lengths(directory, split):
        first, end = end, end + length
        for task, span in datasets.attempt_spans(labels[first:end], tasks, min_steps=min_steps):
            rows = slice(first + span.start, first + span.stop)
            attempts[task].append(jax.tree.map(lambda x, rows=rows: x[rows], steps))
    return attempts


def verify(directory: str | Path) -> list[str]:
    """Compares the raw caches of a dataset with their checksums, where there are some.

    Args:
      directory: a dataset as `rlds.py` writes it.

    Returns:
      one line for each fault, empty if there is none.
    """
    faults: list[str] = []
    for folder in sorted(path.parent for path in Path(directory).glob(f"raw-*/{SOURCE_FILE}")):
        mend = f"delete {folder}, it is then made anew"
        try:
            faults += shards.compare_checksums(folder, jax.tree.leaves(_paths(folder)), mend, no_checksums=mend)
        except ValueError as error:
            faults.append(str(error))
    return faults


def is_current(directory: str | Path, split: str) -> bool:
    """Whether there is a cache, made from the shards as they are."""
    folder = Path(directory) / f"raw-{split}"
    path = folder / SOURCE_FILE
    return path.exists() and json_files.read(path, f"delete {folder}") == _source(directory)


def _source(directory: str | Path) -> dict:
    """What a cache is made from: the checksums of the shards."""
    path = Path(directory) / shards.CHECKSUMS_FILE
    return {"shards": path.read_text().splitlines() if path.exists() else []}


def _paths(folder: Path) -> StepBatch:
    names = jax.tree_util.tree_map_with_path(lambda keys, _: f"{keys[-1].name}.npy", field_shapes(()))
    return jax.tree.map(lambda name: folder / name, names)


def _build(folder: Path, directory: str | Path, split: str, lengths: Sequence[int]) -> None:
    """Decodes every episode into new files, under a temporary name until all is there."""
    fields = field_shapes((sum(lengths),))
    temporary = folder.with_name(f"{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
        temporary.mkdir()
        _write_fields(_paths(temporary), fields, directory, split, lengths)
        shards.write_checksums(temporary, jax.tree.leaves(_paths(temporary)))
        json_files.write(temporary / SOURCE_FILE, _source(directory))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except OSError as error:
        size = sum(math.prod(field.shape) * field.dtype.itemsize for field in jax.tree.leaves(fields)) / 1e9
        raise OSError(
            f"{folder} cannot be written ({error}); it takes {size:.3g} GB: make room, or choose another dataset.cache"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_fields(
    paths: StepBatch, fields: StepBatch, directory: str | Path, split: str, lengths: Sequence[int]
) -> None:
    """Appends one episode after another; not through a map, where a full disk ends the process without a word."""
    source = datasets.Episodes(datasets.open_builder(directory, split), split)
    with contextlib.ExitStack() as stack:
        files = jax.tree.map(lambda path: stack.enter_context(open(path, "wb")), paths)

        def begin(file: Any, field: jax.ShapeDtypeStruct) -> None:
            header = {"descr": npy.dtype_to_descr(field.dtype), "fortran_order": False, "shape": field.shape}
            npy.write_array_header_1_0(file, header)

        jax.tree.map(begin, files, fields)
        for index, length in enumerate(tqdm(lengths, desc=f"raw cache of {split}", unit="episode", disable=None)):
            steps = datasets.decode(source.steps(index), slice(0, length))
            jax.tree.map(lambda file, values: file.write(np.ascontiguousarray(values)), files, steps)
