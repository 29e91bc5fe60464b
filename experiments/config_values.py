"""The values of a config by their full names, which of them tell two runs apart, and copies with other values."""

import json
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from experiments.configs import base
from wam_jax import json_files

# What may change between two commands in one workdir. Everything else decides what its files mean: a longer training of
# the world model, say, would leave policies behind that were cloned on other latents.
FREE = (
    "num_devices",
    "evaluation.num_episodes",
    "evaluation.batch_size",
    ".tasks_at_once",
    ".updates_per_call",
    ".save_every",
    ".keep_checkpoints",
    ".cache",
    ".prediction.",  # read by evaluate_prediction alone, which notes its values
)


def read(path: str, mend: str) -> dict[str, Any]:
    """A run's config.json.

    Raises:
      ValueError: it is damaged, or no config.
    """
    found = json_files.read(path, mend, dict)
    method = found.get("method")
    if not isinstance(method, str) or method not in base.METHODS:
        raise ValueError(f"{path} is no config of a run (its method is {method!r}); {mend}")
    return found


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their full names, "world_model.num_steps"."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: value for name, child in tree.items() for key, value in flat(child, f"{prefix}{name}.").items()}


def defaults(method: str) -> dict[str, Any]:
    """Every value that base.py gives a method, by its full name, as JSON has it.

    Raises:
      ValueError: an unknown method.
    """
    return flat(json.loads(base.get_config(method).to_json_best_effort()))


def deciding(tree: Any) -> dict[str, Any]:
    """The leaves by their full names, but for those of FREE."""
    return {key: value for key, value in flat(tree).items() if not any(part in f".{key}" for part in FREE)}


def differing(first: dict, second: dict) -> dict[str, tuple[Any, Any]]:
    """Which values tell two configs apart, by name in alphabetical order; None where a config lacks one.

    An option that came after a config was written changes nothing at the value that base.py gives it, and the values of
    FREE change nothing at all.

    Args:
      first: as config.json has it.
      second: likewise.
    """
    one, other = deciding(first), deciding(second)
    before = deciding(defaults(second["method"]))
    one, other = (
        {key: before[key] for key in theirs if key in before} | own for own, theirs in ((one, other), (other, one))
    )
    return {key: (one.get(key), other.get(key)) for key in sorted({*one, *other}) if one.get(key) != other.get(key)}


def changed(config: FrozenConfigDict, section: str, **changes: Any) -> FrozenConfigDict:
    """A copy of a config with other values in one of its sections."""
    copy = ConfigDict(config.to_dict())  # of the frozen one itself, it would share its sections with others
    with copy.unlocked():
        copy[section].update(changes)
    return FrozenConfigDict(copy)
