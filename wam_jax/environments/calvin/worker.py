"""A process that steps CALVIN's tables, and what is said to it; numpy and pybullet, no JAX.

It answers lists of jobs until its connection closes. A slot is one episode's simulator: a physics world of its own, so
that episodes in one process do not disturb each other.
"""

import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from wam_jax.environments.calvin import assets, cameras, oracle, scene, starts
from wam_jax.environments.calvin.simulator import Simulator


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all simulators of a process have in common."""

    directory: str  # of the assets
    scene: str = "D"
    static_size: int = 64  # pixels
    gripper_size: int = 64
    pictures: bool = True  # False: states alone, in less time and memory


@dataclasses.dataclass(frozen=True)
class Frames:
    """Consecutive moments of one episode."""

    robot_obs: np.ndarray  # float64 [n, 15]
    scene_obs: np.ndarray  # float64 [n, 24]
    rgb_static: np.ndarray  # uint8 [n, S, S, 3]; [0, S, S, 3] where pictures were not asked for
    rgb_gripper: np.ndarray  # likewise
    target: np.ndarray  # float64 [n, 6], position and Euler angles that actions are added to
    reach_error: np.ndarray  # float64 [n], m between target and what the arm can reach
    infos: tuple[oracle.Info, ...]  # n, for the oracle


@dataclasses.dataclass(frozen=True)
class Begin:
    """Loads a slot's scene anew, sets it to a recorded state and repeats actions, unseen."""

    slot: int
    robot_obs: np.ndarray  # [15]
    scene_obs: np.ndarray  # [24]
    actions: np.ndarray  # [t, 7]

    def run(self, simulator: Simulator, settings: Settings) -> None:
        """Answers nothing."""
        del settings
        simulator.reset(self.robot_obs, self.scene_obs)
        for action in self.actions:
            simulator.step(action)


@dataclasses.dataclass(frozen=True)
class Look:
    """Reads a slot as it is."""

    slot: int
    render: bool

    def run(self, simulator: Simulator, settings: Settings) -> Frames:
        """Answers one moment."""
        return _frames([_moment(simulator, settings, self.render)], settings)


@dataclasses.dataclass(frozen=True)
class Step:
    """Executes actions, [C, 7] with C > 0, and reads the slot after each."""

    slot: int
    actions: np.ndarray
    render: bool

    def run(self, simulator: Simulator, settings: Settings) -> Frames:
        """Answers C moments."""
        moments = []
        for action in self.actions:
            simulator.step(action)
            moments.append(_moment(simulator, settings, self.render))
        return _frames(moments, settings)


@dataclasses.dataclass(frozen=True)
class Draw:
    """Draws a random start for a task."""

    slot: int
    task: str
    seed: tuple[int, ...]

    def run(self, simulator: Simulator, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
        """Answers robot_obs and scene_obs to reset to."""
        rng = np.random.default_rng(self.seed)
        return starts.draw(simulator, scene.get_scene(settings.scene), self.task, rng)


Job = Begin | Look | Step | Draw


def _moment(simulator: Simulator, settings: Settings, render: bool) -> tuple:
    pictures = simulator.render(settings.static_size, settings.gripper_size) if render else ()
    target = np.concatenate([simulator.target_position, simulator.target_euler])
    return simulator.robot_obs(), simulator.scene_obs(), target, simulator.reach_error(), simulator.info(), pictures


def _frames(moments: list[tuple], settings: Settings) -> Frames:
    robot_obs, scene_obs, targets, errors, infos, pictures = zip(*moments, strict=True)
    sizes = settings.static_size, settings.gripper_size
    shown = [p for p in pictures if p]
    static, gripper = (
        np.array([pair[camera] for pair in shown], np.uint8).reshape(-1, size, size, 3)
        for camera, size in enumerate(sizes)
    )
    return Frames(
        robot_obs=np.array(robot_obs),
        scene_obs=np.array(scene_obs),
        rgb_static=static,
        rgb_gripper=gripper,
        target=np.array(targets),
        reach_error=np.array(errors),
        infos=infos,
    )


def facts(settings: Settings) -> dict[str, str]:
    """What decides the last bits of states and pictures; every result names it.

    Raises:
      ValueError: pybullet or assets are missing, or the scene is unknown.
    """
    of = scene.get_scene(settings.scene)
    assets.load_pybullet()
    assets.check(settings.directory, of)
    return {
        "scene": of.name,
        "assets": assets.version_of(settings.directory, of),
        "renderer": cameras.RENDERER,
        "pybullet": assets.pybullet_version(),
        "numpy": np.__version__,
        "python": sys.version.split()[0],
    }


def main(descriptor: int) -> None:
    """Serves one connection: settings come first, then lists of jobs; a wrong job is answered, not fatal.

    Args:
      descriptor: of the connection, inherited.
    """
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 1)  # pybullet's C code prints warnings there
    connection = Connection(descriptor)
    settings: Settings = connection.recv()
    simulators: dict[int, Simulator] = {}
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        connection.send(_answer(facts, settings))
        while True:
            jobs: list[list[Job]] = connection.recv()
            connection.send(_answer(_run_all, jobs, simulators, settings))


def _run_all(jobs: list[list[Job]], simulators: dict[int, Simulator], settings: Settings) -> list[Any]:
    """Does the jobs of each slot, in order; returns what the last of each came to."""
    return [[_run(job, simulators, settings) for job in slot][-1] for slot in jobs]


def _run(job: Job, simulators: dict[int, Simulator], settings: Settings) -> Any:
    if job.slot not in simulators:
        simulators[job.slot] = Simulator(settings.directory, settings.scene, pictures=settings.pictures)
    return job.run(simulators[job.slot], settings)


def _answer(work: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    """("done", result), ("refused", why) where a value given by the user cannot work, or ("failed", traceback)."""
    try:
        return "done", work(*arguments)
    except ValueError as error:
        return "refused", str(error)
    except Exception:
        return "failed", traceback.format_exc()
