"""Worker processes that hold episodes of CALVIN; one that dies is started again and its episodes are repeated.

An episode is a value: its start and its actions. A worker's slot only caches where that leads, so a slot that was lost
with its process, or holds something else, is brought there by repeating the actions from a fresh load; states are equal
to the last bit.

Workers are started as programs of their own rather than by `multiprocessing`: its spawned children import the parent's
main module, and with it JAX. Another Python than JAX's may run them.
"""

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from absl import logging

from wam_jax.environments.calvin import assets, scene
from wam_jax.environments.calvin.worker import Begin, Draw, Frames, Job, Look, Settings, Step

TIMEOUT = 600.0  # seconds; a worker that is silent for longer is taken for dead
MAX_RESTARTS = 3  # within one request
_ROOT = Path(__file__).resolve().parents[3]  # where `wam_jax` is imported from


@dataclasses.dataclass(frozen=True, eq=False)
class Episode:
    """A start and what was done since."""

    robot_obs: np.ndarray  # float64 [15], the state to reset to
    scene_obs: np.ndarray  # float64 [24]
    actions: np.ndarray  # float64 [t, 7]

    def after(self, actions: np.ndarray) -> "Episode":
        """The episode when further actions were executed."""
        return Episode(self.robot_obs, self.scene_obs, np.concatenate([self.actions, actions]))


def begin(robot_obs: np.ndarray, scene_obs: np.ndarray) -> Episode:
    """An episode before its first action."""
    return Episode(np.asarray(robot_obs, np.float64), np.asarray(scene_obs, np.float64), np.zeros((0, 7)))


class _Worker:
    """One process and the connection to it."""

    def __init__(self, settings: Settings, python: str):
        ours, theirs = socket.socketpair()
        with theirs:
            code = f"from wam_jax.environments.calvin.worker import main; main({theirs.fileno()})"
            paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            self.process = subprocess.Popen(
                [python, "-c", code],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            )
        self.connection = Connection(ours.detach())
        self.connection.send(settings)

    def receive(self) -> tuple[str, Any]:
        """An answer.

        Raises:
          EOFError: the process is dead, or silent.
        """
        if not self.connection.poll(TIMEOUT):
            raise EOFError(f"silent for {TIMEOUT:.0f} s")
        return self.connection.recv()

    def end(self) -> int | None:
        """Ends the process, whatever it does; returns its exit status."""
        self.connection.close()
        self.process.kill()
        return self.process.wait()


class Pool:
    """Workers and what their slots hold; slot i is episode i of the latest request, in worker i % number of workers."""

    def __init__(self, settings: Settings, num_workers: int = 0, python: str = ""):
        """Starts the workers.

        Args:
          settings: of every simulator.
          num_workers: 0: one for each core.
          python: the interpreter that has pybullet; empty: this one.

        Raises:
          ValueError: pybullet or assets are missing, or the scene is unknown.
        """
        assets.check(settings.directory, scene.get_scene(settings.scene))  # at once, and in one voice
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}; expected 1 or more, or 0 for one on each core")
        self._settings, self._python = settings, python or sys.executable
        self._workers = [_Worker(settings, self._python) for _ in range(num_workers or os.cpu_count() or 1)]
        self._slots: dict[int, Episode] = {}
        self.restarts = 0  # dead workers so far
        self._finalizer = weakref.finalize(self, _end_all, self._workers)
        self.facts: dict[str, str] = [self._welcome(worker) for worker in self._workers][0]

    def close(self) -> None:
        """Ends the workers."""
        self._finalizer()

    @property
    def processes(self) -> list[int]:
        """Ids of the workers' processes."""
        return [worker.process.pid for worker in self._workers]

    def draw(self, tasks: Sequence[str], seeds: Sequence[tuple[int, ...]]) -> list[Episode]:
        """A random start for each task; the same seed draws the same one."""
        drawn = self._run([[Draw(i, task, seed)] for i, (task, seed) in enumerate(zip(tasks, seeds, strict=True))])
        return [begin(*start) for start in drawn]

    def look(self, episodes: Sequence[Episode], render: Sequence[bool]) -> list[Frames]:
        """The present moment of each episode, with pictures where they are asked for."""
        return self._run([[Look(i, r)] for i, r in enumerate(render)], episodes)

    def step(
        self, episodes: Sequence[Episode], actions: np.ndarray, render: Sequence[bool]
    ) -> tuple[list[Episode], list[Frames]]:
        """Executes actions [B, C, 7]; returns the episodes after them, and the C moments of each."""
        frames = self._run([[Step(i, a, r)] for i, (a, r) in enumerate(zip(actions, render, strict=True))], episodes)
        after = [episode.after(a) for episode, a in zip(episodes, actions, strict=True)]
        self._slots.update(enumerate(after))
        return after, frames

    def _run(self, jobs: list[list[Job]], episodes: Sequence[Episode] = ()) -> list[Any]:
        """Has each slot's jobs done, all workers at once; returns the answer to each slot's last one."""
        count = len(self._workers)
        shares = [list(range(i, len(jobs), count)) for i in range(count)]
        for index, share in enumerate(shares):
            self._ask(index, share, jobs, episodes)
        answers: dict[int, Any] = {}
        problems: dict[str, str] = {}  # one of each kind
        for index, share in enumerate(shares):
            status, value = self._answer(index, share, jobs, episodes)
            if status == "done":
                answers.update(zip(share, value, strict=True))
            else:
                problems[status] = value
        if problems:
            self._slots.clear()  # some episodes went on, some did not
            _raise(problems)
        self._slots = dict(enumerate(episodes))
        return [answers[slot] for slot in range(len(jobs))]

    def _ask(self, index: int, share: list[int], jobs: list[list[Job]], episodes: Sequence[Episode]) -> None:
        """Sends a worker its share, preceded by what brings its slots to their episodes."""
        message: list[list[Job]] = []
        for slot in share:
            restore: list[Job] = []
            if episodes and self._slots.get(slot) is not episodes[slot]:
                episode = episodes[slot]
                restore = [Begin(slot, episode.robot_obs, episode.scene_obs, episode.actions)]
            message.append(restore + jobs[slot])
        with contextlib.suppress(OSError):  # it is dead, and `_answer` will find that out
            self._workers[index].connection.send(message)

    def _answer(self, index: int, share: list[int], jobs: list[list[Job]], episodes: Sequence[Episode]) -> Any:
        """A worker's answer; a dead worker is replaced and asked again.

        Raises:
          RuntimeError: its replacements die as well.
        """
        for _ in range(MAX_RESTARTS + 1):
            try:
                return self._workers[index].receive()
            except (EOFError, OSError):
                if not self._finalizer.alive:
                    raise RuntimeError("the pool was closed while it worked") from None
                status = self._workers[index].end()
                self.restarts += 1
                logging.warning("a process of CALVIN's simulator ended (status %s); its episodes are repeated", status)
                self._workers[index] = _Worker(self._settings, self._python)
                self._welcome(self._workers[index])
                for slot in share:
                    self._slots.pop(slot, None)
                self._ask(index, share, jobs, episodes)
        raise RuntimeError(f"a process of CALVIN's simulator died {MAX_RESTARTS + 1} times, last with status {status}")

    def _welcome(self, worker: _Worker) -> dict[str, str]:
        """The facts that a new worker begins with.

        Raises:
          ValueError: it cannot work, and why.
        """
        try:
            status, value = worker.receive()
        except (EOFError, OSError) as error:
            raise RuntimeError(
                f"a process of CALVIN's simulator ended with status {worker.end()} at its start"
            ) from error
        if status != "done":
            _raise({status: value})
        return value


def _raise(problems: dict[str, str]) -> NoReturn:
    """Raises what workers reported, faults of ours before mistakes of the user."""
    if "failed" in problems:
        raise RuntimeError(f"CALVIN's simulator failed:\n{problems['failed']}")
    raise ValueError(problems["refused"])


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.end()
