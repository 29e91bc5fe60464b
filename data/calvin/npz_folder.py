"""Reads and checks one folder of CALVIN: training/ or validation/, with one npz file for each frame of 1/30 s.

Every problem is one line that names the file, what was found, what was expected and how to mend it; RefusedFiles is
the error that carries them all.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.calvin import pickled_npy

# What is converted, of each file: shape and kind of dtype. The vectors are float64 in the published files and float32
# in their description; both are taken. Depth and tactile images are left out: no model here uses them.
FRAME_ARRAYS = {
    "actions": ((7,), np.floating),
    "rel_actions": ((7,), np.floating),
    "robot_obs": ((15,), np.floating),
    "scene_obs": ((24,), np.floating),
    "rgb_static": ((200, 200, 3), np.uint8),
    "rgb_gripper": ((84, 84, 3), np.uint8),
}
SPLIT_FOLDERS = {"train": "training", "validation": "validation"}
LANGUAGE_FOLDER = "lang_annotations"
_MEND = "download or extract it again"


class RefusedFiles(ValueError):
    """Files that cannot be converted."""

    def __init__(self, faults: Sequence[str]):
        """Takes one line for each file."""
        super().__init__(faults)
        self.faults = tuple(faults)

    def __str__(self) -> str:
        others = len(self.faults) - 1
        return self.faults[0] + (f" ({others} more refused)" if others else "")


@dataclasses.dataclass(frozen=True)
class LanguageAnnotation:
    """A span of frames with the instruction that the robot follows in it, in the dataset's frame numbers."""

    start: int  # first frame
    end: int  # one past the last frame, as the annotator wrote it
    task: str
    instruction: str


@dataclasses.dataclass(frozen=True)
class Folder:
    """What there is in a folder, apart from the frames themselves."""

    path: Path
    ranges: tuple[tuple[int, int], ...]  # first and last frame of each stretch of play, both inclusive
    annotations: tuple[LanguageAnnotation, ...]  # sorted by start
    scenes: tuple[tuple[str, int, int], ...]  # name, first and last frame

    def scene_of(self, frame: int) -> str:
        """The scene a frame was recorded in; "calvin" where the dataset does not say."""
        return next((name for name, first, last in self.scenes if first <= frame <= last), "calvin")


def frame_path(folder: Path, frame: int) -> Path:
    """Where the file of a frame lies."""
    return folder / f"episode_{frame:07d}.npz"


def read_folder(path: Path, language_folder: str = LANGUAGE_FOLDER) -> tuple[Folder, list[str]]:
    """Reads what describes a folder and looks for the file of every frame it speaks of.

    Args:
      path: of training/ or validation/.
      language_folder: the folder in it that holds the language annotations.

    Returns:
      the folder, and a line for each file that is missing or not what it should be; without such, it is whole.
    """
    if not path.is_dir():
        fault = f"{path}: no such folder; --input must hold the folders training and validation"
        return Folder(path, (), (), ()), [fault]
    faults: list[str] = []
    ranges = _attempt(faults, _read_ranges, path / "ep_start_end_ids.npy")
    annotations = _attempt(faults, _read_annotations, path, language_folder)
    scenes = _attempt(faults, _read_scenes, path, ranges)
    faults += _missing_frames(path, ranges)
    return Folder(path, ranges, annotations, scenes), faults


def refused_frames(path: Path, frames: Iterable[int]) -> list[str]:
    """Reads frames of a folder and returns a line for each that cannot be converted."""
    faults: list[str] = []
    for frame in frames:
        _attempt(faults, read_frame, frame_path(path, frame))
    return faults


def _attempt(faults: list[str], read: Callable, *arguments: Any) -> Any:
    """What `read` returns; where it fails, the fault is noted and there is nothing."""
    try:
        return read(*arguments)
    except ValueError as error:
        faults.append(str(error))
        return ()


def read_frame(path: Path) -> dict[str, np.ndarray]:
    """Reads and checks the arrays of one frame.

    Args:
      path: of the npz file.

    Returns:
      the arrays of FRAME_ARRAYS by name, unchanged.

    Raises:
      ValueError: the file is missing, cannot be read, lacks an array, or one has the wrong shape, dtype or values.
    """
    try:
        # Not np.load, which takes other formats than an archive, too.
        with open(path, "rb") as archive, np.lib.npyio.NpzFile(archive) as file:
            present = sorted(file)
            arrays = {key: file[key] for key in FRAME_ARRAYS if key in present}
    except FileNotFoundError as error:
        raise ValueError(_missing(path)) from error
    except Exception as error:  # a damaged archive raises nearly anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: cannot be read as npz ({reason}); {_MEND}") from error
    missing = [key for key in FRAME_ARRAYS if key not in arrays]
    if missing:
        raise ValueError(f"{path}: has no array {missing[0]!r}, only {present}; {_MEND}")
    for key, array in arrays.items():
        _check_array(path, key, array)
    return arrays


def _check_array(path: Path, key: str, array: np.ndarray) -> None:
    shape, kind = FRAME_ARRAYS[key]
    if array.shape != shape:
        raise ValueError(f"{path}: {key} has shape {array.shape}, expected {shape}; {_MEND}")
    if not np.issubdtype(array.dtype, kind):
        expected = "uint8" if kind is np.uint8 else "float64 or float32"
        raise ValueError(f"{path}: {key} is {array.dtype}, expected {expected}; {_MEND}")
    if kind is np.floating and not np.isfinite(array).all():
        index = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{path}: {key}[{index}] is {array[index]}, expected a finite number; {_MEND}")


def _read_ranges(path: Path) -> tuple[tuple[int, int], ...]:
    if not path.exists():
        raise ValueError(f"{path}: missing; it says where each stretch of play begins and ends; {_MEND}")
    array = pickled_npy.load(path)
    if array.ndim != 2 or array.shape[1] != 2 or len(array) == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{path}: is {array.dtype} {array.shape}, expected integers (ranges >= 1, 2); {_MEND}")
    ranges = tuple(sorted((int(first), int(last)) for first, last in array))
    for first, last in ranges:
        if first > last:
            raise ValueError(f"{path}: a range runs from {first} to {last}, expected first <= last; {_MEND}")
    for (_, last), (first, _) in zip(ranges, ranges[1:], strict=False):
        if first <= last:
            raise ValueError(f"{path}: a range begins at {first}, inside the one that ends at {last}; {_MEND}")
    return ranges


def _missing_frames(path: Path, ranges: Sequence[tuple[int, int]]) -> list[str]:
    names = set(os.listdir(path))
    frames = (frame_path(path, frame) for first, last in ranges for frame in range(first, last + 1))
    return [_missing(frame) for frame in frames if frame.name not in names]


def _missing(path: Path) -> str:
    return f"{path}: missing; expected a file for every frame that ep_start_end_ids.npy speaks of; {_MEND}"


def _read_annotations(folder: Path, language_folder: str) -> tuple[LanguageAnnotation, ...]:
    path = folder / language_folder / "auto_lang_ann.npy"
    if not path.exists():
        others = sorted(other.parent.name for other in folder.glob("*/auto_lang_ann.npy"))
        if others or language_folder != LANGUAGE_FOLDER:
            raise ValueError(f"{path}: missing; --language_folder can be one of {', '.join(others) or 'none'}")
        return ()  # a folder of bare play; the summary of the conversion says "0 annotations"
    array = pickled_npy.load(path)
    try:
        content = array.item()
        spans = content["info"]["indx"]
        tasks, sentences = content["language"]["task"], content["language"]["ann"]
        rows = zip(spans, tasks, sentences, strict=True)
        annotations = [LanguageAnnotation(int(a), int(b), str(task), str(text)) for (a, b), task, text in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: {type(error).__name__} {error}; expected a dict with language.ann, language.task and info.indx "
            f"(start, end) of equal length; {_MEND}"
        ) from error
    for annotation in annotations:
        if annotation.start >= annotation.end:
            raise ValueError(f"{path}: an annotation runs from {annotation.start} to {annotation.end}, expected more "
                             f"than 0 frames; {_MEND}")  # fmt: skip
    once = dict.fromkeys(annotations)  # the validation folders of ABC_D and ABCD_D repeat theirs, to have more of them
    return tuple(sorted(once, key=lambda annotation: annotation.start))


def _read_scenes(folder: Path, ranges: Sequence[tuple[int, int]]) -> tuple[tuple[str, int, int], ...]:
    # D_D and ABCD_D have this file in training/ only, for the frames of both folders. So has ABC_D, but there the
    # validation frames, which are scene D's, have numbers that training gives to other scenes (as listed by
    # https://github.com/denizyuret/calvin-scripts); ranges that overlap show it, and the scene stays unnamed.
    training = folder.parent / "training"
    path = folder / "scene_info.npy"
    if not path.exists():
        path = training / "scene_info.npy"
        if not path.exists() or _overlap(ranges, _read_ranges(training / "ep_start_end_ids.npy")):
            return ()
    array = pickled_npy.load(path)
    try:
        return tuple((str(name), int(first), int(last)) for name, (first, last) in array.item().items())
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; expected a dict from scene to (first, last) frame; {_MEND}") from error


def _overlap(ranges: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> bool:
    return any(first <= end and begin <= last for first, last in ranges for begin, end in others)
