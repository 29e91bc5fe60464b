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
import tempfile
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from absl import logging

from wam_jax import cores
from wam_jax.environments.calvin import assets, scene
from wam_jax.environments.calvin.worker import Begin, Draw, Frames, Job, Look, Settings, Step

TIMEOUT = 600.0  # seconds for each episode of a request; a worker that is silent for longer is taken for dead
MAX_RESTARTS = 3  # of one worker within one request
_ROOT = Path(__file__).resolve().parents[3]  # where `wam_jax` is imported from
_CODE = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; its end closes the connection
sys.tracebacklimit = 0  # a Python that lacks something says so in one line
from wam_jax.environments.calvin.worker import main
del sys.tracebacklimit
main({descriptor})
"""


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
        """Starts the process; `welcome` says whether it can work.

        Raises:
          ValueError: there is no such interpreter.
        """
        self._python = python
        self._folder = tempfile.TemporaryDirectory(prefix="wam_jax_calvin_")  # outlives the process, however that ends
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        changes = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TMPDIR": self._folder.name}
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [python, "-c", _CODE.format(descriptor=theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, **changes},
                )
            except OSError as error:
                raise ValueError(f"CALVIN's simulator cannot be started: {error}; {assets.PYTHON}") from error
        self.connection = Connection(ours.detach())
        with contextlib.suppress(OSError):  # it is dead, and `welcome` will find that out
            self.connection.send(settings)

    def welcome(self) -> dict[str, str]:
        """The facts that a new worker begins with.

        Raises:
          ValueError: it cannot work, and why.
        """
        try:
            status, value = self.receive(1)
        except (EOFError, OSError) as error:
            raise ValueError(
                f"{self._python} ended ({_reason(error)}, status {self.end()}) before CALVIN's simulator could start; "
                f"{assets.PYTHON}"
            ) from error
        if status != "done":
            _raise({status: value})
        return value

    def receive(self, num_episodes: int) -> tuple[str, Any]:
        """An answer about so many episodes.

        Raises:
          EOFError: the process is dead, or silent.
        """
        timeout = TIMEOUT * num_episodes
        if not self.connection.poll(timeout):
            raise EOFError(f"it was silent for {timeout:.0f} s")
        return self.connection.recv()

    def end(self) -> int | None:
        """Ends the process, whatever it does; returns its exit status."""
        self.connection.close()
        self.process.kill()
        status = self.process.wait()
        self._folder.cleanup()
        return status


class Pool:
    """Workers and what their slots hold; slot i is episode i of the latest request, in worker i % `num_workers`."""

    def __init__(self, settings: Settings, num_workers: int = 0, python: str = ""):
        """Starts the first worker; the others follow when a request has as many episodes.

        Args:
          settings: of every simulator.
          num_workers: how many at most; 0: one for each core that this process may use.
          python: the interpreter that has pybullet; empty: this one.

        Raises:
          ValueError: pybullet or assets are missing, the scene is unknown, or the interpreter cannot be used.
        """
        assets.check(settings.directory, scene.get_scene(settings.scene))  # at once, and in one voice
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}; expected 1 or more, or 0 for one on each core")
        self._settings, self._python = settings, python or sys.executable
        self._num_workers = num_workers or cores.count()
        self._workers: list[_Worker] = []
        self._slots: dict[int, Episode] = {}
        self.restarts = 0  # dead workers so far
        self._finalizer = weakref.finalize(self, _end_all, self._workers)
        self.facts: dict[str, str] = {}
        self._grow(1)
        if assets.UNKNOWN in self.facts["assets"]:
            logging.warning(
                "CALVIN's assets in %s are %s: states and pictures may not be the original's",
                settings.directory,
                self.facts["assets"],
            )

    def close(self) -> None:
        """Ends the workers, for good."""
        self._finalizer()

    def _grow(self, count: int) -> None:
        """Starts workers until there are as many."""
        new = [self._new_worker() for _ in range(count - len(self._workers))]
        self._workers += new
        for worker in new:
            self.facts = worker.welcome()

    def _new_worker(self) -> _Worker:
        if not self._finalizer.alive:
            raise RuntimeError("the pool of CALVIN's simulators is closed")
        return _Worker(self._settings, self._python)

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
        self, episodes: Sequence[Episode], actions: Sequence[np.ndarray] | np.ndarray, render: Sequence[bool]
    ) -> tuple[list[Episode], list[Frames]]:
        """Executes actions, [C, 7] in each of B episodes; returns the episodes after them, and the C moments of each.

        An episode without actions, [0, 7], stays as it is, and shows its present moment.
        """
        frames = self._run(
            [[Step(i, a, r) if len(a) else Look(i, r)] for i, (a, r) in enumerate(zip(actions, render, strict=True))],
            episodes,
        )
        after = [episode.after(a) if len(a) else episode for episode, a in zip(episodes, actions, strict=True)]
        self._slots.update(enumerate(after))
        return after, frames

    def _run(self, jobs: list[list[Job]], episodes: Sequence[Episode] = ()) -> list[Any]:
        """Has each slot's jobs done, all workers at once; returns the answer to each slot's last one."""
        try:
            answers, problems = self._exchange(jobs, episodes)
        except BaseException:  # answers that are still to come would be taken for those to the next request
            self._slots.clear()
            _end_all(self._workers)
            self._workers.clear()
            raise
        if problems:
            _raise(problems)
        self._slots = {i: e for i, e in enumerate(episodes) if not isinstance(jobs[i][-1], Step)}
        return [answers[slot] for slot in range(len(jobs))]

    def _exchange(self, jobs: list[list[Job]], episodes: Sequence[Episode]) -> tuple[dict[int, Any], dict[str, str]]:
        """Asks all workers, and waits for all; returns answers by slot, and one problem of each kind."""
        count = min(self._num_workers, len(jobs))
        self._grow(count)
        shares = [list(range(i, len(jobs), self._num_workers)) for i in range(count)]
        for index, share in enumerate(shares):
            self._ask(index, share, jobs, episodes)
        self._slots.clear()  # they are on their way
        answers: dict[int, Any] = {}
        problems: dict[str, str] = {}
        for index, share in enumerate(shares):
            status, value = self._answer(index, share, jobs, episodes)
            if status == "done":
                answers.update(zip(share, value, strict=True))
            else:
                problems[status] = value
        return answers, problems

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
          ChildProcessError: its replacements die as well.
        """
        for tries_left in reversed(range(MAX_RESTARTS + 1)):
            try:
                return self._workers[index].receive(len(share))
            except (EOFError, OSError) as error:
                status, reason = self._workers[index].end(), _reason(error)
                if not tries_left:
                    raise ChildProcessError(
                        f"a process of CALVIN's simulator died {MAX_RESTARTS + 1} times, last with status {status} "
                        f"({reason}); -9 is often a lack of memory, which fewer --calvin_workers mend"
                    ) from error
            worker = self._new_worker()
            logging.warning(
                "a process of CALVIN's simulator ended (%s, status %s); its episodes are repeated", reason, status
            )
            self.restarts += 1
            self._workers[index] = worker
            worker.welcome()
            self._ask(index, share, jobs, episodes)


def _reason(error: Exception) -> str:
    return str(error) or "its connection closed"


def _raise(problems: dict[str, str]) -> NoReturn:
    """Raises what workers reported, faults of ours before mistakes of the user."""
    if "failed" in problems:
        raise RuntimeError(f"CALVIN's simulator failed:\n{problems['failed']}")
    raise ValueError(problems["refused"])


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.end()
