"""CALVIN's long-horizon evaluation: chains of instructions, one after another without a reset.

Mees et al. 2022, arXiv 2112.03227: 1,000 chains of five subtasks in scene D, 360 steps each; a chain ends with the
first subtask that fails. Scores are the shares of chains that solve 1, 2, ... 5 in a row, and the mean number.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from wam_jax import evaluation, npz_files, specs
from wam_jax.environments.calvin import experts, follower, oracle
from wam_jax.environments.calvin.environment import Calvin, State, generators
from wam_jax.evaluation import Policy, decision_rngs
from wam_jax.types import Array, Observation

SUBTASK_STEPS = 360
_COLORS, _SIDES = ("red", "blue", "pink"), ("right", "left")
# The benchmark's one sentence for each of the 34 tasks (calvin_models, new_playtable_validation.yaml).
INSTRUCTIONS: dict[str, str] = {
    **specs.INSTRUCTIONS,
    **{f"rotate_{c}_block_{s}": f"take the {c} block and rotate it to the {s}" for c in _COLORS for s in _SIDES},
    **{f"push_{c}_block_{s}": f"go push the {c} block {s}" for c in _COLORS for s in _SIDES},
    **{f"lift_{c}_block_table": f"grasp and lift the {c} block" for c in _COLORS},
    **{f"lift_{c}_block_slider": f"lift the {c} block from the sliding cabinet" for c in _COLORS},
    **{f"lift_{c}_block_drawer": f"Take the {c} block from the drawer" for c in _COLORS},
    "place_in_slider": "store the grasped block in the sliding cabinet",
    "place_in_drawer": "store the grasped block in the drawer",
    "push_into_drawer": "slide the block that it falls into the drawer",
    "stack_block": "stack the grasped block",
    "unstack_block": "remove the stacked block",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """A start and what is asked for, one after another."""

    robot_obs: np.ndarray  # float64 [15]
    scene_obs: np.ndarray  # float64 [24]
    tasks: tuple[str, ...]


def load(path: str) -> list[Chain]:
    """Reads chains: an npz with robot_obs [n, 15], scene_obs [n, 24] and sequences [n, m], names of tasks.

    Raises:
      ValueError: the file is not one, or names an unknown task.
    """
    arrays = npz_files.read(path, "the chains", ("robot_obs", "scene_obs", "sequences"))
    robot_obs, scene_obs, sequences = arrays.values()
    count = len(sequences)
    if robot_obs.shape != (count, 15) or scene_obs.shape != (count, 24) or sequences.ndim != 2 or not sequences.size:
        raise ValueError(
            f"{path} has shapes {robot_obs.shape}, {scene_obs.shape} and {sequences.shape}; expected [n, 15], [n, 24] "
            "and [n, m]"
        )
    for name, rows in (("robot_obs", robot_obs), ("scene_obs", scene_obs)):
        wrong = np.flatnonzero(~np.isfinite(np.asarray(rows, np.float64)).all(axis=1))
        if len(wrong):
            raise ValueError(f"{path}: {name} of chain {wrong[0]} has entries that are not finite")
    unknown = sorted({*sequences.ravel().tolist()} - {*oracle.RULES})
    if unknown:
        raise ValueError(
            f"{path} names unknown tasks: {', '.join(map(str, unknown))}; known are {', '.join(oracle.RULES)}"
        )
    states = zip(robot_obs, scene_obs, strict=True)
    return [Chain(*row, tuple(tasks)) for row, tasks in zip(states, sequences.tolist(), strict=True)]


def version_of(chains: Sequence[Chain]) -> str:
    """Twelve hexadecimal digits that tell one set of chains from another, whatever its file is called."""
    digest = hashlib.sha256()
    for chain in chains:
        digest.update(chain.robot_obs.tobytes() + chain.scene_obs.tobytes() + " ".join(chain.tasks).encode())
    return digest.hexdigest()[:12]


def evaluate(
    environment: Calvin, policy: Policy, chains: Sequence[Chain], rngs: Array, *, max_steps: int = SUBTASK_STEPS
) -> np.ndarray:
    """Runs B chains side by side.

    Every subtask begins for all at once, since a chain that is ahead waits, unstepped. The oracle looks after every
    step, and a subtask ends with the step that solves it, in the middle of a policy's chunk too.

    Args:
      environment: their scene.
      policy: is told each subtask in words: its `start` gets B sentences, and forgets what was before.
      chains: all of one length.
      rngs: a key for each, [B].
      max_steps: a subtask's limit.

    Returns:
      int [B], subtasks solved in a row.
    """
    state = environment.reset_to(np.stack([c.robot_obs for c in chains]), np.stack([c.scene_obs for c in chains]))
    solved = np.zeros(len(chains), int)
    for index, tasks in enumerate(zip(*(chain.tasks for chain in chains), strict=True)):
        alive = solved == index
        if alive.any():
            keys, _ = decision_rngs(rngs, index)
            state, success = _subtask(environment, policy, state, tasks, alive, keys, max_steps)
            solved += success
    return solved


def _subtask(
    environment: Calvin,
    policy: Policy,
    state: State,
    tasks: Sequence[str],
    alive: np.ndarray,
    rngs: Array,
    max_steps: int,
) -> tuple[State, np.ndarray]:
    """Runs one subtask of the chains that are alive, bool [B]; returns who solved it, bool [B]."""
    begun = [infos[-1] for infos in state.infos]
    active, step, decision = alive, 0, 0
    observation = environment.observe(state, drawn=active & policy.sees)
    carry = policy.start([INSTRUCTIONS[task] for task in tasks], state, observation, decision_rngs(rngs, 0)[0])
    while step < max_steps and active.any():
        decision += 1
        act_rngs, observe_rngs = decision_rngs(rngs, decision)
        carry, chunk = policy.act(carry, state, act_rngs)
        seen: list[Observation] = []
        for action in np.asarray(chunk).swapaxes(0, 1)[: max_steps - step]:
            state, observation = environment.step_chunk(
                state, action[:, None], drawn=active & policy.sees, active=active
            )
            seen.append(observation)
            moments = zip(begun, state.infos, tasks, strict=True)
            active = active & [not oracle.solved(start, infos[-1], (task,)) for start, infos, task in moments]
            step += 1
        if step < max_steps:
            observations = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *seen)
            carry = policy.observe(carry, chunk, observations, observe_rngs)
    return state, alive & ~active


class ScriptedPolicy(evaluation.ScriptedPolicy):
    """The scripted experts, told in words; what none of them knows, it waits out."""

    def __init__(self, environment: Calvin):
        super().__init__(environment)
        self._tasks = {sentence: task for task, sentence in INSTRUCTIONS.items() if task in experts.EXPERTS}

    def start(self, task: Any, state: State, observation: Observation, rngs: Array) -> Any:
        """Plans from the state."""
        del observation
        return tuple(
            self._plan(sentence, state, index, rng)
            for index, (sentence, rng) in enumerate(zip(task, generators(rngs), strict=True))
        )

    def _plan(self, sentence: str, state: State, index: int, rng: np.random.Generator) -> follower.Plan:
        target = state.target[index]
        if sentence in self._tasks:
            return experts.plan(self._tasks[sentence], target, state.scene_obs[index], rng)
        here = follower.Waypoint(tuple(target[:3].tolist()), follower.AS_IS, int(state.robot_obs[index, 14]))
        return follower.Plan((here,), experts.FAST, target[:3], target[3:])


def scores(solved: Sequence[int], length: int) -> dict[str, Any]:
    """What CALVIN reports: {"chains": n, "success": shares that solved 1, ... `length` in a row, "average_length"}."""
    counts = np.asarray(solved)
    success = [float((counts >= number).mean()) for number in range(1, length + 1)]
    return {"chains": len(counts), "success": success, "average_length": float(counts.mean())}
