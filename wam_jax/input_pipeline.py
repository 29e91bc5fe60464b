"""Shards to batches: windows of consecutive steps, shuffled, prefetched, and laid out for many updates a dispatch.

Batch `i` is a pure function of (dataset, split, seed, i), so a resumed run starts at its step and sees what it would
have seen. Epoch e visits every valid start of a window once, in an order drawn from (seed, e); batch i holds the
windows i B to (i + 1) B of that endless sequence.

This file and `rlds.py` are the only ones that know how episodes are stored.
"""

import collections
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import jax
import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from wam_jax import parallel, rlds, specs
from wam_jax.types import Observation, StepBatch


def read_episodes(directory: str | Path, split: str = "train", progress: bool = True) -> list[StepBatch]:
    """Decodes all episodes of a split into memory.

    Args:
      directory: a dataset as `rlds.py` writes it.
      split: "train" or "validation".
      progress: shows a progress bar on a terminal.

    Returns:
      for each episode its steps, numpy [T, ...], with the dtypes and image size that types.py states.

    Raises:
      ValueError: no complete dataset there, or no such split.
    """
    source = _open_source(_open_builder(directory, split), split)
    with ThreadPoolExecutor(_num_threads()) as pool:
        episodes = pool.map(lambda i: _decode(source[i]["steps"]), range(len(source)))
        bar = tqdm(episodes, f"reading {split}", len(source), unit="episode", disable=None if progress else True)
        return list(bar)


def read_attempts(
    directory: str | Path, split: str, tasks: Sequence[int], *, min_steps: int = 8, progress: bool = True
) -> dict[int, list[StepBatch]]:
    """Decodes the annotated attempts at some tasks, successes and failures, and nothing else of a split of play.

    Each attempt is an episode of its own, so that its first frame meets the filter as an evaluation's does.

    Args:
      directory: a dataset as `rlds.py` writes it.
      split: "train" or "validation".
      tasks: indices into specs.TASKS.
      min_steps: shorter attempts are left out.
      progress: shows a progress bar on a terminal.

    Returns:
      for each task its attempts, numpy [T, ...] each; none where the dataset has no such split.

    Raises:
      ValueError: no complete dataset there.
    """
    builder = _open_builder(directory)
    if split not in builder.info.splits:
        return {task: [] for task in tasks}
    source = _open_source(builder, split)

    def cut(index):
        steps = source[index]["steps"]
        spans = attempt_spans(_task_indices(steps["task"]), tasks, min_steps=min_steps)
        return [(task, _decode(steps, span)) for task, span in spans]

    attempts: dict[int, list[StepBatch]] = {task: [] for task in tasks}
    with ThreadPoolExecutor(_num_threads()) as pool:
        found = pool.map(cut, range(len(source)))
        hidden = None if progress else True
        for task, steps in itertools.chain.from_iterable(
            tqdm(found, f"attempts in {split}", len(source), unit="episode", disable=hidden)
        ):
            attempts[task].append(steps)
    return attempts


def attempt_spans(labels: np.ndarray, tasks: Sequence[int], *, min_steps: int) -> list[tuple[int, slice]]:
    """Stretches of one label, of at least `min_steps`, that are one of `tasks`: (task, span) in the order of time."""
    change = np.flatnonzero(np.diff(labels, prepend=-2, append=-2))
    return [
        (int(labels[start]), slice(int(start), int(end)))
        for start, end in zip(change[:-1], change[1:], strict=True)
        if labels[start] in tasks and end - start >= min_steps
    ]


class StreamingStore:
    """Reads a window's episode from disk at every access, and decodes the images of the window alone."""

    def __init__(self, directory: str | Path, split: str):
        self._source = _open_source(_open_builder(directory, split), split)

    def window(self, episode: int, start: int, length: int) -> StepBatch:
        """Returns `length` steps of an episode from step `start` on, numpy [length, ...]."""
        return _decode(self._source[episode]["steps"], slice(start, start + length))


class MemoryStore:
    """Decodes all episodes once (24.6 kB a step) and slices them."""

    def __init__(self, directory: str | Path, split: str):
        self._episodes = read_episodes(directory, split)

    def window(self, episode: int, start: int, length: int) -> StepBatch:
        """Returns `length` steps of an episode from step `start` on, numpy views [length, ...]."""
        return jax.tree.map(lambda x: x[start : start + length], self._episodes[episode])


STORES = {"none": StreamingStore, "memory": MemoryStore}  # by the name that `cache` gives


class Windows:
    """The windows of a split, by number: number n of the endless shuffled sequence is a function of (seed, n)."""

    def __init__(self, episode_lengths: Sequence[int], length: int, seed: int):
        """Counts the valid starts: a window lies within one episode.

        Args:
          episode_lengths: steps of each episode.
          length: steps of a window.
          seed: of the order.

        Raises:
          ValueError: no episode is as long as a window.
        """
        if length > max(episode_lengths):
            raise ValueError(
                f"window length {length} is longer than every episode; the longest has {max(episode_lengths)} steps: "
                "shorten the window or collect longer episodes"
            )
        starts = np.maximum(0, np.asarray(episode_lengths) - length + 1)
        self._first = np.concatenate([[0], np.cumsum(starts)])  # number of the first window of each episode, unshuffled
        self.count = int(self._first[-1])
        self._order = functools.lru_cache(maxsize=2)(functools.partial(_epoch_order, seed, self.count))

    def __call__(self, number: int) -> tuple[int, int]:
        """Returns the episode and the start of window `number`, counted over all epochs."""
        epoch, position = divmod(number, self.count)
        window = self._order(epoch)[position]
        episode = int(np.searchsorted(self._first, window, side="right")) - 1
        return episode, int(window - self._first[episode])


def _epoch_order(seed: int, count: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def window_numbers(
    step: int, batch_size: int, num_devices: int, num_updates: int, process_index: int = 0, process_count: int = 1
) -> np.ndarray:
    """Which windows one process loads for the updates `step` to `step + num_updates - 1`.

    Args:
      step: first update.
      batch_size: B, windows of one update over all devices of all processes.
      num_devices: D, of this process.
      num_updates: N.
      process_index: of this process; the processes take disjoint parts of each batch.
      process_count: how many processes share a batch.

    Returns:
      int [D, N, B / (D * process_count)], window numbers.
    """
    first = step * batch_size
    numbers = np.arange(first, first + num_updates * batch_size)
    numbers = numbers.reshape(num_updates, process_count, num_devices, -1)[:, process_index]
    return numbers.swapaxes(0, 1)


class Batches:
    """Iterator of batches on the devices, loaded ahead of use by background threads.

    Attributes:
      seconds_waiting: how long the consumer has been blocked in `next` so far; 0 means that data never held it up.
      step: the update that the next batch begins with; give it as `start_step` to continue there.
    """

    def __init__(
        self,
        load: Callable[[int], StepBatch],
        start_step: int,
        updates_per_dispatch: int,
        prefetch: int,
        on_close: Callable[[], None] = lambda: None,
    ):
        """Starts loading.

        Args:
          load: from the first update of a dispatch to its batch.
          start_step: first update of the first batch.
          updates_per_dispatch: updates a batch is for.
          prefetch: batches to hold ready.
          on_close: called once nothing is loaded any more.
        """
        self._on_close = on_close
        self.seconds_waiting = 0.0
        self.step = start_step
        self._updates_per_dispatch = updates_per_dispatch
        self._load = load
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ready: collections.deque[Future] = collections.deque()
        for i in range(prefetch):
            self._request(start_step + i * updates_per_dispatch)
        self._next_request = start_step + prefetch * updates_per_dispatch

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        start = time.perf_counter()
        batch = self._ready.popleft().result()
        self.seconds_waiting += time.perf_counter() - start
        self._request(self._next_request)
        self._next_request += self._updates_per_dispatch
        self.step += self._updates_per_dispatch
        return batch

    def _request(self, step: int) -> None:
        self._ready.append(self._pool.submit(self._load, step))

    def close(self) -> None:
        """Stops the threads; the batches already loaded are dropped."""
        self._pool.shutdown(cancel_futures=True)
        self._on_close()


def make_batches(
    directory: str | Path,
    split: str,
    batch_size: int,
    length: int,
    seed: int,
    start_step: int = 0,
    num_devices: int = 1,
    updates_per_dispatch: int = 1,
    cache: str = "memory",
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
) -> Batches:
    """Opens a split as an endless iterator of shuffled batches on the devices.

    Args:
      directory: a dataset as `rlds.py` writes it.
      split: "train" or "validation".
      batch_size: B, windows of one update over all devices of all processes.
      length: T, steps of a window; windows never cross the end of an episode.
      seed: of the order of the windows.
      start_step: the update to start with.
      num_devices: D, of this process; 0 means all it has.
      updates_per_dispatch: N, updates that one batch is for.
      cache: "memory" decodes every episode once, before the first batch; "none" reads and decodes each window from
        disk. Both give the same batches.
      process_index: of this process.
      process_count: how many processes share each batch, in disjoint parts.
      prefetch: batches held ready on the devices.

    Returns:
      an iterator of StepBatch [D, N, B / (D * process_count), T, ...], the axis D over the devices.

    Raises:
      ValueError: no complete dataset, no such split, a window longer than every episode, a batch that does not divide,
        or an unknown cache mode.
    """
    if cache not in STORES:
        raise ValueError(f"cache={cache!r} is not known; choose one of {', '.join(STORES)}")
    if min(length, updates_per_dispatch, prefetch) < 1:
        raise ValueError(
            f"length={length}, updates_per_dispatch={updates_per_dispatch} and prefetch={prefetch} must be at least 1"
        )
    devices = parallel.local_devices(num_devices)
    parallel.check_batch_size(batch_size, len(devices) * process_count)
    windows = Windows(episode_lengths(directory, split), length, seed)
    store = STORES[cache](directory, split)
    mesh = jax.sharding.Mesh(np.asarray(devices), (parallel.AXIS_NAME,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(parallel.AXIS_NAME))
    pool = ThreadPoolExecutor(_num_threads(), thread_name_prefix="windows")

    def load(step: int) -> StepBatch:
        numbers = window_numbers(step, batch_size, len(devices), updates_per_dispatch, process_index, process_count)
        batch = _load_windows(store.window, [windows(n) for n in numbers.ravel()], length, pool)
        batch = jax.tree.map(lambda x: x.reshape(*numbers.shape, *x.shape[1:]), batch)
        return jax.device_put(batch, sharding)

    return Batches(load, start_step, updates_per_dispatch, prefetch, on_close=pool.shutdown)


def episode_lengths(directory: str | Path, split: str) -> list[int]:
    """The number of steps of each episode, from the metadata alone.

    Raises:
      ValueError: no complete dataset there, or no such split.
    """
    lengths = (_open_builder(directory, split).info.metadata or {}).get(rlds.EPISODE_LENGTHS)
    if lengths is None:
        raise ValueError(
            f"{directory}: metadata.json lacks {rlds.EPISODE_LENGTHS}; write the dataset with wam_jax.rlds"
        )
    return lengths[split]


def episode_tasks(directory: str | Path, split: str = "train") -> list[int]:
    """The task of each episode's first step, an index into specs.TASKS, -1 for none; decodes no image.

    Raises:
      ValueError: no complete dataset there, or no such split.
    """
    source = _open_source(_open_builder(directory, split), split)
    return [int(_task_indices(source[i]["steps"]["task"][:1])[0]) for i in range(len(source))]


def _load_windows(
    window: Callable, starts: Sequence[tuple[int, int]], length: int, pool: ThreadPoolExecutor
) -> StepBatch:
    """Loads windows in parallel into one array each field, [len(starts), length, ...]."""
    # Fresh memory each time: on CPU, device_put may alias the array instead of copying it.
    batch = jax.tree.map(lambda x: np.empty((len(starts), length, *x.shape), x.dtype), _STEP)

    def fill(i: int) -> None:
        jax.tree.map(lambda to, what: np.copyto(to[i], what), batch, window(*starts[i], length))

    list(pool.map(fill, range(len(starts))))
    return batch


_STEP = StepBatch(
    observation=Observation(
        rgb_static=np.empty((specs.IMAGE_SIZE, specs.IMAGE_SIZE, 3), np.uint8),
        rgb_gripper=np.empty((specs.IMAGE_SIZE, specs.IMAGE_SIZE, 3), np.uint8),
        robot_obs=np.empty(specs.ROBOT_OBS_DIM, np.float32),
        scene_obs=np.empty(specs.SCENE_OBS_DIM, np.float32),
    ),
    action=np.empty(specs.ACTION_DIM, np.float32),
    is_first=np.empty((), bool),
    is_last=np.empty((), bool),
    task=np.empty((), np.int32),
    reward=np.empty((), np.float32),
)


def _open_builder(directory: str | Path, split: str | None = None) -> tfds.core.DatasetBuilder:
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(
            f"dataset directory {directory} does not exist; check the path, or collect or convert data there"
        )
    if not (directory / "dataset_info.json").exists():
        half = any(directory.glob("*.array_record-*"))
        mend = (
            "is half-written (shards, no dataset_info.json); run the command that wrote it again"
            if half
            else ("holds no dataset (no dataset_info.json); give the directory with the shards")
        )
        raise ValueError(f"{directory} {mend}")
    rlds.check_shards(directory)
    try:
        builder = tfds.builder_from_directory(directory)
    except Exception as error:  # of TFDS, its protobufs or its features, about damaged metadata
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{directory}: its metadata cannot be read ({reason}); write the dataset again") from error
    if split is not None and split not in builder.info.splits:
        raise ValueError(f"{directory} has no split {split!r}; it has {', '.join(sorted(builder.info.splits))}")
    return builder


def _open_source(builder: tfds.core.DatasetBuilder, split: str) -> Sequence[dict]:
    return builder.as_data_source(split, decoders={"steps": tfds.decode.SkipDecoding()})


def _decode(steps: dict, span: slice = slice(None)) -> StepBatch:
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
    return np.frombuffer(b"".join(values), np.float64).reshape(len(values), -1).astype(np.float32)


def _decode_images(pngs: Sequence[bytes]) -> np.ndarray:
    images = np.empty((len(pngs), specs.IMAGE_SIZE, specs.IMAGE_SIZE, 3), np.uint8)
    for image, png in zip(images, pngs, strict=True):
        decoded = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
        if decoded is None:
            raise ValueError("a shard holds an image that is no PNG; delete the shard and write it again")
        image[:] = resize(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB))
    return images


def resize(image: np.ndarray, size: int = specs.IMAGE_SIZE) -> np.ndarray:
    """Brings an image, uint8 [h, w, 3], to `size` x `size` by averaging areas; the one resize of the project."""
    if image.shape[:2] == (size, size):
        return image
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)


def _num_threads() -> int:
    return min(32, os.cpu_count() or 1)
