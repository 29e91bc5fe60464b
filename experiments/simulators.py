"""The environment that a config names, built with what the command line says about its simulator."""

import functools
from collections.abc import Sequence
from typing import Any

from absl import flags

from wam_jax import environments, specs
from wam_jax.environments.interface import Environment

_CALVIN_FLAGS = ("calvin_assets", "starts", "calvin_workers", "calvin_python", "calvin_actions")  # of some binaries
flags.DEFINE_string("calvin_assets", "", "Folder of CALVIN's assets: calvin_env's data/, or one laid out like it")
flags.DEFINE_integer("calvin_workers", 0, "CALVIN: processes that simulate; 0: one for each core")
flags.DEFINE_string("calvin_python", "", "CALVIN: Python that has pybullet; empty: the one that runs this")


@functools.lru_cache(maxsize=1)
def make(config, pictures: bool = True, random_starts: bool = False) -> Environment:
    """Builds the config's environment, or returns the one that was built last.

    Args:
      config: the whole one.
      pictures: False: nobody looks, and nothing is drawn where that costs time.
      random_starts: True: not those of --starts, which are for evaluation.

    Raises:
      ValueError: it cannot run here, and why.
    """
    if config.environment != "calvin":
        given = [f"--{name}" for name in _CALVIN_FLAGS if name in flags.FLAGS and flags.FLAGS[name].present]
        if given:
            raise ValueError(f"{', '.join(given)}: for CALVIN only, and config.environment={config.environment!r}")
        return environments.make(config.environment)
    return environments.make(
        "calvin",
        **calvin_options(),
        starts_file="" if random_starts else _flag("starts"),
        image_size=specs.IMAGE_SIZE if config.dataset.pictures == "drawn" else 0,
        pictures=pictures,
    )


def check(config) -> None:
    """Checks, before hours of work, that the environment can run here and has a start for every episode.

    Raises:
      ValueError: what it lacks.
    """
    environment = make(config)
    check_starts(environment, config.tasks, config.evaluation.num_episodes)
    if hasattr(environment, "close"):
        environment.close()  # its processes would wait for hours
    make.cache_clear()


def calvin_options() -> dict[str, Any]:
    """What the command line says of CALVIN's workers: assets, num_workers, python."""
    return {"assets": _flag("calvin_assets"), "num_workers": _flag("calvin_workers"), "python": _flag("calvin_python")}


def describe(environment: Environment, without: Sequence[str] = ()) -> str:
    """What decides the last bits of a simulator's states and pictures; empty where only this repository does.

    Args:
      environment: any.
      without: facts that made no difference: "pixels" for who does not look, "starts" where they come from elsewhere.
    """
    facts = getattr(environment, "facts", {})
    return ", ".join(f"{key} {value}" for key, value in facts.items() if key not in without)


def check_starts(environment: Environment, tasks: Sequence[str], count: int) -> None:
    """Checks that there is a start for each episode, where starts are given.

    Raises:
      ValueError: there are fewer for a task, and how many.
    """
    for task in tasks if hasattr(environment, "check_starts") else ():
        environment.check_starts(task, count)


def _flag(name: str):
    return flags.FLAGS[name].value if name in flags.FLAGS else ""
