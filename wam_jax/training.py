"""The one training loop: resume, N updates a dispatch, metrics and checkpoints one dispatch behind, interruption."""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from wam_jax import metrics as metrics_lib
from wam_jax import parallel
from wam_jax.checkpoints import KEPT, Checkpointer

SHOWN = (
    *("loss", "reconstruction", "kl", "inverse_dynamics", "bc_loss", "accuracy"),
    *("imagined_success", "environment_success", "approx_kl"),
)


_FILES = ("workdir", "settings", "keep_checkpoints")  # arguments of `fit` that its files take


class Interruption:
    """Context in which Ctrl-C or SIGTERM only sets `requested`, so that a loop can finish its step and save."""

    requested = False

    def __enter__(self) -> "Interruption":
        self._previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._request)
            except ValueError:  # not the main thread: whoever runs the loop there handles signals
                break
        return self

    def _request(self, number, frame):
        del frame
        if self.requested:  # the second time means now
            raise KeyboardInterrupt
        self.requested = True
        tqdm.write(f"signal {number}: saving after this step")

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def repeat(bank: Any) -> Callable[[int], Iterator[Any]]:
    """For `fit`: every call gets the same bank, which the updates draw their rows from."""

    def make_batches(first_step: int) -> Iterator[Any]:
        del first_step
        return itertools.repeat(bank)

    return make_batches


def steps_done(workdir: str, stage: str) -> int:
    """Updates that a stage's newest checkpoint holds; 0 where there is none."""
    return starts(workdir, stage)[-1]


def starts(workdir: str, stage: str) -> list[int]:
    """The steps that a stage can go on from, rising; the last is what it has done."""
    if not os.path.isdir(f"{workdir}/{stage}"):
        return [0]
    with contextlib.closing(Checkpointer(f"{workdir}/{stage}")) as checkpointer:
        return checkpointer.starts()


def load_finished(template: Any, *, stage: str, workdir: str, settings: dict, num_steps: int, binary: str) -> Any:
    """Restores a stage's final state, for the stages that build on it.

    Args:
      template: a state of the expected shapes.
      stage, workdir, settings: as `fit` had them.
      num_steps: updates of the whole stage.
      binary: the program of experiments/ that trains it, for the error.

    Raises:
      ValueError: the stage has not been trained, or not to the end, or the checkpoint is damaged or of another size.
    """
    step = steps_done(workdir, stage)
    if step < num_steps:
        raise ValueError(
            f"{workdir}/{stage} is at step {step} of {num_steps}; run experiments.{binary} with this config and "
            "workdir first, it goes on from there"
        )
    with contextlib.closing(Checkpointer(f"{workdir}/{stage}")) as checkpointer:
        return checkpointer.restore(template, settings)


def save_untrained(state: Any, *, stage: str, workdir: str, settings: dict, num_steps: int) -> None:
    """Saves a state as a stage's final one, for a stage that there is a reason not to train."""
    with contextlib.closing(Checkpointer(f"{workdir}/{stage}")) as checkpointer:
        checkpointer.save(num_steps, jax.device_get(state), settings)


def fit(run: Callable, state: Any, make_batches: Callable[[int], Iterator[Any]], *, stage: str, **arguments) -> Any:
    """Trains one stage to `num_steps` updates, from its newest checkpoint where there is one.

    Args:
      run: N updates a call, from parallel.compile_updates; one program serves all tasks of a stage.
      state: the state before the first update, on the host.
      make_batches: `make_batches(first_step)` -> iterator of device-ready batches for `run`.
      stage: name of the stage, e.g. "policy/open_drawer"; checkpoints lie in `workdir/stage`.
      **arguments: workdir: folder of the run.
        settings: the stage's settings, saved beside the state.
        seed: seed of the updates' randomness.
        num_steps: updates in total.
        updates_per_call: updates a dispatch, N; a last shorter call is not made, so num_steps must be divisible by it.
        save_every: updates between checkpoints.
        keep_checkpoints: how many of them stay, the newest; checkpoints.KEPT if not given.
        devices: from parallel.local_devices.

    Returns:
      the final state, on the host.

    Raises:
      ValueError: num_steps, or what is left of it after a resume, is not divisible by updates_per_call.
      FloatingPointError: a metric is not finite; names it and the step.
      KeyboardInterrupt: interrupted, after saving.
    """
    files = _StageFiles(stage, **{name: arguments.pop(name) for name in _FILES if name in arguments})
    return _fit(files, run, state, make_batches, **arguments)


def fit_together(
    run: Callable, state: Any, make_batches: Callable[[int], Iterator[Any]], *, stages: Sequence[str], **arguments
) -> Any:
    """Trains several stages of one shape in one program; each keeps checkpoints and metrics of its own, as from `fit`.

    Args:
      run: from parallel.compile_updates, of an update that takes and returns G states at once.
      state: of all stages, stacked: leaves [G, ...].
      make_batches: as for `fit`.
      stages: G names; they go on from the newest step that all can go on from. A run that was killed between their
        saves left some ahead of the others.
      **arguments: as for `fit`, but `seed` int32 [G], one a stage.

    Returns:
      the final states, stacked, on the host.

    Raises:
      ValueError: as `fit`; or there is no such step.
      FloatingPointError, KeyboardInterrupt: as `fit`.
    """
    kept = {name: arguments.pop(name) for name in _FILES if name in arguments}
    files = _JointFiles([_StageFiles(stage, **kept) for stage in stages])
    return _fit(files, run, state, make_batches, **arguments)


class _StageFiles:
    """The checkpoints and metrics of one stage."""

    def __init__(self, stage: str, workdir: str, settings: dict, keep_checkpoints: int = KEPT):
        self.stage, self._workdir, self._settings, self._keep = stage, workdir, settings, keep_checkpoints
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "_StageFiles":
        self._checkpointer = self._stack.enter_context(
            contextlib.closing(Checkpointer(f"{self._workdir}/{self.stage}", max_to_keep=self._keep))
        )
        self.starts = self._checkpointer.starts()
        self.step = self.starts[-1]
        return self

    def __exit__(self, *_):
        self._stack.close()  # whatever ends the run, saves under way are finished first

    def go_back(self, step: int) -> None:
        """Forgets what came after one of `starts`."""
        self._checkpointer.drop_after(step)
        self.step = step

    def restore(self, state: Any) -> Any:
        return self._checkpointer.restore(state, self._settings)

    def save(self, step: int, state: Any) -> None:
        self._checkpointer.save(step, state, self._settings)

    def wait(self) -> None:
        self._checkpointer.wait()

    def open_metrics(self) -> Mapping[str, float]:
        """Opens the metrics after the restored step; returns the last row of the run before."""
        active = parallel.is_first_process()
        writer = metrics_lib.MetricsWriter(self._workdir, self.stage, first_step=self.step, active=active)
        self._writer = self._stack.enter_context(contextlib.closing(writer))
        return self._writer.last_row

    def report(self, first_step: int, values: Mapping[str, np.ndarray], seconds: Mapping[str, float]) -> None:
        """Writes the means of N updates' metrics, [N] each.

        Raises:
          FloatingPointError: one is not finite.
        """
        metrics_lib.check_finite(values, first_step)
        num_updates = len(next(iter(values.values())))
        self._writer.write(first_step + num_updates, {**{name: x.mean() for name, x in values.items()}, **seconds})


class _JointFiles:
    """The same of several stages that are trained together: states [G, ...], metrics [N, G]."""

    def __init__(self, parts: Sequence[_StageFiles]):
        self._parts = parts
        self.stage = f"{len(parts)} stages, {parts[0].stage} ... {parts[-1].stage}"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "_JointFiles":
        for part in self._parts:
            self._stack.enter_context(part)
        common = set.intersection(*(set(part.starts) for part in self._parts))
        if not common:
            self._stack.close()
            found = ", ".join(f"{part.stage} from {' or '.join(map(str, part.starts))}" for part in self._parts)
            raise ValueError(f"these stages cannot go on from the same step: {found}; train them apart")
        self.step = max(common)
        for part in self._parts:
            part.go_back(self.step)
        return self

    def __exit__(self, *_):
        self._stack.close()

    def restore(self, state: Any) -> Any:
        restored = [part.restore(_take(state, index)) for index, part in enumerate(self._parts)]
        return jax.tree.map(lambda *x: np.stack(x), *restored)

    def save(self, step: int, state: Any) -> None:
        state = jax.device_get(state)
        for index, part in enumerate(self._parts):
            part.save(step, _take(state, index))

    def wait(self) -> None:
        for part in self._parts:
            part.wait()

    def open_metrics(self) -> Mapping[str, float]:
        return [part.open_metrics() for part in self._parts][0]

    def report(self, first_step: int, values: Mapping[str, np.ndarray], seconds: Mapping[str, float]) -> None:
        for index, part in enumerate(self._parts):
            try:
                part.report(first_step, {name: x[:, index] for name, x in values.items()}, seconds)
            except FloatingPointError as error:
                raise FloatingPointError(f"{part.stage}: {error}") from None


def _take(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def _fit(
    files: _StageFiles | _JointFiles,
    run: Callable,
    state: Any,
    make_batches: Callable[[int], Iterator[Any]],
    *,
    seed: int | np.ndarray,
    num_steps: int,
    updates_per_call: int,
    save_every: int,
    devices: list[jax.Device],
) -> Any:
    if num_steps % updates_per_call:
        raise ValueError(f"{files.stage}: {num_steps} steps are not divisible by updates_per_call={updates_per_call}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(files)
        step = files.step
        if step:
            state = files.restore(state)
        if step >= num_steps:
            return state
        if (num_steps - step) % updates_per_call:
            raise ValueError(
                f"{files.stage} goes on from step {step} of {num_steps}: the {num_steps - step} that are left are not "
                f"divisible by updates_per_call={updates_per_call}; take the value that the run began with"
            )
        batches = make_batches(step)  # first: data that are missing leave nothing behind
        stack.callback(getattr(batches, "close", lambda: None))  # ends the loader's threads
        state = parallel.replicate(state, devices)
        clock = _Clock(batches, time.monotonic(), files.open_metrics())
        progress = tqdm(
            total=num_steps, initial=step, desc=files.stage, unit="update", smoothing=0.05,
            disable=not parallel.is_first_process(),
        )  # fmt: skip
        stack.enter_context(progress)
        saver = stack.enter_context(_Saver(files))
        pending, last_saved = None, step
        with Interruption() as interruption:
            while step < num_steps and not parallel.any_process(interruption.requested):
                state, metrics = run(state, next(batches), seed, step)
                saver.check()
                if pending is not None:  # read one dispatch behind, so that the device never waits for the host
                    _finish(files, progress, clock, saver, *pending)
                first_step, step = step, step + updates_per_call
                saves = step - last_saved >= save_every and step < num_steps
                snapshot = parallel.unreplicate(state) if saves else None  # before the next call takes its memory
                pending, last_saved = (metrics, first_step, snapshot), step if saves else last_saved
            if pending is not None:
                _finish(files, progress, clock, saver, *pending)
            state = jax.device_get(parallel.unreplicate(state))
            saver.save(step, state)
            saver.wait()
            files.wait()
    if step < num_steps:
        raise KeyboardInterrupt(f"{files.stage} saved at step {step}; the same command goes on from there")
    return state


class _Clock(NamedTuple):
    """Seconds of a stage, over all runs that worked on it."""

    batches: Any
    started: float
    last_row: Mapping[str, float]  # of the run before

    def read(self) -> dict[str, float]:
        waited = getattr(self.batches, "seconds_waiting", 0)
        now = {"seconds": time.monotonic() - self.started, "seconds_waiting_for_data": waited}
        return {name: value + self.last_row.get(name, 0) for name, value in now.items()}


class _Saver:
    """Saves in a thread of its own, one checkpoint after another, so that no update waits for one."""

    def __init__(self, files: _StageFiles | _JointFiles):
        self._files = files
        self._last: Future | None = None

    def __enter__(self) -> "_Saver":
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        return self

    def __exit__(self, *_):
        self._thread.shutdown()  # what is under way is finished first
        self.check()  # raised with the error under way as its context

    def check(self) -> None:
        """Raises the error of the last save, if it has failed."""
        if self._last is not None and self._last.done():
            self._last.result()

    def save(self, step: int, state: Any) -> None:
        """Begins to save a state, on the host or a device, after the save before it."""
        self.wait()
        self._last = self._thread.submit(self._files.save, step, state)
        if jax.process_count() > 1:  # the processes save in step with each other
            self.wait()

    def wait(self) -> None:
        """Blocks until the last save has copied its state; `files.wait` until it is on disk."""
        if self._last is not None:
            self._last.result()


def _finish(files, progress, clock, saver, metrics, first_step, snapshot):
    """Reports the updates of one call, and saves the state after them if there is a snapshot of it."""
    values = metrics_lib.fetch(metrics)
    files.report(first_step, values, clock.read())  # checks them first, so that only good states are saved
    num_updates = len(next(iter(values.values())))
    progress.update(num_updates)
    shown = {name: f"{values[name].mean():.4g}" for name in SHOWN if name in values}
    progress.set_postfix(shown, refresh=False)
    if snapshot is not None:
        saver.save(first_step + num_updates, snapshot)
