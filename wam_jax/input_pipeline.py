"""Shards to batches: windows of consecutive steps, shuffled, prefetched, and laid out for many updates a dispatch.

Batch `i` is a pure function of (dataset, split, seed, i), so a resumed run starts at its step and sees what it would
have seen. Epoch e visits every valid start of a window once, in an order drawn from (seed, e); batch i holds the
windows i B to (i + 1) B of that endless sequence.
"""

import collections
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from wam_jax import datasets, parallel, specs
from wam_jax.types import Observation, StepBatch


class StreamingStore:
    """Reads a window's episode from disk at every access, and decodes the images of the window alone."""

    def __init__(self, directory: str | Path, split: str):
        self._source = datasets.Episodes(datasets.open_builder(directory, split), split)

    def window(self, episode: int, start: int, length: int) -> StepBatch:
        """Returns `length` steps of an episode from step `start` on, numpy [length, ...]."""
        return datasets.decode(self._source.steps(episode), slice(start, start + length))


class MemoryStore:
    """Decodes all episodes once (24.6 kB a step) and slices them."""

    def __init__(self, directory: str | Path, split: str):
        self._episodes = datasets.read_episodes(directory, split)

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
    windows = Windows(datasets.episode_lengths(directory, split), length, seed)
    store = STORES[cache](directory, split)
    pool = ThreadPoolExecutor(datasets.num_threads(), thread_name_prefix="windows")

    def load(step: int) -> StepBatch:
        numbers = window_numbers(step, batch_size, len(devices), updates_per_dispatch, process_index, process_count)
        batch = _load_windows(store.window, [windows(n) for n in numbers.ravel()], length, pool)
        batch = jax.tree.map(lambda x: x.reshape(*numbers.shape, *x.shape[1:]), batch)
        return parallel.shard(batch, devices)

    return Batches(load, start_step, updates_per_dispatch, prefetch, on_close=pool.shutdown)


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
