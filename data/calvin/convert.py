"""Converts a CALVIN download (training/ and validation/ with one npz file a frame) to RLDS shards.

    python -m data.calvin.convert --input=task_D_D --output=shards/calvin_d --workers=8

A process writes a shard at a time. A killed conversion goes on where it stopped when the same command is run again:
finished shards are kept, the others written. Every file is checked. A missing file, or a damaged one of those that
describe the frames, ends the run before work starts. A damaged frame costs its shard only: the others are written, so
that a rerun with the mended file has little left to do. All refused files are listed in refused_files.txt.

`--check` reads every file, writes that list and nothing else. `--verify` compares the finished shards with their
checksums and decodes every step.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from data.calvin import conversion, npz_folder, pool
from data.calvin.conversion import DEFAULT_SETTINGS, Conversion, Settings, Shard
from data.calvin.npz_folder import RefusedFiles
from wam_jax import cli, cores, datasets, specs

_FRAMES_PER_CHECK = 1000

_INPUT = flags.DEFINE_string("input", None, "Folder that holds training/ and validation/.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the shards; made if missing.", required=True)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", specs.IMAGE_SIZE, "Pixels of both cameras; 0 keeps 200 and 84.")
_WORKERS = flags.DEFINE_integer("workers", cores.count(), "Processes, each writing one shard at a time.", 1)
_FRAMES_PER_SHARD = flags.DEFINE_integer("frames_per_shard", 5000, "A shard is full with this many frames.")
_MAX_EPISODE_STEPS = flags.DEFINE_integer("max_episode_steps", 500, "Longer stretches of play are cut.")
_LANGUAGE_FOLDER = flags.DEFINE_string("language_folder", npz_folder.LANGUAGE_FOLDER, "Holds auto_lang_ann.npy.")
_CHECK = flags.DEFINE_bool("check", False, "Read every file, list those a conversion would refuse, convert nothing.")
_VERIFY = flags.DEFINE_bool("verify", False, "Then compare all shards with their checksums and decode every step.")


def convert(input_folder: Path, output: Path, settings: Settings = DEFAULT_SETTINGS, workers: int = 1) -> str:
    """Converts both folders of a download.

    Args:
      input_folder: holds training/ and validation/.
      output: directory of the dataset.
      settings: what the shards are to hold.
      workers: processes.

    Returns:
      a line for each split: how much was converted.

    Raises:
      RefusedFiles: files are not as expected; all of them, also listed in refused_files.txt of the output.
      ValueError: the output holds another dataset.
    """
    try:
        planned = conversion.plan(Path(input_folder), Path(output), settings)
        if not conversion.start(planned):
            conversion.finish(planned, _write(planned, workers))
    except RefusedFiles as error:
        conversion.report(Path(output), error.faults)
        raise
    return conversion.complete(planned)


def check(input_folder: Path, language_folder: str = npz_folder.LANGUAGE_FOLDER, workers: int = 1) -> list[str]:
    """Reads every file of a download and returns a line for each that a conversion would refuse."""
    folders, faults = conversion.read_folders(Path(input_folder), language_folder)
    parts = [
        (folder.path, range(start, min(start + _FRAMES_PER_CHECK, last + 1)))
        for folder in folders.values()
        for first, last in folder.ranges
        for start in range(first, last + 1, _FRAMES_PER_CHECK)
    ]
    with tqdm(total=sum(len(frames) for _, frames in parts), desc="checking", unit="frame", disable=None) as bar:
        for (_, frames), refused in pool.run(_refused, parts, workers):
            faults += refused
            bar.update(len(frames))
    return sorted(set(faults))  # a missing frame is found twice


def _refused(part: tuple[Path, range]) -> list[str]:
    return npz_folder.refused_frames(*part)


def _write(planned: Conversion, workers: int) -> Iterator[Shard]:
    jobs = conversion.jobs(planned)
    with tqdm(total=sum(job.frames for job in jobs), desc="converting", unit="frame", disable=None) as bar:
        for job, shard in pool.run(conversion.write, jobs, workers):
            yield shard
            bar.update(job.frames)


def main(argv: Sequence[str]) -> None:
    """Checks, or converts and verifies, what the flags say."""
    del argv
    pool.use_cpu()
    output = Path(_OUTPUT.value)
    try:
        if _CHECK.value:
            faults = check(Path(_INPUT.value), _LANGUAGE_FOLDER.value, _WORKERS.value)
            conversion.report(output, faults)
            if faults:
                raise RefusedFiles(faults)
            print("no file is refused")
            return
        settings = Settings(
            _IMAGE_SIZE.value, _FRAMES_PER_SHARD.value, _MAX_EPISODE_STEPS.value, _LANGUAGE_FOLDER.value
        )
        print(convert(Path(_INPUT.value), output, settings, _WORKERS.value))
        if _VERIFY.value:
            if faults := datasets.verify(output):
                sys.exit("\n".join(f"error: {fault}" for fault in faults))
            print("verified: every checksum is right and every step can be decoded")
    except RefusedFiles as error:
        sys.exit(f"error: {error}; all {len(error.faults)} in {output / conversion.REPORT_FILE}")


if __name__ == "__main__":
    cli.run(main)
