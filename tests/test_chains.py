"""Chains of instructions: the protocol on a made-up table, and the scripted experts in CALVIN itself."""

import dataclasses
import json

import helpers
import jax
import numpy as np
import pytest
from calvin_files import ASSETS, SHARED, needs_simulator
from ml_collections import FrozenConfigDict

from experiments import evaluate_chains
from wam_jax import chains, environments
from wam_jax.environments.calvin import experts, oracle, scene
from wam_jax.types import Observation


def rngs(count):
    return jax.random.split(jax.random.key(0), count)


OPEN, CLOSE = chains.INSTRUCTIONS["open_drawer"], chains.INSTRUCTIONS["close_drawer"]


@dataclasses.dataclass
class State:
    drawer: np.ndarray  # [B]

    @property
    def infos(self):
        joints = [{scene.DRAWER: x, scene.SLIDER: 0.0} for x in self.drawer]
        return [[oracle.Info(joints=joint, lights={}, blocks={}, robot_contacts=frozenset())] for joint in joints]


class Table:
    """Its drawer moves by a tenth of an action's first entry."""

    facts = {"table": "made up"}

    def reset_to(self, robot_obs, scene_obs):
        return State(scene_obs[:, 1])

    def observe(self, state, drawn):
        self.drawn = drawn
        return self._observation(state)

    def step_chunk(self, state, actions, drawn, active):
        assert actions.shape[1] == 1
        np.testing.assert_array_equal(drawn, active)
        state = State(state.drawer + 0.1 * actions[:, 0, 0] * active)
        return state, jax.tree.map(lambda x: x[:, None], self._observation(state))

    def _observation(self, state):
        return Observation(*[state.drawer[:, None]] * 4)


class Follower:
    """Opens and closes as it is told, each chain at its own speed, three actions at a time."""

    sees = True

    def __init__(self, *speeds):
        self.speeds, self.told, self.observed = np.array(speeds), [], []

    def start(self, task, state, observation, rng):
        self.told.append((list(task), state.drawer.round(6).tolist()))
        return np.where(np.array(task) == OPEN, 1, -1) * self.speeds

    def act(self, carry, state, rng):
        return carry, np.tile(carry[:, None, None], (1, 3, 7))

    def observe(self, carry, action, observation, rng):
        self.observed.append(observation.scene_obs.round(6).tolist())
        return carry


def make_chains(count, tasks=("open_drawer", "close_drawer", "open_drawer")):
    return [chains.Chain(scene.EVALUATION_ROBOT_OBS, np.zeros(24), tasks)] * count


def test_a_subtask_ends_with_the_step_that_solves_it_and_a_chain_with_the_first_that_fails():
    policy = Follower(0.5, 1.0, 0.1)  # solved after 3 steps, after 2, too late
    solved = chains.evaluate(Table(), policy, make_chains(3), rngs(3), max_steps=8)
    assert solved.tolist() == [3, 3, 0]
    assert [told for told, _ in policy.told] == [[OPEN] * 3, [CLOSE] * 3, [OPEN] * 3]
    # Each subtask begins where the step that solved the last one led; the chain that failed after 8 steps stays there.
    assert [drawer for _, drawer in policy.told] == [[0, 0, 0], [0.15, 0.2, 0.08], [0, 0, 0.08]]
    assert policy.observed[0] == [[[0.05], [0.1], [0.15]], [[0.1], [0.2], [0.2]], [[0.01], [0.02], [0.03]]]


def test_the_limit_counts_steps_not_chunks():
    for max_steps, expected in ((10, 0), (11, 1)):
        solved = chains.evaluate(
            Table(), Follower(0.115), make_chains(1, ("open_drawer",)), rngs(1), max_steps=max_steps
        )
        assert solved.tolist() == [expected]


def test_there_is_a_sentence_for_each_of_the_oracles_tasks():
    assert set(chains.INSTRUCTIONS) == set(oracle.RULES) and len(set(chains.INSTRUCTIONS.values())) == 34


def test_scores_are_calvins():
    scores = chains.scores([0, 1, 1, 5], 5)
    assert scores == {"chains": 4, "success": [0.75, 0.25, 0.25, 0.25, 0.25], "average_length": 1.75}
    text = evaluate_chains.report(scores)
    assert text.splitlines()[0] == "1 in a row: 75.0 %" and text.endswith("average length: 1.750 (4 chains)")


def test_a_rerun_goes_on_and_other_chains_are_refused(tmp_path, monkeypatch):
    config = helpers.make_config()
    config.evaluation.batch_size = 2
    config, asked, sizes, run = FrozenConfigDict(config), make_chains(5), [], chains.evaluate

    def noted(environment, policy, batch, rng):
        if sum(sizes) == 4:
            sizes.append(0)
            raise RuntimeError("killed")
        sizes.append(len(batch))
        return run(environment, Follower(*[0.5] * len(batch)), batch, rng, max_steps=4)

    monkeypatch.setattr(chains, "evaluate", noted)
    arguments = config, str(tmp_path), "follower", Table(), None
    with pytest.raises(RuntimeError, match="killed"):
        evaluate_chains.evaluate(*arguments, asked)
    with open(tmp_path / "chains/follower.json") as file:
        assert json.load(file)["solved"] == [3] * 4
    sizes.clear()
    result = evaluate_chains.evaluate(*arguments, asked)
    assert (sizes, result["chains"], result["average_length"]) == ([1], 5, 3)
    with pytest.raises(ValueError, match="its sequences are .*; use another --workdir"):
        evaluate_chains.evaluate(*arguments, make_chains(5, ("open_drawer",)))


def write(path, **changes):
    arrays = dict(robot_obs=np.zeros((2, 15)), scene_obs=np.zeros((2, 24)), sequences=np.array([["open_drawer"]] * 2))
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequences": None}, "cannot read the chains .*: it has no sequences"),
        ({"sequences": np.array([["open_drawer"], ["open_door"]])}, "names unknown tasks: open_door"),
        ({"robot_obs": np.zeros((3, 15))}, r"has shapes \(3, 15\), \(2, 24\) and \(2, 1\); expected"),
        ({"sequences": np.array([[{}], [{}]])}, "cannot read the chains .*a pickled one, which is never loaded"),
        ({"scene_obs": np.full((2, 24), np.nan)}, "scene_obs of chain 0 has entries that are not finite"),
    ],
)
def test_chains_that_cannot_be_used_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        chains.load(write(tmp_path / "chains.npz", **changes))


@needs_simulator
def test_the_experts_solve_the_subtasks_that_they_know():
    """Of the benchmark's own chains, those that begin with several of the eight tasks, and one that does not."""
    every = chains.load(str(SHARED / "eval_sequences.npz"))
    assert len(every) == 1000 and {len(chain.tasks) for chain in every} == {5}
    environment = environments.make("calvin", assets=str(ASSETS), pictures=False, num_workers=2)
    known = [_known(chain) for chain in every]
    chosen = [known.index(3), known.index(0)]
    policy = chains.ScriptedPolicy(environment)
    solved = chains.evaluate(environment, policy, [every[i] for i in chosen], rngs(2), max_steps=90)
    environment.close()
    assert solved.tolist() == [3, 0]


def _known(chain):
    """Subtasks at a chain's beginning that there is an expert for."""
    return next((i for i, task in enumerate(chain.tasks) if task not in experts.EXPERTS), len(chain.tasks))
