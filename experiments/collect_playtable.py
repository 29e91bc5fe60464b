"""Collects Playtable's datasets: play chained from noisy experts, and demonstrations of the tasks.

python -m experiments.collect_playtable --config=experiments/configs/quickstart.py --workdir=runs/quickstart
"""

from collections.abc import Iterator

import jax
import numpy as np
from tqdm import tqdm

from experiments import launch
from wam_jax import rlds, shards, specs
from wam_jax.environments.playtable import play as playtable
from wam_jax.types import StepBatch

EPISODES_PER_SHARD = 16  # also how many are simulated side by side


def run(config, workdir: str) -> None:
    """Collects what is missing; a finished dataset is left alone."""
    play_directory = launch.play_directory(config, workdir)
    demonstration_directory = launch.demonstration_directory(config, workdir)
    if not config.dataset.play:
        collect_play(play_directory, config)
    if not config.dataset.demonstrations:
        collect_demonstrations(demonstration_directory, config)


def collect_play(directory: str, config) -> None:
    """Writes the splits "train" and "validation" of play."""
    settings = config.dataset
    counts = {"train": settings.play_episodes, "validation": settings.validation_episodes}
    if shards.start_dataset(directory, launch.play_plan(config)):
        return
    spec = rlds.DatasetSpec(launch.dataset_name(config, "play"), (specs.IMAGE_SIZE,) * 2, (specs.IMAGE_SIZE,) * 2)
    parts = [(split, first) for split, count in counts.items() for first in range(0, count, EPISODES_PER_SHARD)]
    lengths: dict[str, list] = {split: [] for split in counts}
    for split, first in tqdm(parts, desc="collecting play", unit="shard"):
        num_shards = -(-counts[split] // EPISODES_PER_SHARD)
        size = min(EPISODES_PER_SHARD, counts[split] - first)
        rng = _rng(config.seed, f"play/{split}", first)
        episodes = _play_episodes(rng, size, settings, f"{split}-{first}")
        index = first // EPISODES_PER_SHARD
        lengths[split].append(shards.write_shard(directory, spec, split, index, num_shards, episodes))
    shards.finish_dataset(directory, spec, lengths, "Playtable: play chained from noisy experts.")


def _play_episodes(rng, size: int, settings, name: str) -> Iterator[rlds.Episode]:
    batch = playtable.collect_play(
        rng, EPISODES_PER_SHARD, settings.play_steps, disturbed_share=settings.disturbed_share
    )
    for row in range(size):
        yield rlds.Episode(_row(batch, row), source="playtable", episode_id=f"play-{name}-{row}")


def collect_demonstrations(directory: str, config) -> None:
    """Writes one shard of successful demonstrations for each of the config's tasks."""
    count, tasks = config.dataset.demonstrations_per_task, list(config.tasks)
    plan = {"kind": "demonstrations", "seed": config.seed, "per_task": count, "tasks": tasks}
    if shards.start_dataset(directory, plan, may_hold_more=("tasks",)):
        return
    spec = rlds.DatasetSpec(
        launch.dataset_name(config, "demonstrations"), (specs.IMAGE_SIZE,) * 2, (specs.IMAGE_SIZE,) * 2
    )
    lengths = []
    for index, task in enumerate(tqdm(tasks, desc="collecting demonstrations", unit="task")):
        episodes = _demonstrations(config.seed, task, count)
        lengths.append(shards.write_shard(directory, spec, "train", index, len(tasks), episodes))
    shards.finish_dataset(directory, spec, {"train": lengths}, "Playtable: successful demonstrations.")


def _demonstrations(seed: int, task: str, count: int) -> Iterator[rlds.Episode]:
    """Yields `count` demonstrations that the oracle calls successful, each cut at its last step."""
    found, attempt = 0, 0
    while found < count:
        rng = _rng(seed, f"demonstrations/{task}", attempt)
        batch = playtable.collect_demonstrations(rng, specs.task_index(task), 4 * EPISODES_PER_SHARD)
        attempt += 1
        for row in range(4 * EPISODES_PER_SHARD):
            steps = _until_last(_row(batch, row))
            if found < count and steps.reward.max() > 0:
                yield rlds.Episode(steps, source="playtable", episode_id=f"{task}-{found}")
                found += 1


def _until_last(steps: StepBatch) -> StepBatch:
    """Cuts the padding behind the step that is marked last."""
    end = int(np.argmax(steps.is_last)) + 1
    return jax.tree.map(lambda x: x[:end], steps)


def _row(batch: StepBatch, row: int) -> StepBatch:
    return jax.tree.map(lambda x: np.asarray(x[row]), batch)


def _rng(seed: int, name: str, index: int) -> jax.Array:
    """A key of its own for every shard, so that a rerun collects the same."""
    words = np.frombuffer(name.encode(), np.uint8)
    return jax.random.key(np.random.SeedSequence([seed, index, *words]).generate_state(1)[0])


if __name__ == "__main__":
    launch.main(run)
