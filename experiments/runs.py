"""Runs as tables read them: config, rows and episodes of a workdir, and which runs differ in their seed alone."""

import collections
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import config_values
from wam_jax import tables

PLACES = ("imagination", "environment")  # where PPO's rollouts happen, config.ppo.rollouts
_LOCATIONS = ("dataset.play", "dataset.demonstrations")  # where data lie; what they hold no config says
_NEEDED = (
    *("environment", "method", "seed", "dataset.demonstrations", "dataset.demonstrations_per_task"),
    *("world_model.num_steps", "ppo.num_iterations", "ppo.num_rollouts", "policy.chunk"),
    *("evaluation.seed", "evaluation.max_steps"),
)
_TEXTS = ("environment", "method", "dataset.demonstrations")  # of them; the others are whole numbers
_AT_LEAST_ONE = ("ppo.num_iterations", "ppo.num_rollouts", "policy.chunk", "evaluation.max_steps")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a table needs of a workdir, or of a folder of docs/results with its config.json and table.json."""

    name: str  # of the folder
    config: dict[str, Any]  # as config.json has it
    rows: tuple[tables.Row, ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one config that differ in their seed alone, by seed."""

    title: str
    apart: tuple[Any, ...]  # their values of the keys that tell groups apart
    runs: tuple[Run, ...]

    @property
    def config(self) -> dict[str, Any]:
        """Of the first run."""
        return self.runs[0].config

    @property
    def seeds(self) -> list[int]:
        """Of all runs."""
        return [run.config["seed"] for run in self.runs]


def load(workdir: str) -> Run:
    """Reads a run.

    Raises:
      ValueError: config.json or table.json is missing, damaged, or not of the other, or a row stands twice.
    """
    rows = tables.load(os.path.join(workdir, "table.json"))
    if not rows:
        raise ValueError(f"{workdir}/table.json has no rows; run experiments.evaluate with this --workdir first")
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise ValueError(f"no {path}; every run writes one: copy it beside its table.json")
    config = config_values.read(path, "take the run's own")
    known = config_values.flat(config)
    missing = [key for key in _NEEDED if key not in known]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; take the run's own config.json")
    for key in (*_NEEDED, *({"ppo.max_steps"} & known.keys())):
        least = 1 if key in _AT_LEAST_ONE else 0
        if key not in _TEXTS and (type(known[key]) is not int or known[key] < least):
            raise ValueError(
                f"{path} has {key}={known[key]!r}, expected a whole number from {least}; take the run's own config.json"
            )
    for row in rows:
        mine = (config["environment"], row.method if row.method == "-" else config["method"], config["seed"])
        if (row.environment, row.method, row.seed) != mine:
            raise ValueError(
                f"{workdir}/table.json has a row of {row.environment}, {row.method}, seed {row.seed}, its config.json "
                f"says {config['environment']}, {config['method']}, seed {config['seed']}; they are of different runs"
            )
    counts = collections.Counter((row.task, row.stage) for row in rows)
    for task, stage in (key for key, count in counts.items() if count > 1):
        raise ValueError(f"{workdir}/table.json has {task} at stage {stage} twice; remove it and evaluate again")
    return Run(workdir, config, tuple(rows))


def check_distinct(workdirs: Sequence[str]) -> None:
    """Checks that no run is named twice, however it is spelled.

    Raises:
      ValueError: one is.
    """
    paths = [os.path.realpath(workdir) for workdir in workdirs]
    for workdir, path in zip(workdirs, paths, strict=True):
        if paths.count(path) > 1:
            raise ValueError(f"{workdir} is named twice; name it once")


def value(config: dict[str, Any], key: str) -> Any:
    """A config's value by its full name; the one of base.py where the config is older.

    Raises:
      ValueError: there is no such value.
    """
    known = config_values.defaults(config["method"]) | config_values.flat(config)
    if key not in known:
        raise ValueError(f"no config has {key!r}; name values as --config does, e.g. ppo.rollouts")
    return known[key]


def gather(runs: Sequence[Run], apart: Sequence[str] = ()) -> list[Group]:
    """Gathers runs of one environment and method; a group's runs may differ in their seed alone.

    Args:
      runs: at least one.
      apart: names of config values that tell groups apart as well.

    Raises:
      ValueError: two runs of a group are of one seed, or differ in anything but the seed.
    """
    gathered: dict[tuple, list[Run]] = {}
    for run in runs:
        values = tuple(tuple(x) if isinstance(x, list) else x for x in (value(run.config, key) for key in apart))
        gathered.setdefault((run.config["environment"], run.config["method"], *values), []).append(run)
    varying = [i for i in range(len(apart)) if len({key[2 + i] for key in gathered}) > 1]
    groups = []
    for key, members in sorted(gathered.items(), key=lambda item: [str(part) for part in item[0]]):
        for other in members[1:]:
            _check_alike(members[0], other)
        title = ", ".join([f"{key[0]}: {key[1]}", *(f"{apart[i]}={key[2 + i]}" for i in varying)])
        members.sort(key=lambda run: run.config["seed"])
        for one, other in zip(members, members[1:], strict=False):
            if one.config["seed"] == other.config["seed"]:
                raise ValueError(
                    f"{one.name} and {other.name} are both {title}, seed {one.config['seed']}: their episodes would "
                    "count twice; name one of them"
                )
        groups.append(Group(title, key[2:], tuple(members)))
    return groups


def _check_alike(first: Run, other: Run) -> None:
    changed = config_values.differing(first.config, other.config)
    changed = {key: values for key, values in changed.items() if key not in ("seed", *_LOCATIONS)}
    if changed:
        key, (one, another) = next(iter(changed.items()))
        more = f" and {len(changed) - 1} more" if changed.keys() - {key} else ""
        raise ValueError(
            f"{first.name} has config.{key}={one!r}, {other.name} has {another!r}{more}: runs of one column may differ "
            f"in their seed alone; leave one out, or tell columns apart with --apart={key}"
        )


def config_notes(groups: Sequence[Group]) -> list[str]:
    """Which config values tell groups apart, and whose seeds were given other datasets."""
    notes = []
    for first, other in zip(groups, groups[1:], strict=False):
        changed = config_values.differing(first.config, other.config)
        names = [key for key in changed if key not in ("seed", "method", "world_model.action_weight", *_LOCATIONS)]
        if first.config["environment"] == other.config["environment"] and names:
            notes.append(f"The configs of {first.title} and {other.title} also differ in {', '.join(names)}.")
    for group in groups:
        for key in _LOCATIONS:
            places = sorted({value(run.config, key) or "its own" for run in group.runs})
            if places[1:]:
                notes.append(f"Seeds of {group.title} had different {key}: {', '.join(places)}.")
    return notes


def interactions(config: dict[str, Any]) -> dict[str, int]:
    """Steps of PPO's rollouts for one task, by where they happen: at most, since a rollout that succeeds ends early.

    iterations x rollouts x decisions x steps of a chunk; a run without `ppo.rollouts` is older and imagined.

    Raises:
      ValueError: an unknown place.
    """
    place = value(config, "ppo.rollouts")
    if place not in PLACES:
        raise ValueError(f"config.ppo.rollouts={place!r}; expected one of {', '.join(PLACES)}")
    chunk = config["policy"]["chunk"]
    decisions = (value(config, "ppo.max_steps") or config["evaluation"]["max_steps"]) // chunk
    steps = config["ppo"]["num_iterations"] * config["ppo"]["num_rollouts"] * decisions * chunk
    return {name: steps if name == place else 0 for name in PLACES}


def stages(group: Group) -> list[str]:
    """The trained stages of which some run has rows, in the order of printing."""
    return [s for s in tables.STAGES[1:] if any(row.stage == s for run in group.runs for row in run.rows)]


def stage_rows(group: Group, stage: str) -> tuple[tables.Row, ...]:
    """A stage's rows of all seeds.

    Raises:
      ValueError: a run lacks a task that another one has.
    """
    found = {run.name: [row for row in run.rows if row.stage == stage] for run in group.runs}
    tasks = sorted({row.task for rows in found.values() for row in rows})
    for name, rows in found.items():
        missing = [task for task in tasks if task not in {row.task for row in rows}]
        if missing:
            raise ValueError(
                f"{name}/table.json has no row of {missing[0]} at stage {stage}; run "
                f"experiments.evaluate --policy={stage} with this --workdir"
            )
    return tuple(row for rows in found.values() for row in rows)


def has_episodes(group: Group, stage: str) -> bool:
    """Whether every run of a group keeps the success of a stage's single episodes."""
    return all(os.path.exists(_episodes_path(run, stage)) for run in group.runs)


def outcomes(group: Group, stage: str) -> dict[str, np.ndarray]:
    """Success of every episode of a stage.

    Returns:
      for each task bool [S, N], of seed and number of the start.

    Raises:
      ValueError: episodes are missing, stand twice, do not add up to the row, or are not of the same starts.
    """
    tasks = list(dict.fromkeys(row.task for row in stage_rows(group, stage)))
    found = [_episodes(run, stage) for run in group.runs]
    for task in tasks:
        if len({len(numbers[task]) for numbers in found}) > 1:
            counts = [f"{len(numbers[task])} (seed {s})" for numbers, s in zip(found, group.seeds, strict=True)]
            raise ValueError(
                f"{group.title}, {task}: {', '.join(counts)} episodes; evaluate all seeds with one "
                "config.evaluation.num_episodes"
            )
    return {task: np.stack([numbers[task] for numbers in found]) for task in tasks}


def _episodes_path(run: Run, stage: str) -> str:
    return os.path.join(run.name, "evaluation", f"{stage}.episodes.json")


def _episodes(run: Run, stage: str) -> dict[str, np.ndarray]:
    path = _episodes_path(run, stage)
    if not os.path.exists(path):
        raise ValueError(
            f"no {path}: differences are paired by start and need the success of each episode, and {run.name} holds "
            f"rows alone; run experiments.evaluate --policy={stage} with this --workdir, or copy the file there"
        )
    known: dict[tuple[str, int], bool] = {}
    for episode in tables.load_episodes(path):
        if (episode.task, episode.number) in known:
            raise ValueError(f"{path} has episode {episode.number} of {episode.task} twice; evaluate again")
        known[episode.task, episode.number] = episode.success
    result = {}
    for row in (row for row in run.rows if row.stage == stage):
        missing = [number for number in range(row.episodes) if (row.task, number) not in known]
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} of {row.episodes} episodes of {row.task}, the first is number "
                f"{missing[0]}; evaluate again"
            )
        success = np.array([known[row.task, number] for number in range(row.episodes)])
        if success.sum() != row.successes:
            raise ValueError(
                f"{path} has {success.sum()} successes of {row.task}, table.json has {row.successes}; evaluate again"
            )
        result[row.task] = success
    return result


def check_starts(first: Group, second: Group, stages_: Sequence[str]) -> None:
    """Checks that episodes of one number begin alike and end by the same rule in two groups.

    Raises:
      ValueError: what tells them apart.
    """
    for name in ("environment", "evaluation.seed", "evaluation.max_steps"):
        one, other = (value(group.config, name) for group in (first, second))
        if one != other:
            raise ValueError(
                f"{first.title} has config.{name}={one!r}, {second.title} has {other!r}: their episodes of one number "
                "do not begin and end alike, so they cannot be paired; evaluate both with one value"
            )
    both = (*first.runs, *second.runs)
    simulators = sorted({row.simulator for run in both for row in run.rows if row.stage in stages_})
    if simulators[1:]:
        raise ValueError(
            f"{first.title} and {second.title} were evaluated in different simulators ({' / '.join(simulators)}); "
            "evaluate both in one"
        )
