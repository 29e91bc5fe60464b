"""Environments behind one interface (`interface.Environment`); `make(name)` builds one. Imports no JAX before that."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wam_jax.environments.interface import Environment

ENVIRONMENTS = ("playtable", "calvin")


def make(name: str, **options: Any) -> "Environment":
    """Builds an environment by name.

    Args:
      name: one of ENVIRONMENTS.
      options: of `calvin`: see `calvin.environment.Calvin`; `playtable` has none.

    Raises:
      ValueError: there is no environment of that name, or it cannot run here.
    """
    if name == "playtable":
        from wam_jax.environments.playtable.environment import Playtable

        return Playtable(**options)
    if name == "calvin":
        from wam_jax.environments.calvin.environment import Calvin

        return Calvin(**options)
    raise ValueError(f"unknown environment {name!r}; expected one of {', '.join(ENVIRONMENTS)}")
