"""Reads and checks one folder of CALVIN: training/ or validation/, with one npz file for each frame of 1/30 s.

Every problem is a ValueError of one line that names the file, what was found, what was expected and how to mend it.
"""

import dataclasses
import os
import zipfile
import zlib
from pathlib import Path

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
_MEND = "download or extract it again"


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


def read_folder(path: Path) -> Folder:
    """Reads what describes a folder and checks that every frame it speaks of has its file.

    Args:
      path: of training/ or validation/.

    Raises:
      ValueError: a file is missing or not what it should be.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; --input must hold the folders training and validation")
    ranges = _read_ranges(path / "ep_start_end_ids.npy")
    _check_frames_exist(path, ranges)
    return Folder(path, ranges, _read_annotations(path), _read_scenes(path))


def read_frame(path: Path) -> dict[str, np.ndarray]:
    """Reads and checks the arrays of one frame.

    Args:
      path: of the npz file.

    Returns:
      the arrays of FRAME_ARRAYS by name, unchanged.

    Raises:
      ValueError: the file cannot be read, lacks an array, or one has the wrong shape, dtype or values.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # first of all: np.load would take other formats, too
            present = {name.removesuffix(".npy") for name in archive.namelist()}
        missing = [key for key in FRAME_ARRAYS if key not in present]
        if missing:
            raise ValueError(f"{path}: has no array {missing[0]!r}, only {', '.join(sorted(present))}; {_MEND}")
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: _read_array(path, file, key) for key in FRAME_ARRAYS}
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read as npz ({' '.join(str(error).split())}); {_MEND}") from error
    for key, array in arrays.items():
        _check_array(path, key, array)
    return arrays


def _read_array(path: Path, file: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    try:
        return file[key]
    except ValueError as error:  # an object array, which only unpickling could read
        raise ValueError(f"{path}: {key} cannot be read ({error}); {_MEND}") from error


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


def _check_frames_exist(path: Path, ranges: tuple[tuple[int, int], ...]) -> None:
    names = set(os.listdir(path))
    for first, last in ranges:
        gaps = [frame for frame in range(first, last + 1) if frame_path(path, frame).name not in names]
        if gaps:
            raise ValueError(
                f"{frame_path(path, gaps[0])}: missing ({len(gaps)} files in all of the range {first} to {last} in "
                f"ep_start_end_ids.npy); expected one for every frame; {_MEND}"
            )


def _read_annotations(folder: Path) -> tuple[LanguageAnnotation, ...]:
    path = folder / "lang_annotations" / "auto_lang_ann.npy"
    if not path.exists():  # a folder of bare play; the summary of the conversion says "0 annotations"
        return ()
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
    return tuple(sorted(annotations, key=lambda annotation: annotation.start))


def _read_scenes(folder: Path) -> tuple[tuple[str, int, int], ...]:
    # The published sets have this file in training/ only, for the frames of both folders.
    candidates = [folder / "scene_info.npy", folder.parent / "training" / "scene_info.npy"]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        return ()
    array = pickled_npy.load(path)
    try:
        return tuple((str(name), int(first), int(last)) for name, (first, last) in array.item().items())
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; expected a dict from scene to (first, last) frame; {_MEND}") from error
