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
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wam_jax import datasets, parallel, raw_cache
from wam_jax.types import Array, StepBatch


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


class MappedStore:
    """Slices a raw cache on disk, which is built at the first use."""

    def __init__(self, directory: str | Path, split: str):
        self._steps = raw_cache.load(directory, split)
        self._first = _firsts(datasets.episode_lengths(directory, split))

    def window(self, episode: int, start: int, length: int) -> StepBatch:
        """Returns `length` steps of an episode from step `start` on, numpy views [length, ...]."""
        first = self._first[episode] + start
        return jax.tree.map(lambda x: x[first : first + length], self._steps)


STORES = {"none": StreamingStore, "memory": MemoryStore, "mmap": MappedStore}  # by the name that `cache` gives
CACHES = (*STORES, "device")


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
        load: Callable[[int], Any],
        start_step: int,
        updates_per_dispatch: int,
        prefetch: int,
        on_close: Callable[[], None] = lambda: None,
    ):
        """Starts loading.

        Args:
          load: from the first update of a dispatch to its batch, a StepBatch or a ResidentBatch.
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

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
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
      cache: "none" reads and decodes each window from disk; "memory" decodes every episode once, before the first
        batch; "mmap" maps raw files, made once for all runs; "device" keeps all frames on the devices of all
        processes. All give the same windows.
      process_index: of this process.
      process_count: how many processes share each batch, in disjoint parts.
      prefetch: batches held ready on the devices.

    Returns:
      an iterator of StepBatch [D, N, B / (D * process_count), T, ...], the axis D over the devices; with "device" of
      ResidentBatch.

    Raises:
      ValueError: no complete dataset, no such split, a window longer than every episode, a batch that does not divide,
        or an unknown cache mode.
    """
    if cache not in CACHES:
        raise ValueError(f"cache={cache!r} is not known; choose one of {', '.join(CACHES)}")
    if min(length, updates_per_dispatch, prefetch) < 1:
        raise ValueError(
            f"length={length}, updates_per_dispatch={updates_per_dispatch} and prefetch={prefetch} must be at least 1"
        )
    devices = parallel.local_devices(num_devices)
    parallel.check_batch_size(batch_size, len(devices) * process_count)
    lengths = datasets.episode_lengths(directory, split)
    windows, first = Windows(lengths, length, seed), _firsts(lengths)
    if cache == "device":
        frames = _resident_frames(raw_cache.load(directory, split), length, devices, process_index, process_count)

        def point(step: int) -> ResidentBatch:
            numbers = range(step * batch_size, (step + updates_per_dispatch) * batch_size)
            starts = np.array([first[episode] + start for episode, start in map(windows, numbers)], np.int32)
            starts = starts.reshape(updates_per_dispatch, batch_size)
            return ResidentBatch(*frames, parallel.replicate(starts, devices))

        return Batches(point, start_step, updates_per_dispatch, prefetch)
    store = STORES[cache](directory, split)
    pool = ThreadPoolExecutor(datasets.num_threads(), thread_name_prefix="windows")

    def load(step: int) -> StepBatch:
        numbers = window_numbers(step, batch_size, len(devices), updates_per_dispatch, process_index, process_count)
        batch = _load_windows(store.window, [windows(n) for n in numbers.ravel()], length, pool)
        batch = jax.tree.map(lambda x: x.reshape(*numbers.shape, *x.shape[1:]), batch)
        return parallel.shard(batch, devices)

    return Batches(load, start_step, updates_per_dispatch, prefetch, on_close=pool.shutdown)


# --- Data that live on the devices ---


@flax.struct.dataclass
class ResidentBatch:
    """All frames of a split, divided over the devices, and which windows of them each of N updates takes."""

    steps: StepBatch  # [D, M + T - 1, ...]: M frames a device, and those of the windows that reach beyond them
    first: Array  # int32 [D], the split's frame that a device begins with
    starts: Array  # int32 [D, N, B], first frames of the windows of all devices, counted over the split


def take_windows(batch: ResidentBatch, starts: Array, *, length: int, axis_name: str | None = None) -> StepBatch:
    """Cuts one update's windows out of the frames, inside a compiled program.

    Each device cuts out those that it holds, and the sum over the devices, of which all but one hold zeros, gives each
    its share: windows are the same on any number of devices.

    Args:
      batch: one device's slice of a ResidentBatch.
      starts: int32 [B], of the update.
      length: T.
      axis_name: of the devices.

    Returns:
      [B / D, T, ...].
    """
    local = starts - batch.first
    owned = (local >= 0) & (local <= batch.steps.is_first.shape[0] - length)
    local = jnp.where(owned, local, 0)

    def take(x: Array) -> Array:
        cut = jax.vmap(lambda start: lax.dynamic_slice_in_dim(x, start, length))(local)
        if axis_name is None:
            return cut
        cut = jnp.where(owned.reshape(-1, *(1,) * (cut.ndim - 1)), cut, jnp.zeros((), cut.dtype))
        numeric = cut.astype(jnp.uint8) if cut.dtype == bool else cut
        return lax.psum_scatter(numeric, axis_name, scatter_dimension=0, tiled=True).astype(cut.dtype)

    return jax.tree.map(take, batch.steps)


def _resident_frames(
    steps: StepBatch, length: int, devices: list[jax.Device], process_index: int, process_count: int
) -> tuple[StepBatch, Array]:
    """Puts this process's part of the frames [N, ...] on its devices: `steps` and `first` of a ResidentBatch."""
    num_frames, num_parts = len(steps.is_first), len(devices) * process_count
    size = -(-num_frames // num_parts)  # of windows that begin in a part
    first = size * (process_index * len(devices) + np.arange(len(devices)))

    def part(x: np.ndarray) -> jax.Array:
        padded = np.zeros((len(devices), size + length - 1, *x.shape[1:]), x.dtype)
        for row, begin in zip(padded, first, strict=True):
            held = x[begin : begin + len(row)]
            row[: len(held)] = held
        return parallel.shard(padded, devices)

    return jax.tree.map(part, steps), parallel.shard(first.astype(np.int32), devices)


def _firsts(lengths: Sequence[int]) -> np.ndarray:
    """The first frame of each episode, and one past the last, [len(lengths) + 1]."""
    return np.concatenate([[0], np.cumsum(lengths)])


def _load_windows(
    window: Callable, starts: Sequence[tuple[int, int]], length: int, pool: ThreadPoolExecutor
) -> StepBatch:
    """Loads windows in parallel into one array each field, [len(starts), length, ...]."""
    # Fresh memory each time: on CPU, device_put may alias the array instead of copying it.
    batch = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), raw_cache.field_shapes((len(starts), length)))

    def fill(i: int) -> None:
        jax.tree.map(lambda to, what: np.copyto(to[i], what), batch, window(*starts[i], length))

    list(pool.map(fill, range(len(starts))))
    return batch
