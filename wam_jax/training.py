"""The one training loop: resume, N updates a dispatch, metrics one dispatch behind, checkpoints, clean interruption."""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from wam_jax import metrics as metrics_lib
from wam_jax import parallel
from wam_jax.checkpoints import Checkpointer

SHOWN = ("loss", "reconstruction", "kl", "inverse_dynamics", "bc_loss", "accuracy", "imagined_success", "approx_kl")


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
    if not os.path.isdir(f"{workdir}/{stage}"):
        return 0
    with contextlib.closing(Checkpointer(f"{workdir}/{stage}")) as checkpointer:
        return checkpointer.latest_step() or 0


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


def fit(
    run: Callable,
    state: Any,
    make_batches: Callable[[int], Iterator[Any]],
    *,
    stage: str,
    workdir: str,
    settings: dict,
    seed: int,
    num_steps: int,
    updates_per_call: int,
    save_every: int,
    devices: list[jax.Device],
) -> Any:
    """Trains one stage to `num_steps` updates, from its newest checkpoint where there is one.

    Args:
      run: N updates a call, from parallel.compile_updates; one program serves all tasks of a stage.
      state: the state before the first update, on the host.
      make_batches: `make_batches(first_step)` -> iterator of device-ready batches for `run`.
      stage: name of the stage, e.g. "policy/open_drawer"; checkpoints lie in `workdir/stage`.
      workdir: folder of the run.
      settings: the stage's settings, saved beside the state.
      seed: seed of the updates' randomness.
      num_steps: updates in total.
      updates_per_call: updates a dispatch, N; a last shorter call is not made, so num_steps must be divisible by it.
      save_every: updates between checkpoints.
      devices: from parallel.local_devices.

    Returns:
      the final state, on the host.

    Raises:
      ValueError: num_steps, or what is left of it after a resume, is not divisible by updates_per_call.
      FloatingPointError: a metric is not finite; names it and the step.
      KeyboardInterrupt: interrupted, after saving.
    """
    if num_steps % updates_per_call:
        raise ValueError(f"{stage}: {num_steps} steps are not divisible by updates_per_call={updates_per_call}")
    with contextlib.ExitStack() as stack:  # whatever ends the run, saves under way are finished first
        checkpointer = stack.enter_context(contextlib.closing(Checkpointer(f"{workdir}/{stage}")))
        step = checkpointer.latest_step() or 0
        if step:
            state = checkpointer.restore(state, settings)
        if step >= num_steps:
            return state
        if (num_steps - step) % updates_per_call:
            raise ValueError(
                f"{stage} goes on from step {step} of {num_steps}: the {num_steps - step} that are left are not "
                f"divisible by updates_per_call={updates_per_call}; take the value that the run began with"
            )
        batches = make_batches(step)  # first: data that are missing leave nothing behind
        stack.callback(getattr(batches, "close", lambda: None))  # ends the loader's threads
        state = parallel.replicate(state, devices)
        is_first = parallel.is_first_process()
        writer = stack.enter_context(
            contextlib.closing(metrics_lib.MetricsWriter(workdir, stage, first_step=step, active=is_first))
        )
        progress = stack.enter_context(
            tqdm(total=num_steps, initial=step, desc=stage, unit="update", smoothing=0.05, disable=not is_first)
        )
        pending, last_saved = None, step
        clock = _Clock(batches, time.monotonic(), writer.last_row)
        with Interruption() as interruption:
            while step < num_steps and not parallel.any_process(interruption.requested):
                state, metrics = run(state, next(batches), seed, step)
                if pending is not None:  # read one dispatch behind, so that the device never waits for the host
                    _report(writer, progress, *pending, clock)
                pending, step = (metrics, step), step + updates_per_call
                if step - last_saved >= save_every and step < num_steps:
                    _report(writer, progress, *pending, clock)  # checks it, and no row is lost with a kill
                    pending = None
                    checkpointer.save(step, parallel.unreplicate(state), settings)
                    last_saved = step
            if pending is not None:
                _report(writer, progress, *pending, clock)
            state = jax.device_get(parallel.unreplicate(state))
            checkpointer.save(step, state, settings)
            checkpointer.wait()
    if step < num_steps:
        raise KeyboardInterrupt(f"{stage} saved at step {step}; the same command goes on from there")
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


def _report(writer, progress, metrics, first_step, clock):
    values = metrics_lib.fetch(metrics)
    metrics_lib.check_finite(values, first_step)
    num_updates = len(next(iter(values.values())))
    means = {name: value.mean() for name, value in values.items()}
    writer.write(first_step + num_updates, means | clock.read())
    progress.update(num_updates)
    shown = [name for name in SHOWN if name in means]
    progress.set_postfix({name: f"{means[name]:.4g}" for name in shown}, refresh=False)
