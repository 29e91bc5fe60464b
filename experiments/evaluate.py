"""Evaluates policies in the environment, and the same policies from the same starts in imagination.

python -m experiments.evaluate --config=experiments/configs/quickstart.py --workdir=runs/quickstart --policy=ppo

Writes one row per task to WORKDIR/evaluation/STAGE.json and all rows to WORKDIR/table.json and table.md. Each episode
is kept in STAGE.episodes.json as it ends, and a rerun goes on with the missing ones.
--save_videos=K films the first K episodes of each task into WORKDIR/videos. The scripted expert needs no config:

python -m experiments.evaluate --environment=calvin --policy=expert --calvin_assets=calvin_env/data \
    --starts=eval_starts.npz --workdir=runs/calvin_expert
"""

import dataclasses
import functools
import os
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import finetune_policy, launch, simulators, train_policy, train_reward, train_world_model
from experiments.configs import calvin_d, quickstart
from wam_jax import environments, evaluation, imagination, json_files, tables, videos, world_model
from wam_jax.diffusion_policy import PolicyParams
from wam_jax.environments.interface import Environment
from wam_jax.types import LatentState, Observation, Params
from wam_jax.world_model import WorldModel

_SAVE_EVERY = 1.0  # seconds: hundreds of episodes end within one where an accelerator simulates them

flags.DEFINE_string("starts", "", "CALVIN: npz of start states, taken in order; empty: random ones")


def run(config, workdir: str, stage: str, save_videos: int = 0) -> list[tables.Row]:
    """Evaluates one stage on every task, and films the first episodes of each; returns all rows of the workdir.

    Raises:
      ValueError: the evaluation lacks something, or what is there was made with another simulator or other starts.
    """
    path = os.path.join(workdir, "evaluation", f"{stage}.json")
    rows = tables.load(path) if os.path.exists(path) else []
    films = min(save_videos, config.evaluation.num_episodes)
    done = {row.task for row in rows if row.episodes == config.evaluation.num_episodes}
    done -= {task for task in done if not _filmed(workdir, stage, task, range(films))}
    missing = [task for task in config.tasks if task not in done]
    # Whatever is missing or does not fit is named before any work.
    trained = {task: None if stage == "expert" else load(config, workdir, stage, task) for task in missing}
    untrained = {task for task in missing if stage == "ppo" and finetune_policy.keeps_cloned(config, workdir, task)}
    environment = simulators.make(config, pictures=stage != "expert" or films > 0)
    simulators.check_starts(environment, config.tasks, config.evaluation.num_episodes)
    _check_simulator(
        path, [*rows, *tables.load_episodes(_episodes_path(workdir, stage))], _describe(environment, stage)
    )
    for task in tqdm(missing, desc=f"evaluating {stage}", unit="task", disable=not missing):
        policy = make_policy(config, environment, trained[task])
        episodes = _play(config, workdir, stage, task, environment, policy, films)
        row = _row(config, stage, task, environment, policy, trained[task], episodes)
        row = dataclasses.replace(row, untrained=task in untrained)
        rows = [other for other in rows if other.task != task] + [row]  # one of fewer episodes stays until now
        tables.save(path, rows)
    return write_table(workdir)


def write_table(workdir: str) -> list[tables.Row]:
    """Gathers all stages' rows into table.json and table.md, where there are any."""
    paths = [os.path.join(workdir, "evaluation", f"{stage}.json") for stage in tables.STAGES]
    rows = [row for path in paths if os.path.exists(path) for row in tables.load(path)]
    if rows:
        tables.save(os.path.join(workdir, "table.json"), rows)
        json_files.write_text(os.path.join(workdir, "table.md"), tables.markdown(rows))
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


class Trained(NamedTuple):
    """What the evaluation of one task needs from the workdir."""

    policy: PolicyParams
    reward_params: Params
    model: WorldModel
    world_model_params: Params


def load(config, workdir: str, stage: str, task: str) -> Trained:
    """Loads a stage's policy, the world model and the reward of a task.

    Raises:
      ValueError: one of them has not been trained to its end.
    """
    reward_params = train_reward.load(config, workdir, task)
    return Trained(load_policy(config, workdir, stage, task), reward_params, *train_world_model.load(config, workdir))


def _describe(environment: Environment, stage: str) -> str:
    """Of the simulator, what this stage's results depend on."""
    return simulators.describe(environment, without=("pixels",) if stage == "expert" else ())


def _check_simulator(path: str, found: Sequence[tables.Row | tables.Episode], now: str) -> None:
    """Checks that earlier results were made with the simulator and the starts of this run."""
    for then in {result.simulator for result in found} - {now}:
        old, new = (", ".join(sorted({*a.split(", ")} - {*b.split(", ")})) for a, b in ((then, now), (now, then)))
        raise ValueError(f"{path}: its results are of {old}, not of {new}; use another --workdir")


def make_policy(config, environment: Environment, trained: Trained | None) -> evaluation.Policy:
    """The policy as it acts in the environment; without a trained one the scripted expert."""
    if trained is None:
        return evaluation.ScriptedPolicy(environment)
    settings = train_policy.policy_settings(config)
    return evaluation.LatentPolicy(trained.model, trained.world_model_params, trained.policy, settings)


def batches(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    """Of the episodes that run at once."""
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]


def _play(
    config, workdir: str, stage: str, task: str, environment: Environment, policy: evaluation.Policy, films: int
) -> list[tables.Episode]:
    """A task's episodes; those that are missing, or lack their film, are played now, and kept as they end.

    A killed process loses those that ended within a second of a saved one; an interrupted one loses none.
    """
    path, simulator = _episodes_path(workdir, stage), _describe(environment, stage)
    saved = 0.0
    known = {(episode.task, episode.number): episode for episode in tables.load_episodes(path)}

    def keep(number: int, success: bool, steps: int) -> None:
        known[task, number] = tables.Episode(task, number, success, steps, simulator)
        if time.monotonic() - saved > _SAVE_EVERY:
            save()

    def save() -> None:
        nonlocal saved
        tables.save(path, list(known.values()))
        saved = time.monotonic()

    def lacks_film(number: int) -> bool:
        return number < films and not _filmed(workdir, stage, task, [number])

    lacking = [n for n in range(config.evaluation.num_episodes) if (task, n) not in known or lacks_film(n)]
    for batch in batches(lacking, config.evaluation.batch_size):
        filmed = [number for number in batch if number < films]  # the first ones: numbers rise
        try:
            result = evaluation.rollout(
                environment, policy, task, jax.random.key(config.evaluation.seed), numbers=batch,
                max_steps=config.evaluation.max_steps, films=len(filmed), ended=keep,
            )  # fmt: skip
        finally:
            save()
        for row, number in enumerate(filmed):
            frames = jax.tree.map(lambda x, row=row: x[row], result.video)
            _film(_film_path(workdir, stage, task, number), frames, known[task, number])
    return [known[task, number] for number in range(config.evaluation.num_episodes)]


def _film(path: str, observation: Observation, episode: tables.Episode) -> None:
    outcome = f"solved, step {episode.steps}" if episode.success else "not solved"
    videos.save_gif(path, videos.episode(observation, f"{episode.task.replace('_', ' ')}: {outcome}"))


def _filmed(workdir: str, stage: str, task: str, numbers: Iterable[int]) -> bool:
    return all(os.path.exists(_film_path(workdir, stage, task, number)) for number in numbers)


def _film_path(workdir: str, stage: str, task: str, number: int) -> str:
    return os.path.join(workdir, "videos", stage, task, f"{number:03d}.gif")


def _episodes_path(workdir: str, stage: str) -> str:
    return os.path.join(workdir, "evaluation", f"{stage}.episodes.json")


def _row(
    config,
    stage: str,
    task: str,
    environment: Environment,
    policy: evaluation.Policy,
    trained: Trained | None,
    episodes: Sequence[tables.Episode],
) -> tables.Row:
    """Sums up a task's episodes, beside the same policy's from the same starts in imagination."""
    imagined = None
    if trained:
        starts = start_latents(config, environment, policy, task)
        imagined = imagined_success(config, trained, starts)
    return tables.make_row(
        environment=config.environment,
        method=config.method if trained else "-",
        task=task,
        stage=stage,
        successes=sum(episode.success for episode in episodes),
        episodes=len(episodes),
        imagined_success=imagined,
        seed=config.seed,
        simulator=_describe(environment, stage),
    )


def start_latents(config, environment: Environment, policy: evaluation.Policy, task: str) -> LatentState:
    """The latents from which the evaluation's episodes of a task begin, [num_episodes, ...]."""
    parts = [
        evaluation.start_latents(environment, policy, task, jax.random.key(config.evaluation.seed), numbers=batch)
        for batch in batches(range(config.evaluation.num_episodes), config.evaluation.batch_size)
    ]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def imagined_success(config, trained: Trained, starts: LatentState) -> float:
    """Success of a policy, sampled as in evaluation, from a bank of starts inside the world model.

    An episode there has `evaluation.max_steps` steps, like one outside, whatever `ppo.max_steps` is.
    """
    inputs = imagination.ImaginationInputs(
        starts, jnp.int32(len(starts.deterministic)),
        world_model.imagination_params(trained.model, trained.world_model_params), trained.reward_params,
        trained.policy.base,
    )  # fmt: skip
    episodes = _imagine(config, trained.model)(trained.policy, inputs, jax.random.key(config.evaluation.seed))
    return float(imagination.success_rate(episodes))


@functools.lru_cache(maxsize=8)
def _imagine(config, model):
    settings = launch.stage_settings(
        finetune_policy.ppo_settings(config),
        num_rollouts=config.evaluation.num_episodes,
        horizon=config.evaluation.max_steps // config.policy.chunk,  # of an episode outside, whatever PPO's
    )
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
    elif _POLICY.value != "expert" and _ENVIRONMENT.value not in (None, config.environment):
        raise ValueError(
            f"--environment={_ENVIRONMENT.value}, but the policies of {config.environment} are asked for; leave it out"
        )
    if _ENVIRONMENT.value not in (None, config.environment):
        config.environment = _ENVIRONMENT.value
        config.dataset.pictures = "averaged" if _ENVIRONMENT.value == "calvin" else "drawn"
    return config


if __name__ == "__main__":
    _POLICY = flags.DEFINE_enum("policy", "ppo", ("expert", "bc", "ppo"), "Which stage's policies to evaluate")
    _ENVIRONMENT = flags.DEFINE_enum("environment", None, environments.ENVIRONMENTS, "In place of the config's")
    _VIDEOS = flags.DEFINE_integer("save_videos", 0, "Films the first K episodes of each task", lower_bound=0)
    launch.main(
        lambda config, workdir: print(tables.markdown(run(config, workdir, _POLICY.value, _VIDEOS.value))),
        _choose_config,
        reads=lambda: _POLICY.value != "expert",
    )
