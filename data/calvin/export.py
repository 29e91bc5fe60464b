"""Writes a dataset of this project in CALVIN's own layout, one npz file a frame: the way back from `convert`.

    python -m data.calvin.export --input=runs/calvin_full/data/calvin_play --output=calvin_scripted

The dataset must have CALVIN's sizes of pictures (`collect_calvin --config.dataset.pictures=full`, or
`convert --image_size=0`). An episode becomes a range of frames; frames are numbered through both folders. Files that
are there are kept, so the same command goes on after an interruption.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from data.calvin import npz_folder
from wam_jax import cli, datasets, json_files, shards

_SOURCE_FILE = "exported_from.json"
_EMBEDDING_SHAPE = (1, 384)  # of a sentence in the original's files


def export(directory: Path, output: Path) -> None:
    """Writes training/ and, where the dataset has that split, validation/.

    Args:
      directory: of the dataset.
      output: gets the two folders.

    Raises:
      ValueError: no complete dataset there, or one that lacks what CALVIN's files hold.
    """
    builder = datasets.open_builder(directory, "train")
    _check(directory, builder)
    _claim(output, directory)
    first, scenes = 0, dict[str, list[int]]()
    for split, name in npz_folder.SPLIT_FOLDERS.items():
        if split not in builder.info.splits:
            continue
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        lengths = datasets.episode_lengths(directory, split)
        firsts = [first + sum(lengths[:i]) for i in range(len(lengths))]
        _write_frames(folder, builder.as_data_source(split), firsts, lengths)
        episodes = datasets.Episodes(builder, split)
        for index, (begin, length) in enumerate(zip(firsts, lengths, strict=True)):
            source = episodes.metadata(index)["source"].decode()
            low, high = scenes.get(source, (begin, begin))
            scenes[source] = [min(low, begin), max(high, begin + length - 1)]
        _save(folder / "ep_start_end_ids.npy", np.array([[a, a + n - 1] for a, n in zip(firsts, lengths, strict=True)]))
        _save(folder / "ep_lens.npy", np.array(lengths))
        for language, solved_only in (("lang_annotations", False), ("lang_solved", True)):
            annotations = list(_annotations(episodes, firsts, solved_only))
            _save(folder / language / "auto_lang_ann.npy", np.array(_language(annotations), dtype=object))
        first += sum(lengths)
    _save(output / npz_folder.SPLIT_FOLDERS["train"] / "scene_info.npy", np.array(scenes, dtype=object))


def _check(directory: Path, builder: Any) -> None:
    step = builder.info.features["steps"].feature
    for key in ("rgb_static", "rgb_gripper"):
        found, expected = step["observation"][key].shape, npz_folder.FRAME_ARRAYS[key][0]
        if found != expected:
            raise ValueError(
                f"{directory}: {key} is {found}, CALVIN's files hold {expected}; collect with "
                "--config.dataset.pictures=full"
            )
    if "action_absolute" not in step:
        raise ValueError(f"{directory} has no action_absolute; give a dataset of CALVIN, collected or converted")


def _claim(output: Path, directory: Path) -> None:
    """Notes which dataset the folder is for; frames of two would look alike."""
    path = output / _SOURCE_FILE
    new = {"checksums": (directory / shards.CHECKSUMS_FILE).read_text().splitlines()}
    if path.exists() and json_files.read(path, f"delete {output} and export again") != new:
        raise ValueError(f"{output} holds the frames of another dataset than {directory}; choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    json_files.write(path, new)


def _write_frames(folder: Path, source: Sequence[dict], firsts: Sequence[int], lengths: Sequence[int]) -> None:
    with ThreadPoolExecutor(datasets.num_threads()) as pool:  # compression is outside the interpreter's lock
        rows = tqdm(zip(firsts, lengths, strict=True), folder.name, len(lengths), unit="episode", disable=None)
        for index, (first, length) in enumerate(rows):
            paths = [npz_folder.frame_path(folder, first + t) for t in range(length)]
            missing = [t for t, path in enumerate(paths) if not path.exists()]
            if missing:
                steps = list(source[index]["steps"])
                list(pool.map(_write_frame, [paths[t] for t in missing], [steps[t] for t in missing]))


def _write_frame(path: Path, step: dict) -> None:
    arrays = {"actions": step["action_absolute"], "rel_actions": step["action"], **step["observation"]}
    _replace(path, lambda file: np.savez_compressed(file, **arrays))


def _annotations(
    episodes: datasets.Episodes, firsts: Sequence[int], solved_only: bool
) -> Iterator[tuple[tuple[int, int], str, str]]:
    """(first frame, one past the last), task and sentence of all annotations, or of those that the oracle confirms."""
    for index, first in enumerate(firsts):
        spans = episodes.metadata(index)["annotations"]
        reward = episodes.steps(index)["reward"]
        for start, end, task, text in zip(*(spans[k] for k in ("start", "end", "task", "instruction")), strict=True):
            if not solved_only or np.max(reward[start:end]) > 0:
                yield (first + int(start), first + int(end)), task.decode(), text.decode()


def _language(annotations: Sequence[tuple[tuple[int, int], str, str]]) -> dict:
    """The content of auto_lang_ann.npy; embeddings of the sentences are zeros."""
    spans, tasks, sentences = (list(column) for column in zip(*annotations, strict=True)) if annotations else ([],) * 3
    embeddings = np.zeros((len(annotations), *_EMBEDDING_SHAPE), np.float32)
    return {
        "language": {"ann": sentences, "task": tasks, "emb": embeddings},
        "info": {"episodes": [], "indx": spans},
    }


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda file: np.save(file, array, allow_pickle=True))


def _replace(path: Path, write: Callable[[Any], None]) -> None:
    """Writes a file under a temporary name, and renames it."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        write(file)
    os.replace(temporary, path)


def main(argv: Sequence[str]) -> None:
    """Exports what the flags say."""
    del argv
    export(Path(_INPUT.value), Path(_OUTPUT.value))


if __name__ == "__main__":
    _INPUT = flags.DEFINE_string("input", None, "The dataset's folder.", required=True)
    _OUTPUT = flags.DEFINE_string(
        "output", None, "Folder for training/ and validation/; made if missing.", required=True
    )
    cli.run(main)
