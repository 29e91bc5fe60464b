"""Environments behind one interface; `make(name)` builds one."""

from wam_jax.environments.interface import Environment

ENVIRONMENTS = ("playtable", "calvin")  # calvin: recorded data only, so far; there is no simulator of it here yet


def make(name: str) -> Environment:
    """Builds an environment by name.

    Raises:
      ValueError: there is no environment of that name, or none that can be stepped.
    """
    if name == "playtable":
        from wam_jax.environments.playtable.environment import Playtable  # imports JAX code only when it is asked for

        return Playtable()
    if name == "calvin":
        raise ValueError("environment 'calvin' has recorded data but no simulator yet; evaluate on 'playtable'")
    raise ValueError(f"unknown environment {name!r}; expected one of {', '.join(ENVIRONMENTS)}")
