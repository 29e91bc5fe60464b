r"""Converts a CALVIN download as `convert.py` does, by an Apache Beam pipeline: on a cluster, or on this machine.

    pip install -e '.[beam]'
    python -m data.calvin.convert_beam --input=task_D_D --output=shards/calvin_d -- \
        --runner=FlinkRunner --flink_master=HOST:8081 --environment_type=LOOPBACK

What follows `--` are Beam's own options. Each worker writes whole shards with the functions of `conversion.py`, so the
dataset is that of `convert.py` byte for byte, a rerun keeps what is finished, and each can go on with the other's work.
Input and output are folders that the launching machine and every worker see under the same path.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import apache_beam as beam
from absl import flags
from apache_beam.options.pipeline_options import PipelineOptions

from data.calvin import conversion, npz_folder, pool
from data.calvin.conversion import Conversion, Settings, Shard
from data.calvin.npz_folder import RefusedFiles
from wam_jax import cli, specs

_INPUT = flags.DEFINE_string("input", None, "Folder that holds training/ and validation/.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the shards; made if missing.", required=True)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", specs.IMAGE_SIZE, "Pixels of both cameras; 0 keeps 200 and 84.")
_FRAMES_PER_SHARD = flags.DEFINE_integer("frames_per_shard", 5000, "A shard is full with this many frames.")
_MAX_EPISODE_STEPS = flags.DEFINE_integer("max_episode_steps", 500, "Longer stretches of play are cut.")
_LANGUAGE_FOLDER = flags.DEFINE_string("language_folder", npz_folder.LANGUAGE_FOLDER, "Holds auto_lang_ann.npy.")


def convert(input_folder: Path, output: Path, settings: Settings, options: PipelineOptions) -> str:
    """Converts both folders of a download.

    Args:
      input_folder: holds training/ and validation/; seen by every worker.
      output: directory of the dataset; seen by every worker.
      settings: what the shards are to hold.
      options: of Beam.

    Returns:
      a line for each split: how much was converted.

    Raises:
      RefusedFiles: files are not as expected; all of them, also listed in refused_files.txt of the output.
      ValueError: the output holds another dataset.
    """
    try:
        planned = conversion.plan(input_folder, output, settings)
    except RefusedFiles as error:
        conversion.report(output, error.faults)
        raise
    if not conversion.start(planned):
        conversion.report(output, ())  # what is there after the pipeline is the pipeline's
        with beam.Pipeline(options=options) as pipeline:
            _ = (
                pipeline
                | "Shards" >> beam.Create(conversion.jobs(planned))
                | "Spread" >> beam.Reshuffle()
                | "Write" >> beam.Map(_write)
                | "Gather" >> beam.combiners.ToList()
                | "Finish" >> beam.Map(_finish, planned)
            )
        if faults := conversion.reported(output):
            raise RefusedFiles(faults)
    return conversion.complete(planned)


def _write(job: conversion.Job) -> Shard:
    pool.use_cpu()
    return conversion.write(job)


def _finish(shards: list[Shard], planned: Conversion) -> None:
    """The last step, on a worker: the metadata, or the list of refused files, on which no retry would help."""
    try:
        conversion.finish(planned, shards)
    except RefusedFiles as error:
        conversion.report(planned.output, error.faults)


def main(argv: Sequence[str]) -> None:
    """Converts what the flags say, with Beam's options after `--`."""
    pool.use_cpu()
    output = Path(_OUTPUT.value)
    try:
        settings = Settings(
            _IMAGE_SIZE.value, _FRAMES_PER_SHARD.value, _MAX_EPISODE_STEPS.value, _LANGUAGE_FOLDER.value
        )
        print(convert(Path(_INPUT.value), output, settings, PipelineOptions(list(argv))))
    except RefusedFiles as error:
        sys.exit(f"error: {error}; all {len(error.faults)} in {output / conversion.REPORT_FILE}")


if __name__ == "__main__":
    cli.run(main, takes="options of Beam")
