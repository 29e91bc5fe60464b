"""Environments behind one interface; `make(name)` builds one."""

from wam_jax.environments.interface import Environment

ENVIRONMENTS = ("playtable",)


def make(name: str) -> Environment:
    """Builds an environment by name.

    Raises:
      ValueError: there is no environment of that name.
    """
    if name == "playtable":
        from wam_jax.environments.playtable.environment import Playtable  # imports JAX code only when it is asked for

        return Playtable()
    raise ValueError(f"unknown environment {name!r}; expected one of {', '.join(ENVIRONMENTS)}")
