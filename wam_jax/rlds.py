"""The one writer of datasets: RLDS episodes in ArrayRecord shards that TFDS loads without any code of ours.

    builder = tfds.builder_from_directory(directory)
    for episode in builder.as_data_source("train"):
        for step in episode["steps"]: ...

One record is one episode. Every shard is written under a temporary name and renamed when complete, so a killed run
leaves only whole shards; a rerun keeps those and writes the missing ones. The metadata comes last: a directory with
`dataset_info.json` is a complete dataset.

Nothing here needs TensorFlow: images go in as PNG bytes (given arrays, TFDS would encode them with TensorFlow).
"""

import dataclasses
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import jax
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from wam_jax import json_files, shards, specs
from wam_jax.shards import INFO_FILE, shard_path
from wam_jax.types import StepBatch

PLAN_FILE = "plan.json"  # what the shards of a directory are made from, so that a rerun cannot mix two datasets
PARTS_FOLDER = "parts"  # of episodes that wait for the rest of their shard
EPISODE_LENGTHS = "episode_lengths"  # key of metadata.json: {split: [steps of each episode]}, for the input pipeline

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Annotation:
    """A stretch of an episode in which the robot carries out one instruction."""

    start: int  # first step, counted from the episode's first
    end: int  # one past the last step
    task: str  # any name; those of specs.TASKS are the ones the models know
    instruction: str


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode as it is written: T consecutive steps and what is known about them.

    A step's task and sentence come from the last annotation that covers it; without one, from `steps.task` and
    specs.INSTRUCTIONS; they are empty where `steps.task` is -1. So data whose tasks are all in specs.TASKS need no
    annotations.
    """

    steps: StepBatch  # numpy, [T, ...] without a batch axis; images uint8 [T, h, w, 3] of any size
    source: str  # the environment or dataset the steps come from
    episode_id: str = ""
    first_frame: int = 0  # number of the first step in its source
    is_terminal: bool = False  # whether the last step ends the task for good (discount 0); else it was merely cut there
    annotations: Sequence[Annotation] = ()
    extra: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # more step fields, float64 [T, n]


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """What is fixed for a whole dataset: its name, its image sizes and its extra step fields."""

    name: str
    static_size: tuple[int, int]  # height and width of rgb_static, pixels
    gripper_size: tuple[int, int]  # the same of rgb_gripper
    extra: tuple[tuple[str, int], ...] = ()  # name and length of each extra step field

    def __post_init__(self):
        if not (self.name.isidentifier() and self.name == self.name.lower()):
            raise ValueError(f"dataset name {self.name!r} is not usable in TFDS; use lower-case letters, digits and _")


def features(spec: DatasetSpec) -> tfds.features.FeaturesDict:
    """The TFDS features of one episode."""

    def vector(size):
        # As bytes: the float lists of a tf.Example hold float32 only, and would silently round CALVIN's float64.
        return tfds.features.Tensor(shape=(size,), dtype=np.float64, encoding="bytes")

    def image(size):
        return tfds.features.Image(shape=(*size, 3), dtype=np.uint8, encoding_format="png")

    text = tfds.features.Text
    observation = {
        "rgb_static": image(spec.static_size),
        "rgb_gripper": image(spec.gripper_size),
        "robot_obs": vector(specs.ROBOT_OBS_DIM),
        "scene_obs": vector(specs.SCENE_OBS_DIM),
    }
    step = {
        "observation": observation,
        "action": vector(specs.ACTION_DIM),
        **{key: vector(size) for key, size in spec.extra},
        "is_first": np.bool_,
        "is_last": np.bool_,
        "is_terminal": np.bool_,
        "reward": np.float32,
        "discount": np.float32,
        "task": text(),
        "language_instruction": text(),
    }
    annotation = {"start": np.int64, "end": np.int64, "task": text(), "instruction": text()}
    episode_metadata = {
        "source": text(),
        "episode_id": text(),
        "first_frame": np.int64,
        "annotations": tfds.features.Sequence(annotation),
    }
    return tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step), "episode_metadata": episode_metadata})


def start_dataset(directory: str | Path, plan: Mapping) -> bool:
    """Creates the directory and notes what its shards will be made from.

    Args:
      directory: may exist already, with shards of an earlier run of the same plan.
      plan: JSON values that decide the shards' contents (input, image size, number of shards, ...).

    Returns:
      whether the dataset is complete: an earlier run has finished it.

    Raises:
      ValueError: the directory holds shards of another plan.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / PLAN_FILE
    new = json.loads(json.dumps(plan))
    old = json_files.read(path, f"delete {directory} and write the dataset again") if path.exists() else new
    if old != new:
        changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        raise ValueError(
            f"{directory} holds a dataset made with other settings ({', '.join(changed)} differ, see {path}); "
            "use the same settings, choose another directory, or delete this one"
        )
    if not path.exists():
        json_files.write(path, new)
    if not (directory / INFO_FILE).exists():
        return False
    shards.check_sizes(directory)
    return True


def pictures(directory: str | Path) -> str:
    """How a dataset's pictures were made, as its plan says: "drawn", "averaged" or "full"; empty where it does not."""
    path = Path(directory) / PLAN_FILE
    plan = json_files.read(path, f"delete {directory} and write the dataset again") if path.exists() else {}
    if "frames_per_shard" in plan:  # converted
        return "averaged" if plan["image_size"] else "full"
    return plan.get("pictures", "")


def write_shard(
    directory: str | Path, spec: DatasetSpec, split: str, index: int, num_shards: int, episodes: Iterable[Episode]
) -> list[int]:
    """Writes one shard, unless it is already there; may run in a process of its own.

    Args:
      directory: made by `start_dataset`.
      spec: the same for all shards.
      split: "train" or "validation".
      index: of this shard.
      num_shards: of this split.
      episodes: what goes into it; left untouched when the shard exists, so give a generator where reading is slow.

    Returns:
      the number of steps of each episode in the shard.

    Raises:
      ValueError: an episode does not fit the specification.
    """
    path = shard_path(directory, spec.name, split, index, num_shards)
    if path.exists():
        return _lengths_in_shard(path, spec)
    return _write_atomically(path, lambda temporary: _write_records(temporary, spec, episodes))


def part_path(shard: Path, number: int) -> Path:
    """Where episode `number` of a shard waits for the others, where they are slow to come."""
    return shard.parent / PARTS_FOLDER / f"{shard.name}-{number:05d}"


def write_part(shard: Path, number: int, spec: DatasetSpec, episode: Episode) -> int:
    """Writes one episode of a shard to a file of its own; returns its steps.

    Raises:
      ValueError: it does not fit the specification.
    """
    path = part_path(shard, number)
    path.parent.mkdir(exist_ok=True)
    return _write_atomically(path, lambda temporary: _write_records(temporary, spec, [episode]))[0]


def join_parts(shard: Path, spec: DatasetSpec, count: int) -> list[int]:
    """Makes a shard of its parts, unless it is already there, and removes them.

    Args:
      shard: its path.
      spec: the dataset's.
      count: how many parts it has.

    Returns:
      the number of steps of each episode.

    Raises:
      ValueError: a part cannot be read.
    """
    parts = [part_path(shard, number) for number in range(count)]
    if not shard.exists():
        lengths = [_lengths_in_shard(part, spec)[0] for part in parts]
        records = (ArrayRecordReader(str(part)).read([0])[0] for part in parts)
        _write_atomically(shard, lambda temporary: _write_bytes(temporary, records))
    else:
        lengths = _lengths_in_shard(shard, spec)
    for part in parts:
        part.unlink(missing_ok=True)
    return lengths


def finish_dataset(
    directory: str | Path,
    spec: DatasetSpec,
    lengths: Mapping[str, Sequence[Sequence[int]]],
    description: str = "",
) -> None:
    """Writes the checksums of the shards and the metadata that make them a dataset; the last step.

    Args:
      directory: holds all shards.
      spec: as given to `write_shard`.
      lengths: for each split and shard the steps of each episode, as returned by `write_shard`.
      description: shown by TFDS.

    Raises:
      ValueError: a shard is missing.
    """
    directory = Path(directory)
    paths = {
        split: [shard_path(directory, spec.name, split, i, len(of_split)) for i in range(len(of_split))]
        for split, of_split in lengths.items()
    }
    missing = [path.name for of_split in paths.values() for path in of_split if not path.exists()]
    if missing:
        raise ValueError(f"{directory}: {len(missing)} shards are missing, the first is {missing[0]}; write them first")
    for leftover in directory.glob(f"{spec.name}-*.tmp"):
        leftover.unlink()
    shutil.rmtree(directory / PARTS_FOLDER, ignore_errors=True)
    split_infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[len(of_shard) for of_shard in of_split],
            num_bytes=sum(path.stat().st_size for path in paths[split]),
        )
        for split, of_split in lengths.items()
    ]
    flat_lengths = {split: [n for of_shard in of_split for n in of_shard] for split, of_split in lengths.items()}
    shards.write_checksums(directory, [path for of_split in paths.values() for path in of_split])
    temporary = directory / "metadata.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for of_split in paths.values():
        (temporary / of_split[0].name).touch()  # TFDS learns the dataset's name and format from the names of shards
    tfds.folder_dataset.write_metadata(
        data_dir=temporary,
        features=features(spec),
        split_infos=split_infos,
        version="1.0.0",
        check_data=False,  # its check reads through TensorFlow
        description=description,
        metadata=tfds.core.MetadataDict({EPISODE_LENGTHS: flat_lengths}),
    )
    info = directory / INFO_FILE
    unfinished = info.with_name(f"{INFO_FILE}.tmp")
    for path in temporary.glob("*.json"):
        os.replace(path, unfinished if path.name == INFO_FILE else directory / path.name)
    shutil.rmtree(temporary)
    os.replace(unfinished, info)  # the very last step, so that nothing is left behind wherever the process is killed


def step_texts(episode: Episode) -> tuple[list[str], list[str]]:
    """The task name and the sentence of each step, by the rule that Episode states."""
    indices = np.asarray(episode.steps.task)
    tasks = [specs.TASKS[i] if i >= 0 else "" for i in indices]
    sentences = [specs.INSTRUCTIONS[task] if task else "" for task in tasks]
    for annotation in episode.annotations:
        span = slice(annotation.start, annotation.end)
        tasks[span] = [annotation.task] * (annotation.end - annotation.start)
        sentences[span] = [annotation.instruction] * (annotation.end - annotation.start)
    return tasks, sentences


def tasks_and_rewards(annotations: Sequence[Annotation], scene_obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The task and the reward of each step of an annotated episode, scene_obs [T, 24].

    Returns:
      int32 [T], an index into specs.TASKS, -1 where there is none; and float32 [T], 1 where CALVIN's oracle finds the
      annotated task solved since the annotation's first step. Where annotations overlap, the later one counts.
    """
    task = np.full(len(scene_obs), -1, np.int32)
    reward = np.zeros(len(scene_obs), np.float32)
    for annotation in annotations:
        steps = slice(annotation.start, annotation.end)
        task[steps], reward[steps] = -1, 0
        if annotation.task in specs.TASKS:
            task[steps] = specs.task_index(annotation.task)
            reward[steps] = specs.task_success(task[annotation.start], scene_obs[annotation.start], scene_obs[steps])
    return task, reward


def encode_png(image: np.ndarray) -> bytes:
    """Encodes an RGB image, uint8 [h, w, 3], without loss."""
    # OpenCV works in BGR. Its default compression is the fastest here: two thirds of level 1's time, 10 % larger.
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def _write_atomically(path: Path, write: Callable[[Path], T]) -> T:
    """Has a file written to a temporary name, which no other process of any machine has, and renames it."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        result = write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return result


def _write_records(path: Path, spec: DatasetSpec, episodes: Iterable[Episode]) -> list[int]:
    lengths = []
    shard_features = features(spec)
    serializer = ExampleSerializer(shard_features.get_serialized_info())

    def records() -> Iterator[bytes]:
        for episode in episodes:
            check_episode(episode, spec)
            example = serializer.get_tf_example(shard_features.encode_example(_to_example(episode)))
            lengths.append(len(episode.steps.is_first))
            yield example.SerializeToString(deterministic=True)  # the same bytes whenever it is written

    _write_bytes(path, records())
    if not lengths:
        raise ValueError(f"shard {path.name} got no episodes; expected at least one")
    return lengths


def _write_bytes(path: Path, records: Iterable[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")  # one record a group: random access reads nothing else
    try:
        for record in records:
            writer.write(record)
    finally:
        writer.close()


def _to_example(episode: Episode) -> dict:
    metadata = {
        "source": episode.source,
        "episode_id": episode.episode_id,
        "first_frame": episode.first_frame,
        "annotations": [dataclasses.asdict(annotation) for annotation in episode.annotations],
    }
    return {"steps": list(_to_steps(episode)), "episode_metadata": metadata}


def _to_steps(episode: Episode) -> Iterator[dict]:
    steps = jax.tree.map(np.asarray, episode.steps)  # once: indexing a jax.Array step by step is slow
    observation = steps.observation
    tasks, sentences = step_texts(episode)
    for t, (task, sentence) in enumerate(zip(tasks, sentences, strict=True)):
        is_terminal = episode.is_terminal and bool(steps.is_last[t])
        yield {
            "observation": {
                "rgb_static": io.BytesIO(encode_png(observation.rgb_static[t])),
                "rgb_gripper": io.BytesIO(encode_png(observation.rgb_gripper[t])),
                "robot_obs": np.asarray(observation.robot_obs[t], np.float64),
                "scene_obs": np.asarray(observation.scene_obs[t], np.float64),
            },
            "action": np.asarray(steps.action[t], np.float64),
            **{key: np.asarray(value[t], np.float64) for key, value in episode.extra.items()},
            "is_first": bool(steps.is_first[t]),
            "is_last": bool(steps.is_last[t]),
            "is_terminal": is_terminal,
            "reward": np.float32(steps.reward[t]),
            "discount": np.float32(not is_terminal),
            "task": task,
            "language_instruction": sentence,
        }


def check_episode(episode: Episode, spec: DatasetSpec) -> None:
    """Raises a ValueError where an episode's arrays do not fit the dataset or each other."""
    steps, observation = episode.steps, episode.steps.observation
    where = f"episode {episode.episode_id or episode.first_frame} of {episode.source}"
    length = len(steps.is_first)
    expected = {
        "rgb_static": (observation.rgb_static, (*spec.static_size, 3)),
        "rgb_gripper": (observation.rgb_gripper, (*spec.gripper_size, 3)),
        "robot_obs": (observation.robot_obs, (specs.ROBOT_OBS_DIM,)),
        "scene_obs": (observation.scene_obs, (specs.SCENE_OBS_DIM,)),
        "action": (steps.action, (specs.ACTION_DIM,)),
        **{key: (getattr(steps, key), ()) for key in ("is_last", "task", "reward")},
        **{key: (episode.extra.get(key, np.empty(0)), (size,)) for key, size in spec.extra},
    }
    for key, (array, shape) in expected.items():
        if np.shape(array) != (length, *shape):
            raise ValueError(f"{where}: {key} has shape {np.shape(array)}, expected {(length, *shape)}")
    if {key for key, _ in spec.extra} != set(episode.extra):
        raise ValueError(f"{where}: extra fields {sorted(episode.extra)}, the dataset has {[k for k, _ in spec.extra]}")
    ends = np.flatnonzero(steps.is_first).tolist(), np.flatnonzero(steps.is_last).tolist()
    if length == 0 or ends != ([0], [length - 1]):
        raise ValueError(f"{where}: is_first at {ends[0]} and is_last at {ends[1]}, expected [0] and [{length - 1}]")
    for annotation in episode.annotations:
        if not 0 <= annotation.start < annotation.end <= length:
            raise ValueError(f"{where}: annotation {annotation.start}:{annotation.end} is not within 0:{length}")
    for key in ("rgb_static", "rgb_gripper"):
        if expected[key][0].dtype != np.uint8:
            raise ValueError(f"{where}: {key} is {expected[key][0].dtype}, expected uint8 in 0..255")
    for key in ("action", "robot_obs", "scene_obs"):
        if not np.isfinite(expected[key][0]).all():
            raise ValueError(f"{where}: {key} has non-finite values")


def _lengths_in_shard(path: Path, spec: DatasetSpec) -> list[int]:
    """Counts the steps of a kept shard's episodes, which also proves that it can be read."""
    shard_features = features(spec)
    skip = {"steps": tfds.decode.SkipDecoding()}
    try:
        reader = ArrayRecordReader(str(path))
        if not reader.num_records():  # so a truncated file shows: not by an error
            raise EOFError("it is truncated")
        records = (reader.read([i])[0] for i in range(reader.num_records()))
        return [len(shard_features.deserialize_example_np(r, decoders=skip)["steps"]["is_first"]) for r in records]
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it and run again, it is then rewritten") from error
