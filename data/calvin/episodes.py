"""Cuts CALVIN's stretches of play into episodes, and reads one with its annotations and rewards."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from data.calvin import npz_folder
from data.calvin.npz_folder import Folder, LanguageAnnotation
from wam_jax import rlds
from wam_jax.images import resize
from wam_jax.types import Observation, StepBatch


@dataclasses.dataclass(frozen=True)
class PlannedEpisode:
    """Frames that become one episode."""

    first: int
    last: int  # inclusive
    annotations: tuple[LanguageAnnotation, ...]  # those within the frames

    def __len__(self) -> int:
        return self.last - self.first + 1


def plan_episodes(folder: Folder, max_steps: int) -> list[PlannedEpisode]:
    """Cuts each range of a folder into parts of equal length, at most about `max_steps`.

    A cut never splits an annotation: it moves back to where the annotation starts, or, where a chain of overlapping
    annotations reaches back to the part's first frame, forward to its end. Annotations outside all ranges are dropped.
    """
    episodes = []
    for first, last in folder.ranges:
        inside = [a for a in folder.annotations if first <= a.start and a.end <= last + 1]
        for start, end in _cut(first, last, inside, max_steps):
            episodes.append(
                PlannedEpisode(start, end, tuple(a for a in inside if start <= a.start and a.end <= end + 1))
            )
    return episodes


def _cut(first: int, last: int, spans: Sequence[LanguageAnnotation], max_steps: int) -> Iterator[tuple[int, int]]:
    """Yields the first and last frame of each part."""
    length = last - first + 1
    part = math.ceil(length / math.ceil(length / max_steps))
    while last - first + 1 > part:
        cut = _free_cut(first, first + part, spans)
        if cut > last:
            break
        yield first, cut - 1
        first = cut
    yield first, last


def _free_cut(first: int, cut: int, spans: Sequence[LanguageAnnotation]) -> int:
    """The frame nearest to `cut`, preferably before it, at which a part can begin."""

    def around(frame):
        return next((span for span in spans if span.start < frame < span.end), None)

    earlier = cut
    while span := around(earlier):
        earlier = span.start
    if earlier > first:
        return earlier
    while span := around(cut):
        cut = span.end
    return cut


def group_into_shards(episodes: Sequence[PlannedEpisode], frames_per_shard: int) -> list[list[PlannedEpisode]]:
    """Fills shards with consecutive episodes until each has at least `frames_per_shard` frames."""
    shards: list[list[PlannedEpisode]] = [[]]
    for episode in episodes:
        if sum(map(len, shards[-1])) >= frames_per_shard:
            shards.append([])
        shards[-1].append(episode)
    return shards


def read_episode(folder: Folder, plan: PlannedEpisode, image_size: int) -> rlds.Episode:
    """Reads the frames of an episode.

    Args:
      folder: that holds them.
      plan: which frames.
      image_size: pixels of both cameras, by averaging areas; 0 keeps 200 and 84.

    Returns:
      the episode; `rel_actions` are its action, `actions` the extra field `action_absolute`. The reward is 1 at each
      annotated step at which CALVIN's oracle finds the task solved since the annotation's first frame, for the tasks
      of specs.TASKS.

    Raises:
      ValueError: a file is not what it should be.
    """
    frames = [_read_frame(folder, number, image_size) for number in range(plan.first, plan.last + 1)]
    stacked = {key: np.stack([frame[key] for frame in frames]) for key in npz_folder.FRAME_ARRAYS}
    annotations = [
        rlds.Annotation(a.start - plan.first, a.end - plan.first, a.task, a.instruction) for a in plan.annotations
    ]
    task, reward = rlds.tasks_and_rewards(annotations, stacked["scene_obs"])
    position = np.arange(len(plan))
    steps = StepBatch(
        observation=Observation(**{key: stacked[key] for key in Observation.__dataclass_fields__}),
        action=stacked["rel_actions"],
        is_first=position == 0,
        is_last=position == len(plan) - 1,
        task=task,
        reward=reward,
    )
    return rlds.Episode(
        steps=steps,
        source=folder.scene_of(plan.first),
        episode_id=f"{folder.path.name}_{plan.first:07d}_{plan.last:07d}",
        first_frame=plan.first,
        annotations=annotations,
        extra={"action_absolute": stacked["actions"]},
    )


def _read_frame(folder: Folder, number: int, image_size: int) -> dict[str, np.ndarray]:
    frame = npz_folder.read_frame(npz_folder.frame_path(folder.path, number))
    if image_size:
        for camera in ("rgb_static", "rgb_gripper"):
            frame[camera] = resize(frame[camera], image_size)
    return frame
