"""Evaluates policies in the environment, and the same policies from the same starts in imagination.

python -m experiments.evaluate --config=experiments/configs/quickstart.py --workdir=runs/quickstart --policy=ppo

Writes one row per task to WORKDIR/evaluation/STAGE.json and all rows to WORKDIR/table.json and table.md. Finished tasks
are kept; a rerun goes on with the missing ones. The scripted expert needs no config:

python -m experiments.evaluate --environment=calvin --policy=expert --calvin_assets=calvin_env/data \
    --starts=eval_starts.npz --workdir=runs/calvin_expert
"""

import functools
import os
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import finetune_policy, launch, simulators, train_policy, train_reward, train_world_model
from experiments.configs import calvin_d, quickstart
from wam_jax import environments, evaluation, imagination, tables
from wam_jax.diffusion_policy import PolicyParams
from wam_jax.types import LatentState, Params
from wam_jax.world_model import WorldModel


def run(config, workdir: str, stage: str) -> list[tables.Row]:
    """Evaluates one stage on every task; returns all rows of the workdir."""
    path = os.path.join(workdir, "evaluation", f"{stage}.json")
    rows = tables.load(path) if os.path.exists(path) else []
    done = {row.task for row in rows if row.episodes == config.evaluation.num_episodes}
    missing = [task for task in config.tasks if task not in done]
    trained = {task: _load(config, workdir, stage, task) for task in missing}  # a missing one is named before any work
    for task in tqdm(missing, desc=f"evaluating {stage}", unit="task", disable=not missing):
        row = _evaluate(config, stage, task, trained[task])
        rows = [other for other in rows if other.task != task] + [row]  # one of fewer episodes stays until now
        tables.save(path, rows)
    return write_table(workdir)


def write_table(workdir: str) -> list[tables.Row]:
    """Gathers all stages' rows into table.json and table.md."""
    paths = [os.path.join(workdir, "evaluation", f"{stage}.json") for stage in tables.STAGES]
    rows = [row for path in paths if os.path.exists(path) for row in tables.load(path)]
    tables.save(os.path.join(workdir, "table.json"), rows)
    with open(os.path.join(workdir, "table.md.tmp"), "w") as file:
        file.write(tables.markdown(rows))
    os.replace(file.name, os.path.join(workdir, "table.md"))
    return rows


def load_policy(config, workdir: str, stage: str, task: str) -> PolicyParams:
    """The policy of a stage as it was saved; one sampler serves both stages."""
    if stage == "ppo":
        return finetune_policy.load(config, workdir, task)
    base = train_policy.load(config, workdir, task)
    return PolicyParams(base=base, finetuned=base)


def latent_policy(config, workdir: str, stage: str, task: str) -> evaluation.LatentPolicy:
    """The policy of a stage on the filtered state of the workdir's world model."""
    model, params = train_world_model.load(config, workdir)
    policy = load_policy(config, workdir, stage, task)
    return evaluation.LatentPolicy(model, params, policy, train_policy.policy_settings(config))


class _Trained(NamedTuple):
    """What the evaluation of one task needs from the workdir."""

    policy: PolicyParams
    reward_params: Params
    model: WorldModel
    world_model_params: Params


def _load(config, workdir: str, stage: str, task: str) -> _Trained | None:
    if stage == "expert":
        return None
    reward_params = train_reward.load(config, workdir, task)
    return _Trained(load_policy(config, workdir, stage, task), reward_params, *train_world_model.load(config, workdir))


def _evaluate(config, stage: str, task: str, trained: _Trained | None) -> tables.Row:
    environment = simulators.make(config.environment, rendered="all" if trained else "none")
    num_episodes = config.evaluation.num_episodes
    rng = jax.random.key(config.evaluation.seed)
    policy: evaluation.Policy = evaluation.ScriptedPolicy(environment)
    if trained:
        settings = train_policy.policy_settings(config)
        policy = evaluation.LatentPolicy(trained.model, trained.world_model_params, trained.policy, settings)
    result = evaluation.rollout(
        environment, policy, task, rng, num_episodes=num_episodes, max_steps=config.evaluation.max_steps
    )
    imagined_success = None
    if trained:
        starts = evaluation.start_latents(environment, policy, task, rng, num_episodes=num_episodes)
        imagined_success = _imagined_success(config, trained, starts)
    return tables.make_row(
        environment=config.environment,
        method=config.method if trained else "-",
        task=task,
        stage=stage,
        successes=int(np.sum(result.success)),
        episodes=num_episodes,
        imagined_success=imagined_success,
        seed=config.seed,
        simulator=simulators.describe(environment),
    )


def _imagined_success(config, trained: _Trained, starts: LatentState) -> float:
    """Success of the same policy, sampled as in evaluation, from the same starts inside the world model."""
    inputs = imagination.ImaginationInputs(
        starts, trained.world_model_params, trained.reward_params, trained.policy.base
    )
    episodes = _imagine(config, trained.model)(trained.policy, inputs, jax.random.key(config.evaluation.seed))
    return float(imagination.success_rate(episodes))


@functools.lru_cache(maxsize=2)
def _imagine(config, model):
    settings = launch.stage_settings(finetune_policy.ppo_settings(config), num_rollouts=config.evaluation.num_episodes)
    return jax.jit(
        functools.partial(
            imagination.rollout,
            explore=False,
            **finetune_policy.imagination_functions(config, model),
            policy_settings=train_policy.policy_settings(config),
            settings=settings,
        )
    )


def _choose_config(config: ConfigDict | None) -> ConfigDict:
    """The given config; without one, what a scripted expert needs, the tasks and the environment."""
    if config is None:
        if _POLICY.value != "expert":
            raise ValueError(f"--policy={_POLICY.value} needs the config it was trained with: --config=FILE")
        config = (calvin_d if _ENVIRONMENT.value == "calvin" else quickstart).get_config()
    if _ENVIRONMENT.value:
        config.environment = _ENVIRONMENT.value
    return config


if __name__ == "__main__":
    _POLICY = flags.DEFINE_enum("policy", "ppo", ("expert", "bc", "ppo"), "Which stage's policies to evaluate")
    _ENVIRONMENT = flags.DEFINE_enum("environment", None, environments.ENVIRONMENTS, "In place of the config's")
    launch.main(lambda config, workdir: print(tables.markdown(run(config, workdir, _POLICY.value))), _choose_config)
