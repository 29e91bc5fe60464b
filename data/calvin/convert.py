"""Converts a CALVIN download (training/ and validation/ with one npz file a frame) to RLDS shards.

    python -m data.calvin.convert --input=task_D_D --output=shards/calvin_d --workers=8

A process writes a shard at a time. A killed conversion goes on where it stopped when the same command is run again:
finished shards are kept, the others written. Every file is checked; the first that is not as expected ends the run
with one line that names it and says how to mend it.
"""

import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import app, flags
from tqdm import tqdm

from data.calvin import episodes as calvin_episodes
from data.calvin.episodes import PlannedEpisode
from data.calvin.npz_folder import FRAME_ARRAYS, Folder, read_folder
from wam_jax import rlds, specs

SPLIT_FOLDERS = {"train": "training", "validation": "validation"}

_INPUT = flags.DEFINE_string("input", None, "Folder that holds training/ and validation/.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the shards; made if missing.", required=True)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", specs.IMAGE_SIZE, "Pixels of both cameras; 0 keeps 200 and 84.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes, each writing one shard at a time.")
_FRAMES_PER_SHARD = flags.DEFINE_integer("frames_per_shard", 5000, "A shard is full with this many frames.")
_MAX_EPISODE_STEPS = flags.DEFINE_integer("max_episode_steps", 500, "Longer stretches of play are cut.")


def convert(
    input_folder: Path,
    output: Path,
    image_size: int = specs.IMAGE_SIZE,
    workers: int = 1,
    frames_per_shard: int = 5000,
    max_episode_steps: int = 500,
) -> None:
    """Converts both folders of a download.

    Args:
      input_folder: holds training/ and validation/.
      output: directory of the dataset.
      image_size: pixels of both cameras, 0 keeps the recorded sizes.
      workers: processes.
      frames_per_shard: a shard takes episodes until it has this many frames.
      max_episode_steps: longer stretches of play are cut into episodes of about equal length.

    Raises:
      ValueError: an argument or a file is not as expected.
    """
    if image_size < 0 or min(workers, frames_per_shard, max_episode_steps) < 1:
        raise ValueError(
            f"image_size={image_size}, workers={workers}, frames_per_shard={frames_per_shard}, "
            f"max_episode_steps={max_episode_steps}: expected image_size >= 0 and the others >= 1"
        )
    folders = {split: read_folder(Path(input_folder) / name) for split, name in SPLIT_FOLDERS.items()}
    shards = {
        split: calvin_episodes.group_into_shards(
            calvin_episodes.plan_episodes(folder, max_episode_steps), frames_per_shard
        )
        for split, folder in folders.items()
    }
    spec = _dataset_spec(image_size)
    plan = {
        "image_size": image_size,
        "frames_per_shard": frames_per_shard,
        "max_episode_steps": max_episode_steps,
        **{f"{split} frames": _digest(shards[split], folder) for split, folder in folders.items()},
    }
    if rlds.start_dataset(output, plan):
        print(f"{output} is complete already")
        return
    jobs = [
        _Job(Path(output), spec, split, index, len(of_split), folders[split], tuple(shard), image_size)
        for split, of_split in shards.items()
        for index, shard in enumerate(of_split)
    ]
    lengths: dict[str, list] = {split: [None] * len(of_split) for split, of_split in shards.items()}
    with tqdm(total=sum(job.frames for job in jobs), desc="converting", unit="frame", disable=None) as bar:
        for job, of_shard in _run(jobs, workers):
            lengths[job.split][job.index] = of_shard
            bar.update(job.frames)
    rlds.finish_dataset(output, spec, lengths, f"CALVIN play data, converted from {Path(input_folder).name}.")
    for split, folder in folders.items():
        print(_summary(split, folder, shards[split]))


@dataclasses.dataclass(frozen=True)
class _Job:
    """One shard to write: all that a worker needs."""

    output: Path
    spec: rlds.DatasetSpec
    split: str
    index: int
    num_shards: int
    folder: Folder
    episodes: tuple[PlannedEpisode, ...]
    image_size: int

    @property
    def frames(self) -> int:
        return sum(map(len, self.episodes))


def _write(job: _Job) -> list[int]:
    episodes = (calvin_episodes.read_episode(job.folder, plan, job.image_size) for plan in job.episodes)
    return rlds.write_shard(job.output, job.spec, job.split, job.index, job.num_shards, episodes)


def _run(jobs: Sequence[_Job], workers: int) -> Iterator[tuple[_Job, list[int]]]:
    """Yields each job with its result as it is done; the first error ends all."""
    if workers == 1:
        yield from ((job, _write(job)) for job in jobs)
        return
    # Spawned, not forked: JAX and TFDS hold threads, which a fork does not copy.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker) as pool:
        futures = {pool.submit(_write, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():  # they would finish their shards first
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the workers
    _use_cpu()
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Ends a worker whose parent was killed; it would otherwise wait for its next shard for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _use_cpu() -> None:
    """Keeps the task oracle, a JAX function, off the accelerator."""
    jax.config.update("jax_platforms", "cpu")


def _dataset_spec(image_size: int) -> rlds.DatasetSpec:
    def size(camera):
        return (image_size, image_size) if image_size else FRAME_ARRAYS[camera][0][:2]

    return rlds.DatasetSpec("calvin", size("rgb_static"), size("rgb_gripper"), (("action_absolute", specs.ACTION_DIM),))


def _digest(shards: list[list[PlannedEpisode]], folder: Folder) -> str:
    """A fingerprint of what goes into the shards of a split."""
    return hashlib.sha256(repr((shards, folder.scenes)).encode()).hexdigest()


def _summary(split: str, folder: Folder, shards: list[list[PlannedEpisode]]) -> str:
    planned = [episode for shard in shards for episode in shard]
    kept = {annotation for episode in planned for annotation in episode.annotations}
    dropped = [annotation for annotation in folder.annotations if annotation not in kept]
    text = (
        f"{split}: {sum(map(len, planned))} frames, {len(planned)} episodes from {len(folder.ranges)} ranges, "
        f"{len(kept)} annotations, {len(shards)} shards"
    )
    if dropped:
        text += (
            f"; {len(dropped)} annotations lie outside every range of ep_start_end_ids.npy and were left out, "
            f"the first is {dropped[0].start} to {dropped[0].end}"
        )
    return text


def main(argv: Sequence[str]) -> None:
    """Converts what the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; everything is given by flags")
    _use_cpu()
    try:
        convert(
            Path(_INPUT.value),
            Path(_OUTPUT.value),
            _IMAGE_SIZE.value,
            _WORKERS.value,
            _FRAMES_PER_SHARD.value,
            _MAX_EPISODE_STEPS.value,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted: finished shards are kept; the same command goes on from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    app.run(main)
