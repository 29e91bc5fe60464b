"""CALVIN as a batch of episodes, `interface.Environment`, on worker processes."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from wam_jax import images, specs
from wam_jax.environments.calvin import experts, follower, starts
from wam_jax.environments.calvin import scene as scenes
from wam_jax.environments.calvin.oracle import Info
from wam_jax.environments.calvin.pool import Episode, Pool, begin
from wam_jax.environments.calvin.worker import Frames, Settings
from wam_jax.types import Array, Observation

OUT_OF_REACH = 0.07  # m between target and what the arm can reach, from which it is reported; experts: up to 0.06


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """B episodes, and what was measured last."""

    episodes: tuple[Episode, ...]
    robot_obs: np.ndarray  # float64 [B, 15]
    scene_obs: np.ndarray  # float64 [B, 24]
    target: np.ndarray  # float64 [B, 6], position and Euler angles that actions are added to
    infos: tuple[tuple[Info, ...], ...]  # B times the moments of the last chunk (one after a reset), for the oracle
    unreported: tuple[str, ...]  # names of the episodes; empty once an unreachable target was reported


class Calvin:
    """Implements `interface.Environment`; a state is a value, and may be stepped more than once."""

    name = "calvin"

    def __init__(
        self,
        assets: str = "",
        *,
        scene: str = "D",
        starts_file: str = "",
        image_size: int = specs.IMAGE_SIZE,
        pictures: bool = True,
        num_workers: int = 0,
        python: str = "",
    ):
        """Starts the workers.

        Args:
          assets: folder laid out like calvin_env's `data/`.
          scene: A, B, C or D.
          starts_file: npz of starts that `reset_to_task` takes in order; empty: random ones.
          image_size: pixels that are drawn; 0: CALVIN's own 200 and 84. Other than 64 are averaged to that, as those of
            CALVIN's datasets are; pictures drawn at 64 look otherwise.
          pictures: False: nothing is drawn, and all pictures are black; in less time and memory.
          num_workers: processes; 0: one for each core.
          python: the interpreter that has pybullet; empty: this one.

        Raises:
          ValueError: a value cannot work; pybullet, assets or starts are missing.
        """
        self._scene, self._pictures, self._starts_file = scene, pictures, starts_file
        self._starts = starts.load(starts_file) if starts_file else None
        sizes = scenes.picture_sizes(image_size)
        self._drawn = " and ".join(map(str, sizes))
        settings = Settings(assets, scene, *sizes, pictures=pictures)
        self._pool = Pool(settings, num_workers, python)

    @property
    def facts(self) -> dict[str, str]:
        """Versions, renderer, assets and starts: what a result should record."""
        given = starts.version_of(self._starts) if self._starts else "random"
        return self._pool.facts | {"starts": given, "pixels": self._drawn}

    def check_starts(self, task: str, count: int) -> None:
        """Checks that a task has as many starts.

        Raises:
          ValueError: the file of starts holds fewer.
        """
        given = count if self._starts is None else len(self._starts.get(task, ()))
        if given < count:
            mend = f"--config.evaluation.num_episodes={given}" if given else "--config.tasks, without it"
            raise ValueError(
                f"{self._starts_file} holds {given} starts of {task}, fewer than the {count} episodes asked for; give "
                f"more, or a --config and {mend}"
            )

    def close(self) -> None:
        """Ends the workers."""
        self._pool.close()

    def reset_to_task(self, rng: Array, task: Array, number: Array | None = None) -> State:
        """See `interface.Environment`.

        Raises:
          ValueError: a task is not an index into `specs.TASKS`, or the file of starts has too few.
        """
        task = np.asarray(task)
        if task.ndim != 1 or ((task < 0) | (task >= len(specs.TASKS))).any():
            raise ValueError(f"task must be [B] with entries 0..{len(specs.TASKS) - 1}, got {task}")
        numbers = range(len(task)) if number is None else np.asarray(number).tolist()
        chosen = [(specs.TASKS[i], n) for i, n in zip(task, numbers, strict=True)]
        names = [f"{name} {n}" for name, n in chosen]
        if self._starts is None:
            words = np.asarray(jax.random.key_data(rng)).ravel().tolist()
            return self._begin(self._pool.draw([name for name, _ in chosen], [(*words, n) for _, n in chosen]), names)
        for name, n in chosen:
            self.check_starts(name, n + 1)
        return self._begin([begin(*self._starts[name][n]) for name, n in chosen], names)

    def reset_to(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> State:
        """Begins episodes in recorded states, [B, 15] and [B, 24]."""
        episodes = [begin(*start) for start in zip(robot_obs, scene_obs, strict=True)]
        return self._begin(episodes, [str(number) for number in range(len(episodes))])

    def _begin(self, episodes: Sequence[Episode], names: Sequence[str]) -> State:
        frames = self._pool.look(episodes, [False] * len(episodes))
        return _state(episodes, frames, tuple(names))

    def observe(self, state: State, drawn: Array | None = None) -> Observation:
        """See `interface.Environment`."""
        frames = self._pool.look(state.episodes, self._render(drawn, len(state.episodes)))
        observation = _observation(frames)
        return jax.tree.map(lambda x: x[:, 0], observation)

    def step_chunk(
        self, state: State, actions: Array, drawn: Array | None = None, active: Array | None = None
    ) -> tuple[State, Observation]:
        """See `interface.Environment`.

        Args:
          state, actions, drawn: as there.
          active: bool [B], the episodes that are stepped; the others stay where they are. None: all.

        Raises:
          ValueError: the actions are not [B, C, 7], not finite, or out of range.
        """
        actions = _executable(np.asarray(actions, np.float64), len(state.episodes))
        stepped = np.ones(len(actions), bool) if active is None else np.asarray(active)
        share = [a if s else a[:0] for a, s in zip(actions, stepped, strict=True)]
        episodes, frames = self._pool.step(state.episodes, share, self._render(drawn, len(actions)))
        unreported = tuple(map(_report, state.unreported, frames))
        return _state(episodes, frames, unreported), _observation(frames)

    def start_expert(self, rngs: Array, task: Array, state: State) -> tuple[follower.Plan, ...]:
        """See `interface.Environment`.

        Raises:
          ValueError: the scene is not D, which the experts know.
        """
        if self._scene != "D":
            raise ValueError(f"the scripted experts know scene D only, not {self._scene}")
        episodes = zip(np.asarray(task), state.target, state.scene_obs, generators(rngs), strict=True)
        return tuple(
            experts.plan(specs.TASKS[int(t)], target, scene_obs, rng) for t, target, scene_obs, rng in episodes
        )

    def act_expert(self, expert: tuple[follower.Plan, ...], state: State) -> tuple[tuple[follower.Plan, ...], Array]:
        """See `interface.Environment`."""
        plans, actions = zip(*map(follower.act, expert, state.robot_obs), strict=True)
        return plans, np.array(actions, np.float32)

    def _render(self, drawn: Array | None, count: int) -> list[bool]:
        wanted = [True] * count if drawn is None else np.asarray(drawn).tolist()
        return [self._pictures and bool(w) for w in wanted]


def generators(rngs: Array) -> list[np.random.Generator]:
    """A numpy generator from each of B keys."""
    return [np.random.default_rng(words) for words in np.asarray(jax.random.key_data(rngs)).tolist()]


def _report(name: str, frames: Frames) -> str:
    """Warns, once an episode, of a target that the arm cannot reach; returns the name of one still to be warned of."""
    error = frames.reach_error.max()
    if error <= OUT_OF_REACH or not name:
        return name
    logging.warning(
        "episode %s: the target is out of reach, the arm stays %.0f mm from it; CALVIN itself says nothing",
        name,
        1000 * error,
    )
    return ""


def _executable(actions: np.ndarray, count: int) -> np.ndarray:
    """Checks actions [B, C, 7] and turns their last entry into a gripper command."""
    if actions.ndim != 3 or actions.shape[0] != count or actions.shape[1] < 1 or actions.shape[2] != specs.ACTION_DIM:
        raise ValueError(f"actions must be [{count}, C, {specs.ACTION_DIM}], got {actions.shape}")
    wrong = np.argwhere(~np.isfinite(actions).all(-1) | (np.abs(actions[..., :6]).max(-1, initial=0) > 1))
    if len(wrong):
        episode, step = wrong[0]
        raise ValueError(
            f"action {step} of episode {episode} is {actions[episode, step].tolist()}; expected finite entries, the "
            "first six in [-1, 1]"
        )
    gripper = np.where(actions[..., 6:] > 0, specs.GRIPPER_OPEN, specs.GRIPPER_CLOSE)
    return np.concatenate([actions[..., :6], gripper], axis=-1)


def _state(episodes: Sequence[Episode], frames: Sequence[Frames], unreported: tuple[str, ...]) -> State:
    return State(
        episodes=tuple(episodes),
        robot_obs=np.stack([f.robot_obs[-1] for f in frames]),
        scene_obs=np.stack([f.scene_obs[-1] for f in frames]),
        target=np.stack([f.target[-1] for f in frames]),
        infos=tuple(f.infos for f in frames),
        unreported=unreported,
    )


def _observation(frames: Sequence[Frames]) -> Observation:
    """Stacks episodes, [B, C, ...]; undrawn pictures are black, and one that stood still shows its moment C times."""
    moments = max(len(f.robot_obs) for f in frames)

    def pictures(field: str) -> np.ndarray:
        stacked = np.zeros((len(frames), moments, specs.IMAGE_SIZE, specs.IMAGE_SIZE, 3), np.uint8)
        for row, f in zip(stacked, frames, strict=True):
            if len(getattr(f, field)):
                row[:] = [images.resize(image) for image in getattr(f, field)]
        return stacked

    def vectors(field: str) -> np.ndarray:
        rows = [getattr(f, field) for f in frames]
        return np.stack([np.broadcast_to(row, (moments, row.shape[1])) for row in rows]).astype(np.float32)

    return Observation(
        pictures("rgb_static"),
        pictures("rgb_gripper"),
        vectors("robot_obs"),
        vectors("scene_obs"),
    )
