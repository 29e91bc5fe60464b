"""Datasets read back: opened and checked, and episodes or annotated attempts decoded into steps.

This file and `rlds.py` are the only ones that know how episodes are stored.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import jax
import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from wam_jax import cores, shards, specs
from wam_jax.images import resize
from wam_jax.types import Observation, StepBatch


def read_episodes(directory: str | Path, split: str = "train") -> list[StepBatch]:
    """Decodes all episodes of a split into memory.

    Args:
      directory: a dataset as `rlds.py` writes it.
      split: "train" or "validation".

    Returns:
      for each episode its steps, numpy [T, ...], with the dtypes and image size that types.py states.

    Raises:
      ValueError: no complete dataset there, or no such split.
    """
    source = Episodes(open_builder(directory, split), split)
    with ThreadPoolExecutor(num_threads()) as pool:
        episodes = pool.map(lambda i: decode(source.steps(i)), range(len(source)))
        bar = tqdm(episodes, f"reading {split}", len(source), unit="episode", disable=None)
        return list(bar)


def read_attempts(
    directory: str | Path, split: str, tasks: Sequence[int], *, min_steps: int = 8
) -> dict[int, list[StepBatch]]:
    """Decodes the annotated attempts at some tasks, successes and failures, and nothing else of a split of play.

    Each attempt is an episode of its own, so that its first frame meets the filter as an evaluation's does.

    Args:
      directory: a dataset as `rlds.py` writes it.
      split: "train" or "validation".
      tasks: indices into specs.TASKS.
      min_steps: shorter attempts are left out.

    Returns:
      for each task its attempts, numpy [T, ...] each; none where the dataset has no such split.

    Raises:
      ValueError: no complete dataset there.
    """
    builder = open_builder(directory)
    if split not in builder.info.splits:
        return {task: [] for task in tasks}
    source = Episodes(builder, split)

    def cut(index):
        steps = source.steps(index)
        spans = attempt_spans(_task_indices(steps["task"]), tasks, min_steps=min_steps)
        return [(task, decode(steps, span)) for task, span in spans]

    attempts: dict[int, list[StepBatch]] = {task: [] for task in tasks}
    with ThreadPoolExecutor(num_threads()) as pool:
        found = pool.map(cut, range(len(source)))
        for task, steps in itertools.chain.from_iterable(
            tqdm(found, f"attempts in {split}", len(source), unit="episode", disable=None)
        ):
            attempts[task].append(steps)
    return attempts


def read_windows(
    directory: str | Path, split: str, length: int, max_windows: int, *, batch_size: int = 32
) -> Iterator[StepBatch]:
    """Decodes windows of consecutive steps, none of which overlap, spread evenly over a split.

    Args:
      directory: a dataset as `rlds.py` writes it.
      split: "train" or "validation".
      length: T, steps of a window.
      max_windows: all there are, where there are fewer.
      batch_size: windows that are in memory at once.

    Yields:
      up to `batch_size` windows, numpy [B, T, ...].

    Raises:
      ValueError: no complete dataset there, no such split, or every episode is shorter than a window.
    """
    lengths = episode_lengths(directory, split)
    spans = [(i, start) for i, steps in enumerate(lengths) for start in range(0, steps - length + 1, length)]
    if not spans:
        raise ValueError(
            f"{directory}: no episode of {split!r} has {length} steps, the longest has {max(lengths)}; take shorter "
            "windows"
        )
    rows = np.unique(np.linspace(0, len(spans) - 1, min(max_windows, len(spans))).round().astype(int))
    source = Episodes(open_builder(directory, split), split)

    def cut(row):
        episode, start = spans[row]
        return decode(source.steps(episode), slice(start, start + length))

    with ThreadPoolExecutor(num_threads()) as pool:
        for first in range(0, len(rows), batch_size):
            windows = list(pool.map(cut, rows[first : first + batch_size]))
            yield jax.tree.map(lambda *x: np.stack(x), *windows)


def count_attempts(directory: str | Path, split: str) -> dict[str, dict[str, int]]:
    """For each task of specs.TASKS how many annotated attempts there are, and how many of them the oracle finds solved.

    Raises:
      ValueError: no complete dataset there, or no such split.
    """
    source = Episodes(open_builder(directory, split), split)
    counts = {task: {"attempts": 0, "solved": 0} for task in specs.TASKS}
    for index in range(len(source)):
        steps = source.steps(index)
        for task, span in attempt_spans(_task_indices(steps["task"]), range(len(specs.TASKS)), min_steps=1):
            counts[specs.TASKS[task]]["attempts"] += 1
            counts[specs.TASKS[task]]["solved"] += int(np.max(steps["reward"][span]) > 0)
    return counts


def attempt_spans(labels: np.ndarray, tasks: Sequence[int], *, min_steps: int) -> list[tuple[int, slice]]:
    """Stretches of one label, of at least `min_steps`, that are one of `tasks`: (task, span) in the order of time."""
    change = np.flatnonzero(np.diff(labels, prepend=-2, append=-2))
    return [
        (int(labels[start]), slice(int(start), int(end)))
        for start, end in zip(change[:-1], change[1:], strict=True)
        if labels[start] in tasks and end - start >= min_steps
    ]


def episode_lengths(directory: str | Path, split: str) -> list[int]:
    """The number of steps of each episode, from the metadata alone.

    Raises:
      ValueError: no complete dataset there, or no such split.
    """
    lengths = (open_builder(directory, split).info.metadata or {}).get(shards.EPISODE_LENGTHS)
    if lengths is None:
        raise ValueError(
            f"{directory}: metadata.json lacks {shards.EPISODE_LENGTHS}; write the dataset with wam_jax.rlds"
        )
    return lengths[split]


def episode_tasks(directory: str | Path, split: str = "train") -> list[int]:
    """The task of each episode's first step, an index into specs.TASKS, -1 for none; decodes no image.

    Raises:
      ValueError: no complete dataset there, or no such split.
    """
    source = Episodes(open_builder(directory, split), split)
    return [int(_task_indices(source.steps(i)["task"][:1])[0]) for i in range(len(source))]


def read_vectors(directory: str | Path, split: str) -> Iterator[dict[str, np.ndarray]]:
    """The vectors of each episode of a split, unrounded; decodes no image.

    Args:
      directory: a dataset as `rlds.py` writes it.
      split: "train" or "validation".

    Yields:
      float64 robot_obs [T, 15], scene_obs [T, 24] and action [T, 7].

    Raises:
      ValueError: no complete dataset there, or no such split.
    """
    source = Episodes(open_builder(directory, split), split)
    for index in range(len(source)):
        steps = source.steps(index)
        yield {key: _float64((steps["observation"] | steps)[key]) for key in ("robot_obs", "scene_obs", "action")}


def verify(directory: str | Path) -> list[str]:
    """Compares every shard of a dataset with its checksum, then decodes every field of every step.

    Args:
      directory: a dataset as `rlds.py` writes it.

    Returns:
      one line for each fault, empty if there is none; the records are decoded only where the checksums are right.

    Raises:
      ValueError: no complete dataset there, or one without checksums.
    """
    again = f"{shards.INFO_FILE} there and run the command that wrote the dataset again"
    faults = shards.compare_checksums(
        directory,
        shards.written(directory),
        f"delete it and {again}: it writes this shard anew",
        no_checksums=f"delete {again}: it keeps the shards and writes their checksums",
    )
    if faults:
        return faults
    builder = open_builder(directory)
    for split in builder.info.splits:
        source, lengths = builder.as_data_source(split), episode_lengths(directory, split)
        if len(source) != len(lengths):
            faults.append(f"{directory}: {split!r} holds {len(source)} episodes, metadata.json says {len(lengths)}")
            continue
        with ThreadPoolExecutor(num_threads()) as pool:
            checked = pool.map(functools.partial(_fault_of_episode, source), range(len(source)), lengths)
            bar = tqdm(checked, f"verifying {split}", len(source), unit="episode", disable=None)
            faults += [f"{directory}: episode {i} of {split!r} {fault}" for i, fault in enumerate(bar) if fault]
    return faults


def _fault_of_episode(source: Sequence[dict], index: int, length: int) -> str:
    """What is wrong with an episode, "" if nothing; every field is decoded as any user of TFDS would read it."""
    try:
        steps = sum(1 for _ in source[index]["steps"])
    except Exception as error:  # of ArrayRecord, protobuf, TFDS or an image decoder
        return f"cannot be decoded ({' '.join(str(error).split())[:200]})"
    if steps != length:
        return f"has {steps} steps, metadata.json says {length}"
    return ""


def open_builder(directory: str | Path, split: str | None = None) -> tfds.core.DatasetBuilder:
    """Opens a dataset after checking that it is whole, and that it has the split where one is named.

    Raises:
      ValueError: no dataset there, a half-written or damaged one, or no such split.
    """
    directory = Path(directory)
    if not directory.is_dir():
        if directory.exists():
            raise ValueError(f"dataset directory {directory} is a file; name the folder of a dataset")
        raise ValueError(
            f"dataset directory {directory} does not exist; check the path, or collect data there (experiments."
            "collect_playtable, experiments.collect_calvin) or convert them (data.calvin.convert)"
        )
    if not (directory / shards.INFO_FILE).exists():
        half = any(directory.glob("*.array_record-*"))
        mend = (
            f"is half-written (shards, no {shards.INFO_FILE}); run the command that wrote it again"
            if half
            else (f"holds no dataset (no {shards.INFO_FILE}); give the directory with the shards")
        )
        raise ValueError(f"{directory} {mend}")
    shards.check_sizes(directory)
    try:
        builder = tfds.builder_from_directory(directory)
        _ = builder.info.metadata  # read only now
    except Exception as error:  # of TFDS, its protobufs or its features, about damaged metadata
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{directory}: its metadata cannot be read ({reason}); write the dataset again") from error
    if split is not None and split not in builder.info.splits:
        raise ValueError(f"{directory} has no split {split!r}; it has {', '.join(sorted(builder.info.splits))}")
    return builder


class Episodes:
    """The episodes of a split by number, their steps still serialized."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        """Opens the split's shards; a dataset from `open_builder`."""
        self._directory, self._split = builder.data_dir, split
        self._source = builder.as_data_source(split, decoders={"steps": tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._source)

    def steps(self, index: int) -> dict:
        """The steps of one episode.

        Raises:
          ValueError: the shard that holds it is damaged.
        """
        return self._read(index)["steps"]

    def metadata(self, index: int) -> dict:
        """What is known of one episode: source, id, first frame and annotations.

        Raises:
          ValueError: the shard that holds it is damaged.
        """
        return self._read(index)["episode_metadata"]

    def _read(self, index: int) -> dict:
        try:
            return self._source[index]
        except Exception as error:  # of ArrayRecord, protobuf or TFDS
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{self._directory}: episode {index} of {self._split!r} cannot be read ({reason}); delete the dataset "
                "and write it again"
            ) from error


def decode(steps: dict, span: slice = slice(None)) -> StepBatch:
    """Decodes a span of an episode's serialized steps; the other images stay untouched."""
    observation = steps["observation"]
    return StepBatch(
        observation=Observation(
            rgb_static=_decode_images(observation["rgb_static"][span]),
            rgb_gripper=_decode_images(observation["rgb_gripper"][span]),
            robot_obs=_decode_vectors(observation["robot_obs"][span]),
            scene_obs=_decode_vectors(observation["scene_obs"][span]),
        ),
        action=_decode_vectors(steps["action"][span]),
        is_first=steps["is_first"][span].astype(bool),
        is_last=steps["is_last"][span].astype(bool),
        task=_task_indices(steps["task"][span]),
        reward=steps["reward"][span].astype(np.float32),
    )


def _task_indices(names: Sequence[bytes]) -> np.ndarray:
    return np.array([_TASK_INDEX.get(name, -1) for name in names], np.int32)


_TASK_INDEX = {task.encode(): i for i, task in enumerate(specs.TASKS)}


def _decode_vectors(values: Sequence[bytes]) -> np.ndarray:
    return _float64(values).astype(np.float32)


def _float64(values: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(values), np.float64).reshape(len(values), -1)


def _decode_images(pngs: Sequence[bytes]) -> np.ndarray:
    images = np.empty((len(pngs), specs.IMAGE_SIZE, specs.IMAGE_SIZE, 3), np.uint8)
    for image, png in zip(images, pngs, strict=True):
        decoded = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
        if decoded is None:
            raise ValueError("a shard holds an image that is no PNG; delete the shard and write it again")
        image[:] = resize(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB))
    return images


def num_threads() -> int:
    """How many threads decode side by side."""
    return min(32, cores.count())
