"""The format of datasets: RLDS episodes that TFDS loads without any code of ours.

    builder = tfds.builder_from_directory(directory)
    for episode in builder.as_data_source("train"):
        for step in episode["steps"]: ...

One record is one episode; `shards.py` writes them. Nothing here needs TensorFlow: images go in as PNG bytes (given
arrays, TFDS would encode them with TensorFlow).
"""

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence

import cv2
import jax
import numpy as np
import tensorflow_datasets as tfds

from wam_jax import specs
from wam_jax.types import StepBatch


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


def to_example(episode: Episode) -> dict:
    """What `features` encodes: steps and metadata."""
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
