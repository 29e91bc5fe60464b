"""Collects datasets in CALVIN's simulator: play chained from noisy experts, and demonstrations of the tasks.

python -m experiments.collect_calvin --config=experiments/configs/calvin_d_scripted.py --calvin_assets=calvin_env/data \
    --workdir=runs/calvin_scripted

Writes WORKDIR/data/calvin_play and calvin_demonstrations, sizes by config.dataset. A process simulates one episode at a
time; each is kept when it is finished, so that the same command goes on after an interruption and loses the running
ones alone. collection.json in each dataset says what the simulator was, what it cost and how often the experts
succeeded.
"""

import contextlib
import dataclasses
import functools
import os
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from data.calvin import npz_folder
from experiments import launch, simulators
from wam_jax import cores, datasets, images, json_files, metrics, rlds, shards, specs
from wam_jax.environments.calvin import play as calvin
from wam_jax.environments.calvin import scene
from wam_jax.environments.calvin.play import Track
from wam_jax.environments.calvin.pool import Pool
from wam_jax.environments.calvin.worker import Settings
from wam_jax.types import Observation, StepBatch

_ACTIONS = flags.DEFINE_enum(
    "calvin_actions", "reached", ("reached", "commanded"),
    "What `action` holds: the way to the pose reached a step later, as in CALVIN's own data, or what was commanded",
)  # fmt: skip

PLAY_EPISODES_PER_SHARD, DEMONSTRATIONS_PER_SHARD = 4, 10
_MAX_TRIES = 20  # per demonstration; experts need 1.1
NOTES_FILE, SIMULATOR_FILE = "collection.json", "simulator.json"
_SOURCE = "calvin_scene_D"


@dataclasses.dataclass(frozen=True)
class Recorder:
    """How episodes are recorded, and what is written of them."""

    assets: str
    num_workers: int = 0  # 0: one for each core
    python: str = ""
    pictures: str = "drawn"  # one of base.PICTURES
    actions: str = "reached"

    @property
    def sizes(self) -> tuple[int, int]:
        """Pixels of the static and the gripper camera, as they are drawn."""
        return scene.picture_sizes(specs.IMAGE_SIZE if self.pictures == "drawn" else 0)

    def dataset_spec(self, name: str) -> rlds.DatasetSpec:
        """The fields are those of converted CALVIN data."""
        static, gripper = self.sizes if self.pictures == "full" else (specs.IMAGE_SIZE,) * 2
        return rlds.DatasetSpec(name, (static,) * 2, (gripper,) * 2, (("action_absolute", specs.ACTION_DIM),))

    def pools(self, episodes: int) -> list[Pool]:
        """Workers, each in a pool of its own; no more than there are episodes to record.

        Raises:
          ValueError: their number is negative, or the simulator cannot run here.
        """
        if self.num_workers < 0:
            raise ValueError(f"--calvin_workers={self.num_workers}; expected 1 or more, or 0 for one on each core")
        settings = Settings(self.assets, "D", *self.sizes)
        count = min(self.num_workers or cores.count(), episodes)
        with futures.ThreadPoolExecutor(max(1, count)) as executor:  # each takes seconds to start
            return list(executor.map(lambda _: Pool(settings, 1, self.python), range(count)))

    def episode(self, track: Track, episode_id: str, first_frame: int = 0) -> rlds.Episode:
        """An episode as it is written."""
        absolute, reached = calvin.reached_actions(track.robot_obs)
        annotations = [rlds.Annotation(a.start, a.end, a.task, specs.INSTRUCTIONS[a.task]) for a in track.attempts]
        task, reward = rlds.tasks_and_rewards(annotations, track.scene_obs[:-1])
        position = np.arange(len(track.actions))
        static, gripper = (track.rgb_static, track.rgb_gripper)
        if self.pictures == "averaged":
            static, gripper = (np.stack([*map(images.resize, seen)]) for seen in (static, gripper))
        steps = StepBatch(
            Observation(static, gripper, track.robot_obs[:-1], track.scene_obs[:-1]),
            action=reached if self.actions == "reached" else track.actions,
            is_first=position == 0,
            is_last=position == len(position) - 1,
            task=task,
            reward=reward,
        )
        return rlds.Episode(
            steps, _SOURCE, episode_id, first_frame, annotations=annotations, extra={"action_absolute": absolute}
        )


@dataclasses.dataclass(frozen=True)
class Shard:
    """Episodes that are written together, recorded when they are asked for."""

    split: str
    index: int
    num_shards: int
    episodes: Sequence[Callable[[Pool], rlds.Episode]]  # each records one

    def path(self, directory: str, spec: rlds.DatasetSpec) -> Path:
        """Its file."""
        return shards.shard_path(directory, spec.name, self.split, self.index, self.num_shards)


def run(config, workdir: str) -> None:
    """Collects what is missing; a finished dataset is left alone.

    Raises:
      ValueError: the config is not CALVIN's, or the simulator cannot run here.
    """
    if config.environment != "calvin":
        raise ValueError(
            f"config.environment={config.environment!r}; expected 'calvin': "
            "--config=experiments/configs/calvin_d_scripted.py"
        )
    recorder = Recorder(**simulators.calvin_options(), pictures=config.dataset.pictures, actions=_ACTIONS.value)
    for key, collect in (("play", collect_play), ("demonstrations", collect_demonstrations)):
        if not config.dataset[key]:
            collect(launch.collected_directory(config, workdir, key), config, recorder)


def collect_play(directory: str, config, recorder: Recorder) -> None:
    """Writes the splits "train" and "validation" of play; its frames are numbered as CALVIN numbers them."""
    steps, firsts, planned = config.dataset.play_steps, {"train": 0}, []
    counts = {"train": config.dataset.play_episodes, "validation": config.dataset.validation_episodes}
    firsts["validation"] = counts["train"] * steps

    def record(split: str, episode: int, pool: Pool) -> rlds.Episode:
        folder = npz_folder.SPLIT_FOLDERS[split]
        words = _seed(config.seed, f"play/{split}", episode)
        track = calvin.record_play(pool, steps, words, disturbed_share=config.dataset.disturbed_share)
        first = firsts[split] + episode * steps
        return recorder.episode(track, f"{folder}_{first:07d}_{first + steps - 1:07d}", first)

    for split, count in counts.items():
        episodes = [functools.partial(record, split, episode) for episode in range(count)]
        planned += _shards(split, _parts(episodes, PLAY_EPISODES_PER_SHARD))
    name, description = launch.dataset_name(config, "play"), "CALVIN, scene D: play chained from noisy experts."
    _collect(directory, name, launch.play_plan(config), planned, recorder, description)


def collect_demonstrations(directory: str, config, recorder: Recorder) -> None:
    """Writes successful demonstrations of each of the config's tasks."""
    count, tasks = config.dataset.demonstrations_per_task, list(config.tasks)

    def record(task: str, number: int, pool: Pool) -> rlds.Episode:
        return recorder.episode(_demonstration(pool, config.seed, task, number), f"{task}-{number}")

    episodes = {task: [functools.partial(record, task, number) for number in range(count)] for task in tasks}
    parts = [part for of_task in episodes.values() for part in _parts(of_task, DEMONSTRATIONS_PER_SHARD)]
    plan = {"kind": "demonstrations", "seed": config.seed, "per_task": count, "tasks": tasks}
    name = launch.dataset_name(config, "demonstrations")
    description = "CALVIN, scene D: successful demonstrations by experts."
    _collect(directory, name, plan, _shards("train", parts), recorder, description)


def _demonstration(pool: Pool, seed: int, task: str, number: int) -> Track:
    """The first of some tries that succeeds."""
    for attempt in range(_MAX_TRIES):
        words = _seed(seed, f"demonstrations/{task}", number, attempt)
        track = calvin.record_demonstration(pool, task, specs.MAX_EPISODE_STEPS, words)
        if track:
            return track
    raise RuntimeError(f"the expert of {task} failed {_MAX_TRIES} times in a row")


def _collect(
    directory: str, name: str, plan: Mapping, planned: Sequence[Shard], recorder: Recorder, description: str
) -> None:
    """Records the episodes that are missing, several at once, and writes the dataset."""
    plan = {**plan, "pictures": recorder.pictures, "actions": recorder.actions}
    spec, notes = recorder.dataset_spec(name), Path(directory) / NOTES_FILE
    if (Path(directory) / shards.INFO_FILE).exists():
        shards.start_dataset(directory, plan, may_hold_more=("tasks",))  # compares the plans
        if not notes.exists():  # killed after its last shard
            _write_notes(directory, recorder)
        return
    before, wall, frames = _cpu_seconds(), time.monotonic(), 0
    missing = [
        functools.partial(_write_part, path, number, spec, episode)
        for path, shard in ((shard.path(directory, spec), shard) for shard in planned)
        for number, episode in enumerate(shard.episodes)
        if not path.exists() and not shards.part_path(path, number).exists()
    ]
    pools = recorder.pools(len(missing))
    shards.start_dataset(directory, plan)
    if pools:
        _note_simulator(directory, pools[0].facts)
    with tqdm(total=len(missing), desc=f"collecting {name}", unit="episode", disable=None) as bar:
        for recorded in _record_all(missing, pools):
            frames += recorded
            bar.update()
    writing, simulating = (now - then for now, then in zip(_cpu_seconds(), before, strict=True))
    wall = time.monotonic() - wall
    lengths: dict[str, list] = {shard.split: [[]] * shard.num_shards for shard in planned}
    for shard in planned:
        lengths[shard.split][shard.index] = shards.join_parts(shard.path(directory, spec), spec, len(shard.episodes))
    shards.finish_dataset(directory, spec, lengths, description)
    this_run = {  # the last; episodes of an interrupted one are not counted
        "workers": len(pools),
        "frames": frames,
        "wall_seconds": round(wall, 1),
        "cpu_seconds": {"simulators": round(simulating, 2), "writer": round(writing, 2)},
        "frames_per_cpu_second": round(frames / (simulating + writing), 2),
    }
    _write_notes(directory, recorder, this_run=this_run)


def _note_simulator(directory: str, facts: Mapping[str, str]) -> None:
    """Keeps a dataset to one simulator.

    Raises:
      ValueError: the run before had another.
    """
    path = Path(directory) / SIMULATOR_FILE
    if path.exists() and (before := json_files.read(path, "delete that file alone: it is written anew")) != facts:
        changed = [f"{key} {before.get(key)}, now {facts.get(key)}" for key in facts if before.get(key) != facts[key]]
        raise ValueError(
            f"{directory} was begun with another simulator ({'; '.join(changed)}): its states and pictures may differ; "
            "go on with the first, or delete the folder"
        )
    json_files.write(path, dict(facts))


def _write_notes(directory: str, recorder: Recorder, **more: Mapping) -> None:
    """Writes what is known of a finished dataset."""
    splits = [
        split for split in ("train", "validation") if split in datasets.open_builder(directory, "train").info.splits
    ]
    lengths = {split: datasets.episode_lengths(directory, split) for split in splits}
    simulator = json_files.read(Path(directory) / SIMULATOR_FILE, f"delete {directory} and collect again")
    json_files.write(
        Path(directory) / NOTES_FILE,
        {
            "date": time.strftime("%Y-%m-%d"),
            "machine": metrics.machine(),
            "simulator": simulator,
            "pictures": recorder.pictures,
            "drawn_pixels": recorder.sizes,
            "episodes": {split: len(of_split) for split, of_split in lengths.items()},
            "frames": {split: sum(of_split) for split, of_split in lengths.items()},
            "attempts": {split: datasets.count_attempts(directory, split) for split in splits},
            **more,
        },
    )


def _write_part(
    shard: Path, number: int, spec: rlds.DatasetSpec, episode: Callable[[Pool], rlds.Episode], pool: Pool
) -> int:
    """Records one episode; returns its frames."""
    return shards.write_part(shard, number, spec, episode(pool))


def _record_all(missing: Sequence[Callable[[Pool], int]], pools: Sequence[Pool]) -> Iterator[int]:
    """Records episodes; yields the frames of each as it is there; ends the pools."""
    free: queue.SimpleQueue[Pool] = queue.SimpleQueue()
    for pool in pools:
        free.put(pool)

    def record(episode: Callable[[Pool], int]) -> int:
        pool = free.get()
        try:
            return episode(pool)
        finally:
            free.put(pool)

    # Threads suffice: they wait for the workers, and PNGs are encoded outside the interpreter's lock.
    with futures.ThreadPoolExecutor(max(1, len(pools))) as executor, contextlib.ExitStack() as at_the_end:
        for pool in pools:
            at_the_end.callback(pool.close)  # a thread whose pool is closed ends with an error
        jobs = [executor.submit(record, episode) for episode in missing]
        at_the_end.callback(executor.shutdown, wait=False, cancel_futures=True)
        for job in futures.as_completed(jobs):
            yield job.result()


def _parts(items: Sequence, size: int) -> list[Sequence]:
    """Consecutive ones, `size` of them each; the last may be fewer."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def _shards(split: str, parts: Sequence[Sequence]) -> list[Shard]:
    return [Shard(split, index, len(parts), part) for index, part in enumerate(parts)]


def _seed(seed: int, name: str, *numbers: int) -> tuple[int, ...]:
    """Of one episode: it does not depend on the shard or the worker."""
    return seed, *numbers, *name.encode()


def _cpu_seconds() -> tuple[float, float]:
    """Of this process, and of its children that have ended."""
    times = os.times()
    return times.user + times.system, times.children_user + times.children_system


if __name__ == "__main__":
    launch.main(run)
