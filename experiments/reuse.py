"""Takes over from another run what a config would make just the same, for runs that differ in one thing."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence

from experiments import config_values, launch
from wam_jax import json_files, metrics, shards

_ENSEMBLE = (  # what its members are trained by
    *("num_members", "hidden_dims", "num_windows", "window_length", "batch_size", "learning_rate", "weight_decay"),
    "num_steps",
)
# What each part of a workdir depends on: other parts, and keys or sections of the config.
_PARTS = {
    "play": ("environment", "seed", "dataset.play", "dataset.play_episodes", "dataset.validation_episodes")
    + ("dataset.play_steps", "dataset.disturbed_share", "dataset.pictures"),
    "demonstrations": ("environment", "seed", "dataset.demonstrations", "dataset.demonstrations_per_task")
    + ("dataset.pictures",),
    "world_model": ("play", "method", "world_model."),
    "prior_ensemble": ("world_model", *(f"prior_ensemble.{key}" for key in _ENSEMBLE)),
    "policy": ("world_model", "demonstrations", "policy."),
    "reward": ("prior_ensemble", "prior_ensemble.imagine", "demonstrations", "policy.soft_feature") + ("reward.",),
    "ppo": ("policy", "reward", "ppo.", "evaluation.max_steps"),
    "evaluation": ("policy", "reward", "evaluation.", "ppo.resample_latent"),  # of the cloned policies
}


def take_over(config, workdir: str, source: str) -> list[str]:
    """Copies, as hard links where the file system has them, the parts of another run that this config would repeat.

    A part is taken over where all that it depends on has the same value in both configs, and the workdir has none yet;
    of what is per task, that of this config's tasks.
    `reused.json` says afterwards what came from where.

    Args:
      config: of this run.
      workdir: of this run.
      source: workdir of the other one.

    Returns:
      the folders and files that were taken over.

    Raises:
      ValueError: there is no run in `source`, or it is this one.
    """
    path = os.path.join(source, "config.json")
    if not os.path.exists(path):
        raise ValueError(f"--reuse={source} holds no run (there is no {path}); name the workdir of one")
    if os.path.realpath(source) == os.path.realpath(workdir):
        raise ValueError(f"--reuse={source} is this run's own workdir; name another run's")
    there = config_values.read(path, "name the workdir of another run")
    different = config_values.differing(there, json.loads(config.to_json_best_effort()))
    taken = [
        name
        for part in _PARTS
        if not any(_depends(part, key) for key in different)
        for name in _names(part, config, source)
        if not os.path.exists(os.path.join(workdir, name))
    ]
    for name in taken:
        _copy(os.path.join(source, name), os.path.join(workdir, name), config.tasks)
    if taken:
        _take_metrics(source, workdir, taken)
        note = os.path.join(workdir, "reused.json")
        before = json_files.read(note, "delete it") if os.path.exists(note) else {}
        json_files.write(note, {**before, **dict.fromkeys(taken, source)})
    return taken


def _depends(part: str, key: str) -> bool:
    return any(
        _depends(other, key) if other in _PARTS else key == other or (other.endswith(".") and key.startswith(other))
        for other in _PARTS[part]
    )


def _names(part: str, config, source: str) -> Iterator[str]:
    """The folders and files of a part that the other run has, relative to its workdir."""
    if part == "demonstrations" and not _demonstrates(config, source):
        return iter(())
    names = {
        "play": [f"data/{config.environment}_play"],
        "demonstrations": [f"data/{config.environment}_demonstrations"],
        "world_model": ["world_model"],
        "prior_ensemble": ["prior_ensemble"],
        "policy": [f"policy/{task}" for task in config.tasks],
        "reward": [*(f"reward/{task}" for task in config.tasks), "reward/quality.json", "reward/disagreement.json"],
        "ppo": [*(f"ppo/{task}" for task in config.tasks), "ppo/trust.json"],
        "evaluation": ["evaluation/bc.json", "evaluation/bc.episodes.json"],
    }[part]
    paths = {name: os.path.join(source, name) for name in names}
    there = {name: path for name, path in paths.items() if os.path.exists(path)}
    return (name for name, path in there.items() if os.path.isdir(path) or _of_tasks(path, config.tasks))


def _demonstrates(config, source: str) -> bool:
    """Whether the other run collected demonstrations of this config's tasks; a finished dataset may hold more."""
    directory = launch.collected_directory(config, source, "demonstrations")
    held = shards.read_plan(directory).get("tasks")
    if held is None:
        return False
    if os.path.exists(os.path.join(directory, shards.INFO_FILE)):
        return {*config.tasks} <= {*held}
    return list(config.tasks) == held


def _copy(source: str, target: str, tasks: Sequence[str]) -> None:
    """Under a temporary name first, so that a run that is cut off here takes nothing by halves."""
    temporary = f"{target}.reused.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(source):
        unfinished = shutil.ignore_patterns("*.orbax-checkpoint-tmp*", "*.tmp")
        shutil.copytree(source, temporary, copy_function=_link, ignore=unfinished)
    else:
        json_files.write(temporary, _of_tasks(source, tasks))
    os.rename(temporary, target)


def _of_tasks(path: str, tasks: Sequence[str]) -> list | dict:
    """What a file with rows or episodes, or with an entry for each task, says of some tasks."""
    found = json_files.read(path, "delete it; the command that wrote it writes it again")
    if isinstance(found, dict):
        return {task: value for task, value in found.items() if task in tasks}
    return [row for row in found if row["task"] in tasks]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _take_metrics(source: str, workdir: str, taken: list[str]) -> None:
    for stage in taken:
        for row in metrics.read(source, stage):
            with open(os.path.join(workdir, "metrics.jsonl"), "a") as file:
                file.write(json.dumps(row) + "\n")
