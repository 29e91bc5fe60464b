"""Checkpoints of every stage, through Orbax: written to a temporary name and renamed, restored onto any devices."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

KEPT = 2  # checkpoints of a stage: stages trained as one program go back one save where a kill left some ahead
_PARTS = ("state", "settings")
_MEND = "delete that folder: the stage then goes on from the checkpoint before it, or begins anew"


class Checkpointer:
    """The checkpoints of one stage: a train state and the settings it was made with, by step."""

    def __init__(self, directory: str, *, max_to_keep: int = KEPT):
        """Opens a folder, made where there is none; saving deletes the oldest beyond `max_to_keep`.

        Raises:
          ValueError: the folder cannot be made, or the newest checkpoint lacks a part.
        """
        self.directory = os.path.abspath(directory)
        try:
            os.makedirs(self.directory, exist_ok=True)  # Orbax waits for minutes where a file is in its place
        except OSError as error:
            raise ValueError(
                f"{self.directory} should be a folder of checkpoints and cannot be made ({error.strerror}); it, and "
                "all that it lies in, must be folders that you can write"
            ) from error
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, create=True, enable_async_checkpointing=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "settings": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        step = self.latest_step()
        if step is not None and not all(os.path.isdir(f"{self.directory}/{step}/{part}") for part in _PARTS):
            self._manager.close()
            raise ValueError(f"{self.directory}/{step} is damaged (it should hold {' and '.join(_PARTS)}); {_MEND}")

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, None where there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all checkpoints that are kept, rising."""
        return sorted(self._manager.all_steps())

    def starts(self) -> list[int]:
        """The steps that this stage can go on from, rising: those of its checkpoints, and 0 before the second."""
        steps = self.steps()
        return steps if len(steps) > 1 else [0, *steps]

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def save(self, step: int, state: Any, settings: dict) -> None:
        """Saves in the background; returns once the arrays are copied to the host.

        Raises:
          OSError: this save, or the one before it, failed: for want of room, say.
        """
        if step == self.latest_step():
            return
        state = jax.tree.map(np.asarray, state)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(settings))
        with self._failure_named():
            self._manager.save(step, args=args)

    def restore(self, template: Any, settings: dict, step: int | None = None) -> Any:
        """Restores a state as host arrays.

        Args:
          template: a state of the expected shapes (arrays or ShapeDtypeStructs).
          settings: the settings the template was made from; named in the error where sizes differ.
          step: None for the newest.

        Raises:
          ValueError: there is no checkpoint, or it is of another size.
        """
        self.wait()  # a save under way counts as the latest step before it can be read
        step = self.latest_step() if step is None else step
        if step is None:
            raise ValueError(f"no checkpoint in {self.directory}; run the stage that writes it first")
        self._check_size(template, settings, step)
        host = jax.tree.map(lambda x: np.zeros(np.shape(x), x.dtype), template)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(host)))["state"]
        except Exception as error:  # whatever Orbax and TensorStore meet in damaged files
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{self.directory}/{step} cannot be read ({reason}); {_MEND}") from error

    def wait(self) -> None:
        """Blocks until every save is on disk.

        Raises:
          OSError: one failed.
        """
        with self._failure_named():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the manager's threads."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _failure_named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever Orbax and TensorStore say of a disk
            raise OSError(
                f"{self.directory}: a checkpoint could not be saved ({' '.join(str(error).split())[:200]}); make room, "
                "and run the same command: it goes on from the checkpoint before"
            ) from error

    def _check_size(self, template, settings, step):
        try:
            with open(os.path.join(self.directory, str(step), "settings", "metadata")) as file:
                saved_settings = json.load(file)
            saved = self._manager.item_metadata(step)["state"].tree
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(f"{self.directory}/{step} cannot be read ({reason}); {_MEND}") from error
        found, expected = _shapes(saved), _shapes(template)
        if found == expected:
            return
        different = {
            key: (saved_settings.get(key), value)
            for key, value in json.loads(json.dumps(settings)).items()
            if saved_settings.get(key) != value
        }
        names = ", ".join(f"{key}={old!r} there, {new!r} here" for key, (old, new) in sorted(different.items()))
        raise ValueError(
            f"the checkpoint {self.directory}/{step} is of another size ({names or 'the settings agree'}); use the "
            "config it was trained with, or another --workdir; what an earlier version wrote is trained anew once "
            f"{self.directory} is deleted"
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Maps every leaf's path, spelled alike for structs and dicts, to its shape."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "/".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path): tuple(leaf.shape)
        for path, leaf in leaves
    }
