"""The shards of a dataset as files: the one writer, and whether they still are what was written.

Every shard is written under a temporary name and renamed when complete, so a killed run leaves only whole shards; a
rerun keeps those and writes the missing ones. The metadata comes last: a directory with `dataset_info.json` is a
complete dataset. Checksums stand in a file that `sha256sum --check SHA256SUMS` reads as well.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from wam_jax import cores, json_files, rlds

T = TypeVar("T")
PLAN_FILE = "plan.json"  # what the shards of a directory are made from, so that a rerun cannot mix two datasets
PARTS_FOLDER = "parts"  # of episodes that wait for the rest of their shard
EPISODE_LENGTHS = "episode_lengths"  # key of metadata.json: {split: [steps of each episode]}, for the input pipeline
INFO_FILE = "dataset_info.json"  # of TFDS; written last, so a directory that has it is complete
CHECKSUMS_FILE = "SHA256SUMS"


def shard_path(directory: str | Path, name: str, split: str, index: int, num_shards: int) -> Path:
    """Where TFDS looks for shard `index` of `num_shards`."""
    return Path(directory) / f"{name}-{split}.array_record-{index:05d}-of-{num_shards:05d}"


# --- Writing ---


def start_dataset(directory: str | Path, plan: Mapping, may_hold_more: Sequence[str] = ()) -> bool:
    """Creates the directory and notes what its shards will be made from.

    Args:
      directory: may exist already, with shards of an earlier run of the same plan.
      plan: JSON values that decide the shards' contents (input, image size, number of shards, ...).
      may_hold_more: names of lists in the plan; a complete dataset serves if its own hold all of that and more.

    Returns:
      whether the dataset is complete: an earlier run has finished it.

    Raises:
      ValueError: the directory holds shards of another plan.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / PLAN_FILE
    new = json.loads(json.dumps(plan))
    old = read_plan(directory) if path.exists() else new
    complete = (directory / INFO_FILE).exists()
    enough = {key for key in may_hold_more if complete and key in new and {*new[key]} <= {*old.get(key, ())}}
    changed = sorted(key for key in {*old, *new} - enough if old.get(key) != new.get(key))
    if changed:
        raise ValueError(
            f"{directory} holds a dataset made with other settings ({', '.join(changed)} differ, see {path}); "
            "use the same settings, choose another directory, or delete this one"
        )
    if not path.exists():
        json_files.write(path, new)
    if complete:
        check_sizes(directory)
    return complete


def read_plan(directory: str | Path) -> dict:
    """What a dataset's shards were made from, as `start_dataset` noted it; empty where nothing was noted.

    Raises:
      ValueError: the note is damaged.
    """
    path = Path(directory) / PLAN_FILE
    return json_files.read(path, f"delete {directory} and write the dataset again", dict) if path.exists() else {}


def pictures(directory: str | Path) -> str:
    """How a dataset's pictures were made, as its plan says: "drawn", "averaged" or "full"; empty where it does not."""
    plan = read_plan(directory)
    if "frames_per_shard" in plan:  # converted
        return "averaged" if plan["image_size"] else "full"
    return plan.get("pictures", "")


def write_shard(
    directory: str | Path,
    spec: rlds.DatasetSpec,
    split: str,
    index: int,
    num_shards: int,
    episodes: Iterable[rlds.Episode],
) -> list[int]:
    """Writes one shard, unless it is already there; may run in a process of its own.

    Args:
      directory: made by `start_dataset`.
      spec: the same for all shards of a dataset.
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


def write_part(shard: Path, number: int, spec: rlds.DatasetSpec, episode: rlds.Episode) -> int:
    """Writes one episode of a shard to a file of its own; returns its steps.

    Raises:
      ValueError: it does not fit the specification.
    """
    path = part_path(shard, number)
    path.parent.mkdir(exist_ok=True)
    return _write_atomically(path, lambda temporary: _write_records(temporary, spec, [episode]))[0]


def join_parts(shard: Path, spec: rlds.DatasetSpec, count: int) -> list[int]:
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
    spec: rlds.DatasetSpec,
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
    write_checksums(directory, [path for of_split in paths.values() for path in of_split])
    temporary = directory / "metadata.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for of_split in paths.values():
        (temporary / of_split[0].name).touch()  # TFDS learns the dataset's name and format from the names of shards
    tfds.folder_dataset.write_metadata(
        data_dir=temporary,
        features=rlds.features(spec),
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


def _write_atomically(path: Path, write: Callable[[Path], T]) -> T:
    """Has a file written to a temporary name, which no other process of any machine has, and renames it."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        result = write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return result


def _write_records(path: Path, spec: rlds.DatasetSpec, episodes: Iterable[rlds.Episode]) -> list[int]:
    lengths = []
    shard_features = rlds.features(spec)
    serializer = ExampleSerializer(shard_features.get_serialized_info())

    def records() -> Iterator[bytes]:
        for episode in episodes:
            rlds.check_episode(episode, spec)
            example = serializer.get_tf_example(shard_features.encode_example(rlds.to_example(episode)))
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
            with _named(path):
                writer.write(record)
    finally:
        with _named(path):
            writer.close()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns what ArrayRecord raises, of a full disk for instance, into an error of the system with the file's name."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written ({error}); is the disk full? Free space and run again") from error


def _lengths_in_shard(path: Path, spec: rlds.DatasetSpec) -> list[int]:
    """Counts the steps of a kept shard's episodes, which also proves that it can be read."""
    shard_features = rlds.features(spec)
    skip = {"steps": tfds.decode.SkipDecoding()}
    try:
        reader = ArrayRecordReader(str(path))
        if not reader.num_records():  # so a truncated file shows: not by an error
            raise EOFError("it is truncated")
        records = (reader.read([i])[0] for i in range(reader.num_records()))
        return [len(shard_features.deserialize_example_np(r, decoders=skip)["steps"]["is_first"]) for r in records]
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it and run again, it is then rewritten") from error


# --- Checking ---


def check_sizes(directory: str | Path) -> None:
    """Checks that a complete dataset still has all its shards, each split as large as it was written.

    Raises:
      ValueError: a file is missing or of another size, named.
    """
    for name, (paths, expected) in _written_splits(directory).items():
        for path in paths:
            if not path.exists():
                raise ValueError(
                    f"{path} is missing; delete {INFO_FILE} there, and run the command that wrote it again"
                )
        found = sum(path.stat().st_size for path in paths)
        if found != expected:
            smallest = min(paths, key=lambda path: path.stat().st_size)
            raise ValueError(
                f"{directory}: the shards of {name!r} hold {found} bytes, written were {expected} (the smallest is "
                f"{smallest.name}); one is damaged: delete the dataset and write it again"
            )


def written(directory: str | Path) -> list[Path]:
    """The shards that a complete dataset was written with, whether they are still there or not.

    Raises:
      ValueError: its metadata are missing or damaged.
    """
    return [path for paths, _ in _written_splits(directory).values() for path in paths]


def _written_splits(directory: str | Path) -> dict[str, tuple[list[Path], int]]:
    """Of each split the paths of its shards and their bytes in all, as the metadata say."""
    path = Path(directory) / INFO_FILE
    mend = "delete it, and run the command that wrote the dataset again"
    if not path.exists():
        raise ValueError(f"{path}: missing, so the dataset is not complete; run the command that writes it again")
    info = json_files.read(path, mend)
    try:
        return {
            split["name"]: (_split_paths(directory, info["name"], split), int(split["numBytes"]))
            for split in info["splits"]
        }
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged ({reason}); {mend}") from error


def _split_paths(directory: str | Path, name: str, split: Mapping) -> list[Path]:
    num_shards = len(split["shardLengths"])
    return [shard_path(directory, name, split["name"], i, num_shards) for i in range(num_shards)]


def write_checksums(directory: str | Path, paths: Sequence[Path]) -> None:
    """Writes the checksums of files of a directory, to a temporary name first."""
    path = Path(directory) / CHECKSUMS_FILE
    temporary = path.with_name(f"{CHECKSUMS_FILE}.tmp")
    temporary.write_text(
        "".join(f"{digest}  {file.name}\n" for digest, file in zip(_digests(paths), paths, strict=True))
    )
    os.replace(temporary, path)


def compare_checksums(directory: str | Path, paths: Sequence[Path], mend: str, *, no_checksums: str) -> list[str]:
    """Compares files of a directory with their checksums.

    Args:
      directory: of the checksums.
      paths: the files.
      mend: what to do about a file, for the fault.
      no_checksums: what to do where there are none, for the error.

    Returns:
      one line for each file that is missing, changed, or has no checksum.

    Raises:
      ValueError: there are no checksums, or they cannot be read.
    """
    path = Path(directory) / CHECKSUMS_FILE
    try:
        lines = path.read_text().splitlines()
        expected = {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no checksums to read ({type(error).__name__}); {no_checksums}") from error
    found = [file for file in paths if file.exists()]
    digests = {file.name: digest for file, digest in zip(found, _digests(found), strict=True)}
    faults = []
    for file in paths:
        if file.name not in digests:
            faults.append(f"{file}: missing; {mend}")
        elif file.name not in expected:
            faults.append(f"{file}: {CHECKSUMS_FILE} has no line for it; {mend}")
        elif digests[file.name] != expected[file.name]:
            faults.append(
                f"{file}: SHA-256 is {digests[file.name][:12]}..., written was {expected[file.name][:12]}...; {mend}"
            )
    return faults


def _digests(paths: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor(cores.count()) as pool:  # hashlib lets other threads run meanwhile
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
