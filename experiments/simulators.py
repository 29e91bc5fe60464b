"""The environment that a config names, built with what the command line says about its simulator."""

import functools
from typing import Any

from absl import flags

from wam_jax import environments
from wam_jax.environments.interface import Environment

flags.DEFINE_string("calvin_assets", "", "Folder of CALVIN's assets: calvin_env's data/, or one laid out like it")
flags.DEFINE_string("starts", "", "CALVIN: npz of start states, taken in order; empty: random ones")
flags.DEFINE_integer("calvin_workers", 0, "CALVIN: processes that simulate; 0: one for each core")
flags.DEFINE_string("calvin_python", "", "CALVIN: Python that has pybullet; empty: the one that runs this")


@functools.lru_cache(maxsize=1)
def make(name: str, rendered: str = "all") -> Environment:
    """Builds an environment, or returns the one that was built last.

    Args:
      name: one of `environments.ENVIRONMENTS`.
      rendered: whose pictures are drawn where that costs time: "all" episodes', the "first"'s, "none"'s.

    Raises:
      ValueError: it cannot run here, and why.
    """
    if name != "calvin":
        return environments.make(name)
    return environments.make(name, **calvin_options(), starts_file=_flag("starts"), rendered=rendered)


def calvin_options() -> dict[str, Any]:
    """What the command line says of CALVIN's workers: assets, num_workers, python."""
    return {"assets": _flag("calvin_assets"), "num_workers": _flag("calvin_workers"), "python": _flag("calvin_python")}


def describe(environment: Environment) -> str:
    """What decides the last bits of a simulator's states and pictures; empty where only this repository does."""
    facts = getattr(environment, "facts", {})
    starts = {"starts": _flag("starts") or "random"} if facts else {}
    return ", ".join(f"{key} {value}" for key, value in (facts | starts).items())


def _flag(name: str):
    return flags.FLAGS[name].value  # the default where no command line was read, as in tests
