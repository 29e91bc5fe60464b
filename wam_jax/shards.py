"""The shards of a dataset as files: how they are called, and whether they still are what was written.

Checksums stand in a file that `sha256sum --check SHA256SUMS` reads as well.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wam_jax import cores, json_files

INFO_FILE = "dataset_info.json"  # of TFDS; written last, so a directory that has it is complete
CHECKSUMS_FILE = "SHA256SUMS"


def shard_path(directory: str | Path, name: str, split: str, index: int, num_shards: int) -> Path:
    """Where TFDS looks for shard `index` of `num_shards`."""
    return Path(directory) / f"{name}-{split}.array_record-{index:05d}-of-{num_shards:05d}"


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


def compare_checksums(directory: str | Path, paths: Sequence[Path]) -> list[str]:
    """Compares files of a directory with their checksums.

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
        raise ValueError(
            f"{path}: no checksums to read ({type(error).__name__}); delete {INFO_FILE} there and run the "
            "command that wrote the dataset again: it keeps the shards and writes their checksums"
        ) from error
    found = [file for file in paths if file.exists()]
    digests = {file.name: digest for file, digest in zip(found, _digests(found), strict=True)}
    mend = f"delete it and {INFO_FILE}, and run the command that wrote the dataset again: it writes this shard anew"
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
