"""Plans the shards of a CALVIN download, writes them one by one and makes them a dataset.

What one machine's processes (`convert.py`) and a cluster's (`convert_beam.py`) have in common.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.calvin import episodes as calvin_episodes
from data.calvin import npz_folder, statistics
from data.calvin.episodes import PlannedEpisode
from data.calvin.npz_folder import FRAME_ARRAYS, Folder, RefusedFiles
from wam_jax import rlds, specs
from wam_jax import shards as shard_files

REPORT_FILE = "refused_files.txt"  # beside the shards, while files of the input are refused


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the contents of the shards, apart from the input."""

    image_size: int = specs.IMAGE_SIZE  # pixels of both cameras, by averaging areas; 0 keeps the recorded sizes
    frames_per_shard: int = 5000  # a shard takes episodes until it has this many frames
    max_episode_steps: int = 500  # longer stretches of play are cut into episodes of about equal length
    language_folder: str = npz_folder.LANGUAGE_FOLDER  # holds auto_lang_ann.npy

    def __post_init__(self):
        for name, least in (("image_size", 0), ("frames_per_shard", 1), ("max_episode_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name}={getattr(self, name)}; expected {least} or more")


DEFAULT_SETTINGS = Settings()


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A download and what becomes of it."""

    output: Path
    settings: Settings
    folders: dict[str, Folder]  # of each split
    shards: dict[str, list[list[PlannedEpisode]]]  # of each split, the episodes of each shard

    @property
    def spec(self) -> rlds.DatasetSpec:
        def size(camera):
            pixels = self.settings.image_size
            return (pixels, pixels) if pixels else FRAME_ARRAYS[camera][0][:2]

        extra = (("action_absolute", specs.ACTION_DIM),)
        return rlds.DatasetSpec("calvin", size("rgb_static"), size("rgb_gripper"), extra)


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard to write: all that a worker needs."""

    output: Path
    spec: rlds.DatasetSpec
    split: str
    index: int
    num_shards: int
    folder: Folder  # its path and scenes
    episodes: tuple[PlannedEpisode, ...]
    image_size: int

    @property
    def frames(self) -> int:
        return sum(map(len, self.episodes))


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard that was written, or why it was not."""

    split: str
    index: int
    lengths: tuple[int, ...]  # steps of each episode
    faults: tuple[str, ...]  # a line for each refused file; then nothing was written


def read_folders(input_folder: Path, language_folder: str) -> tuple[dict[str, Folder], list[str]]:
    """Reads what describes the folder of each split; the second value has a line for each refused file."""
    read = {
        split: npz_folder.read_folder(input_folder / name, language_folder)
        for split, name in npz_folder.SPLIT_FOLDERS.items()
    }
    faults = dict.fromkeys(fault for _, of_folder in read.values() for fault in of_folder)  # in order, each once
    return {split: folder for split, (folder, _) in read.items()}, list(faults)


def plan(input_folder: Path, output: Path, settings: Settings) -> Conversion:
    """Decides what goes into which shard.

    Raises:
      RefusedFiles: files are missing, or those that describe the frames are damaged; all of them.
    """
    folders, faults = read_folders(input_folder, settings.language_folder)
    if faults:
        raise RefusedFiles(faults)
    shards = {
        split: calvin_episodes.group_into_shards(
            calvin_episodes.plan_episodes(folder, settings.max_episode_steps), settings.frames_per_shard
        )
        for split, folder in folders.items()
    }
    return Conversion(output, settings, folders, shards)


def start(conversion: Conversion) -> bool:
    """Makes the output and notes there what is to be written.

    Returns:
      whether the dataset is complete already.

    Raises:
      ValueError: the output holds the shards of another input or of other settings.
    """
    contents = {
        f"{split} frames": _digest(conversion.shards[split], folder) for split, folder in conversion.folders.items()
    }
    return shard_files.start_dataset(conversion.output, dataclasses.asdict(conversion.settings) | contents)


def jobs(conversion: Conversion) -> list[Job]:
    """One job for each shard."""
    return [
        Job(
            conversion.output,
            conversion.spec,
            split,
            index,
            len(of_split),
            dataclasses.replace(conversion.folders[split], annotations=(), ranges=()),  # thousands, in `shard` already
            tuple(shard),
            conversion.settings.image_size,
        )
        for split, of_split in conversion.shards.items()
        for index, shard in enumerate(of_split)
    ]


def write(job: Job) -> Shard:
    """Writes a shard unless it is there already, or reads all its frames and says which are refused."""
    episodes = (calvin_episodes.read_episode(job.folder, planned, job.image_size) for planned in job.episodes)
    try:
        lengths = shard_files.write_shard(job.output, job.spec, job.split, job.index, job.num_shards, episodes)
    except ValueError:
        frames = (frame for planned in job.episodes for frame in range(planned.first, planned.last + 1))
        faults = npz_folder.refused_frames(job.folder.path, frames)
        if not faults:  # the error is not about a frame
            raise
        return Shard(job.split, job.index, (), tuple(faults))
    return Shard(job.split, job.index, tuple(lengths), ())


def finish(conversion: Conversion, written: Iterable[Shard]) -> None:
    """Makes the shards a dataset once all are written.

    Raises:
      RefusedFiles: shards are missing because frames were refused; all of them, sorted.
    """
    lengths: dict[str, list] = {split: [None] * len(of_split) for split, of_split in conversion.shards.items()}
    faults: list[str] = []
    for shard in written:
        lengths[shard.split][shard.index] = shard.lengths
        faults += shard.faults
    if faults:
        raise RefusedFiles(sorted(faults))
    source = conversion.folders["train"].path.parent.name
    shard_files.finish_dataset(
        conversion.output, conversion.spec, lengths, f"CALVIN play data, converted from {source}."
    )


def complete(conversion: Conversion) -> str:
    """Writes what stands beside a finished dataset, unless it is there, and returns a line for each split."""
    report(conversion.output, ())
    statistics.write(conversion.output)
    return "\n".join(_summary(conversion, split) for split in conversion.shards)


def report(output: Path, faults: Sequence[str]) -> None:
    """Lists refused files beside the shards; without any, removes an earlier list."""
    path = output / REPORT_FILE
    if not faults:
        path.unlink(missing_ok=True)
        return
    output.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{REPORT_FILE}.tmp")
    temporary.write_text("".join(f"{fault}\n" for fault in faults))
    os.replace(temporary, path)


def reported(output: Path) -> list[str]:
    """The lines of `report`; none where no file was refused."""
    path = output / REPORT_FILE
    return path.read_text().splitlines() if path.exists() else []


def _digest(shards: list[list[PlannedEpisode]], folder: Folder) -> str:
    """A fingerprint of what goes into the shards of a split."""
    return hashlib.sha256(repr((shards, folder.scenes)).encode()).hexdigest()


def _summary(conversion: Conversion, split: str) -> str:
    folder, shards = conversion.folders[split], conversion.shards[split]
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
