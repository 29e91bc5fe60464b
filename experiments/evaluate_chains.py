"""CALVIN's long-horizon evaluation: chains of five instructions, 360 steps each, without a reset in between.

python -m experiments.evaluate_chains --chains=eval_sequences.npz --calvin_assets=calvin_env/data --workdir=runs/chains

The scripted experts, told in words, show that the protocol works; they know eight of the 34 tasks. A policy of one's
own that follows language goes the same way: `evaluate(config, workdir, NAME, environment, policy, chains.load(FILE))`.
Writes WORKDIR/chains/POLICY.json after every batch of chains (config.evaluation.batch_size); a rerun goes on.
"""

import os

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import launch, simulators
from experiments.configs import calvin_d
from wam_jax import chains, json_files
from wam_jax.chains import Chain
from wam_jax.environments.calvin.environment import Calvin
from wam_jax.evaluation import Policy, episode_rngs


def evaluate(
    config, workdir: str, name: str, environment: Calvin, policy: Policy, asked: list[Chain], count: int = 0
) -> dict:
    """Runs the first chains, as far as they are still missing; returns and writes the scores.

    Args:
      config: its `evaluation` says how many chains run at once, and the seed.
      workdir: gets chains/NAME.json.
      name: of the policy.
      environment: CALVIN.
      policy: told in words.
      asked: all chains.
      count: how many of them; 0: all.

    Raises:
      ValueError: what is there was made with other chains or another simulator.
    """
    path = os.path.join(workdir, "chains", f"{name}.json")
    made_with = {
        "simulator": simulators.describe(environment, without=("starts", "pixels")),
        "sequences": chains.version_of(asked),
    }
    result = json_files.read(path, "remove it and evaluate again") if os.path.exists(path) else made_with
    for key, value in made_with.items():
        if result.get(key) != value:
            raise ValueError(f"{path}: its {key} are {result.get(key)}, not {value}; use another --workdir")
    solved = list(result.get("solved", ()))
    size, rng, last = config.evaluation.batch_size, jax.random.key(config.evaluation.seed), count or len(asked)
    for first in tqdm(range(len(solved), last, size), desc="chains", unit="batch"):
        numbers = np.arange(first, min(first + size, last))
        batch = chains.evaluate(environment, policy, asked[first : numbers[-1] + 1], episode_rngs(rng, numbers))
        solved = [*solved, *batch.tolist()]
        result = made_with | chains.scores(solved, len(asked[0].tasks)) | {"solved": solved}
        json_files.write(path, result)
    return result | chains.scores(solved[:last], len(asked[0].tasks))


def report(result: dict) -> str:
    """The scores as CALVIN prints them."""
    shares = [f"{number} in a row: {100 * share:.1f} %" for number, share in enumerate(result["success"], start=1)]
    return "\n".join([*shares, f"average length: {result['average_length']:.3f} ({result['chains']} chains)"])


def run(config, workdir: str) -> None:
    """Evaluates the scripted experts."""
    asked = chains.load(_CHAINS.value)
    if _NUM_CHAINS.value > len(asked):
        raise ValueError(f"--num_chains={_NUM_CHAINS.value}, but {_CHAINS.value} holds {len(asked)} chains")
    if config.environment != "calvin":
        raise ValueError(f"config.environment={config.environment!r}; chains are CALVIN's: leave --config out")
    environment = simulators.make(config, pictures=False)
    assert isinstance(environment, Calvin)
    policy = chains.ScriptedPolicy(environment)
    print(report(evaluate(config, workdir, "expert", environment, policy, asked, _NUM_CHAINS.value)))


if __name__ == "__main__":
    _CHAINS = flags.DEFINE_string("chains", None, "npz with robot_obs, scene_obs and sequences", required=True)
    _NUM_CHAINS = flags.DEFINE_integer("num_chains", 0, "The first of them; 0: all", lower_bound=0)
    launch.main(run, lambda config: config or calvin_d.get_config())
