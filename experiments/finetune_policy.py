"""Fine-tunes each task's policy by PPO, by default inside the frozen world model, without a step of the environment.

python -m experiments.finetune_policy --config=experiments/configs/quickstart.py --workdir=runs/quickstart

With --config.ppo.rollouts=environment the same PPO learns from rollouts of the environment instead (DPPO's setting).
"""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import launch, simulators, train_policy, train_reward, train_world_model
from wam_jax import (
    environment_rollouts,
    imagination,
    json_files,
    latents,
    parallel,
    ppo,
    reward_rules,
    specs,
    training,
    trust,
    world_model,
)
from wam_jax.checkpoints import Checkpointer
from wam_jax.diffusion_policy import PolicyParams
from wam_jax.environments.interface import Environment
from wam_jax.types import LatentState, Params, StepBatch
from wam_jax.world_model import WorldModel

_init = jax.jit(ppo.init, static_argnums=(2, 3))  # one program, not one for each operation
_COLLECTION = 1_000_000  # folded into a step's key, far from any device's number


def run(config, workdir: str) -> None:
    """Runs `ppo.num_iterations` iterations for every task."""
    settings = ppo_settings(config)
    tasks = [task for task in config.tasks if training.steps_done(workdir, stage(task)) < settings.num_iterations]
    if not tasks:
        return
    devices = parallel.local_devices(config.num_devices)
    base_policies = {task: train_policy.load(config, workdir, task) for task in tasks}
    train = _in_environment if settings.rollouts == "environment" else _in_imagination
    arguments = {
        "workdir": workdir,
        "settings": settings.to_dict(),
        "num_steps": settings.num_iterations,
        "updates_per_call": settings.updates_per_call,
        "save_every": settings.save_every,
        "keep_checkpoints": settings.keep_checkpoints,
        "devices": devices,
    }
    train(config, workdir, base_policies, settings=settings, arguments=arguments)


def _in_imagination(config, workdir: str, base_policies: dict[str, Params], *, settings, arguments: dict) -> None:
    devices = arguments["devices"]
    model, world_model_params = train_world_model.load(config, workdir)
    update = functools.partial(
        ppo.iteration,
        **imagination_functions(config, model),
        policy_settings=train_policy.policy_settings(config),
        settings=settings,
        axis_name=parallel.AXIS_NAME,
    )
    several = jax.vmap(update, in_axes=(0, imagination.TASK_AXES, 0))
    one, together = (
        parallel.compile_updates(x, devices, num_updates=settings.updates_per_call) for x in (update, several)
    )
    rewards = {task: train_reward.load(config, workdir, task) for task in base_policies}  # what is missing is named now
    frozen = world_model.imagination_params(model, world_model_params)
    banks = _trusted_starts(config, workdir, rewards)
    inputs = {
        task: imagination.ImaginationInputs(*starts, frozen, rewards[task], base_policies[task])
        for task, starts in zip(banks, latents.pad_start_banks(list(banks.values())), strict=True)
    }
    for task in base_policies.keys() - inputs.keys():
        print(
            f"{task}: imagination is not trusted, the cloned policy stays (ppo.min_trust; ppo/trust.json)", flush=True
        )
        state = initial_state(config, task, base_policies[task])
        training.save_untrained(
            state, stage=stage(task), **{key: arguments[key] for key in ("workdir", "settings", "num_steps")}
        )
    for group in groups(list(inputs), workdir, settings.tasks_at_once):
        own, stages = [inputs[task] for task in group], [stage(task) for task in group]
        states = [initial_state(config, task, base_policies[task]) for task in group]
        seeds = [config.seed + specs.task_index(task) for task in group]
        if len(group) == 1:
            bank = training.repeat(parallel.replicate(own[0], devices))
            training.fit(one, states[0], bank, stage=stages[0], seed=seeds[0], **arguments)
        else:
            bank = training.repeat(parallel.replicate(imagination.stack_tasks(own), devices))
            state = jax.tree.map(lambda *x: np.stack(x), *states)
            training.fit_together(together, state, bank, stages=stages, seed=np.array(seeds, np.int32), **arguments)


def _in_environment(config, workdir: str, base_policies: dict[str, Params], *, settings, arguments: dict) -> None:
    devices = arguments["devices"]
    environment = simulators.make(config, random_starts=True)  # given ones are the evaluation's
    updates = environment_updates(config, environment, *train_world_model.load(config, workdir), devices)
    for task, base in base_policies.items():
        bank = training.repeat(parallel.replicate(jax.tree.map(lambda x: x[None], base), devices))
        state, seed = initial_state(config, task, base), config.seed + specs.task_index(task)
        training.fit(functools.partial(updates, task), state, bank, stage=stage(task), seed=seed, **arguments)


def environment_updates(
    config, environment: Environment, model: WorldModel, world_model_params: Params, devices: list[jax.Device]
) -> Callable:
    """Iterations of PPO on rollouts of an environment: collected on the host, learned from in one compiled call.

    Returns:
      `run(task, state, base_policy_params, seed, step) -> (state, metrics)`: for a task, what `training.fit` runs;
      the base policy's leaves are [D, 1, ...].
    """
    settings = ppo_settings(config)
    static = {"policy_settings": train_policy.policy_settings(config), "settings": settings}

    def update(state, batch, rng):
        state, metrics = ppo.learn(state, *batch, rng, **static, axis_name=parallel.AXIS_NAME)
        return state, {"environment_success": metrics.pop("success"), **metrics}

    learn = parallel.compile_updates(update, devices)
    collect = functools.partial(
        environment_rollouts.collect, environment, num_rollouts=settings.num_rollouts * len(devices), model=model,
        world_model_params=world_model_params, **static,
    )  # fmt: skip

    def run(task, state, base_policy_params, seed, step):
        base = jax.tree.map(lambda x: x[0], parallel.unreplicate(base_policy_params))
        policy = PolicyParams(base=base, finetuned=parallel.unreplicate(state.params.actor))
        rng = jax.random.fold_in(parallel.step_rng(seed, step, None), _COLLECTION)
        episodes = environment_rollouts.split(collect(policy, task, rng), len(devices))
        batch = jax.tree.map(lambda x: x[:, None], episodes)  # one update a call
        return learn(state, (parallel.shard(batch, devices), base_policy_params), seed, step)

    return run


def start_bank(config, workdir: str, task: str, reward_params: Params) -> tuple[LatentState | None, dict[str, Any]]:
    """The latents that imagination starts from, of demonstrations or of play's attempts at the task, or both.

    With `ppo.min_trust` above 0 only those from which imagination, under the recorded actions, comes to the recorded
    end; none at all where it does so for a smaller share than that of the successes, or of the failures.

    Returns:
      the bank, None where imagination is not trusted; and the figures of `trust.agreement` with the verdict `trusted`,
      {} where nothing is judged.

    Raises:
      ValueError: there is no recorded attempt.
    """
    settings = config.ppo
    encoded: list[LatentState] = []
    episodes: list[StepBatch] = []
    if settings.starts in ("demonstrations", "both"):
        _extend(encoded, episodes, train_policy.encode_demonstrations(config, workdir)[task])
    if settings.starts in ("play", "both"):
        _extend(encoded, episodes, train_reward.encode_attempts(config, workdir, "train", [task])[task])
    if not encoded:
        raise ValueError(
            f"config.ppo.starts={settings.starts!r}, but {launch.play_directory(config, workdir)} holds no annotated "
            f"attempt at {task}; take --config.ppo.starts=demonstrations"
        )
    first, last = settings.min_start_step, settings.max_start_step
    if not settings.min_trust:
        return latents.start_bank(encoded, first, last), {}
    model, params = train_world_model.load(config, workdir)
    bank, verdicts = trust.start_bank(
        model, params, encoded, episodes, jax.random.key(config.seed), first, last,
        reward_rule=imagination_functions(config, model)["reward_rule"], reward_params=reward_params,
        policy_settings=train_policy.policy_settings(config),
    )  # fmt: skip
    figures = trust.agreement(verdicts)
    trusted = figures["trust"] >= settings.min_trust
    return bank if trusted else None, {"trusted": trusted, **figures}


def _trusted_starts(config, workdir: str, rewards: dict[str, Params]) -> dict[str, LatentState]:
    """The banks of the tasks whose imagination is trusted; `ppo/trust.json` gets the figures of all that are judged."""
    banks = {}
    for task, reward_params in rewards.items():
        bank, figures = start_bank(config, workdir, task, reward_params)
        if figures and parallel.is_first_process():
            json_files.write(_trust_path(workdir), {**read_trust(workdir), task: figures})
        if bank is not None:
            banks[task] = bank
    return banks


def read_trust(workdir: str) -> dict[str, Any]:
    """Of each task that was judged the figures of `start_bank`; {} where none was."""
    path = _trust_path(workdir)
    return json_files.read(path, "delete it; the same command writes it again", dict) if os.path.exists(path) else {}


def keeps_cloned(config, workdir: str, task: str) -> bool:
    """Whether a task's fine-tuned policy is the cloned one, because imagination is not trusted.

    Raises:
      ValueError: nothing says so.
    """
    if not config.ppo.min_trust:
        return False
    verdicts = read_trust(workdir)
    if "trusted" not in verdicts.get(task, {}):
        raise ValueError(
            f"{_trust_path(workdir)} has no verdict on {task}, though config.ppo.min_trust={config.ppo.min_trust}; "
            f"delete {workdir}/{stage(task)} and run experiments.finetune_policy again"
        )
    return not verdicts[task]["trusted"]


def _trust_path(workdir: str) -> str:
    return os.path.join(workdir, "ppo", "trust.json")


def _extend(encoded: list, episodes: list, more: tuple[list[LatentState], list[StepBatch]]) -> None:
    encoded += more[0]
    episodes += more[1]


def groups(tasks: list[str], workdir: str, size: int) -> list[list[str]]:
    """Up to `size` tasks each that can be one program: at the same iteration.

    A run that was killed between the saves of a group left some tasks a checkpoint ahead: they go back to the others.
    """
    starts = {task: training.starts(workdir, stage(task)) for task in tasks}
    newest = {steps[-1] for steps in starts.values()}
    alike: dict[int, list[str]] = {}
    for task in tasks:
        alike.setdefault(min(newest.intersection(starts[task])), []).append(task)
    return [same[i : i + size] for same in alike.values() for i in range(0, len(same), size)]


def stage(task: str) -> str:
    """Name of the stage, and the folder of its checkpoints in the workdir."""
    return f"ppo/{task}"


def ppo_settings(config):
    """`config.ppo` with what follows from the rest: the share of a device, and the horizon in decisions."""
    num_devices = parallel.device_count(config.num_devices)
    return launch.stage_settings(
        config.ppo,
        num_rollouts=config.ppo.num_rollouts // num_devices,
        batch_size=max(1, config.ppo.batch_size // num_devices),
        horizon=(config.ppo.max_steps or config.evaluation.max_steps) // config.policy.chunk,
    )


def imagination_functions(config, model: WorldModel) -> dict:
    """The learned environment's dynamics and reward, as imagination.py asks for them."""
    return {
        "imagine_step": functools.partial(world_model.imagine_step, model),
        "reward_rule": functools.partial(reward_rules.in_a_row, **train_reward.rule(config, model)),
    }


def initial_state(config, task: str, base_policy_params) -> ppo.PPOState:
    """PPO before its first iteration: the actor is the cloned policy."""
    rng = jax.random.fold_in(jax.random.key(config.seed), specs.task_index(task))
    return _init(rng, base_policy_params, world_model.feature_dim(config.world_model), ppo_settings(config))


def load(config, workdir: str, task: str) -> PolicyParams:
    """The fine-tuned policy of a task: the cloned one for the first denoising steps, PPO's average for the last."""
    base = train_policy.load(config, workdir, task)
    template = jax.eval_shape(functools.partial(initial_state, config, task), base)
    state = training.load_finished(
        template, stage=stage(task), workdir=workdir, settings=ppo_settings(config).to_dict(),
        num_steps=config.ppo.num_iterations, binary="finetune_policy",
    )  # fmt: skip
    return PolicyParams(base=base, finetuned=state.ema_actor)


def saved_iterations(workdir: str, task: str) -> list[int]:
    """The iterations of a task's checkpoints, finished or not; none before its first."""
    if not training.steps_done(workdir, stage(task)):
        return []
    with contextlib.closing(Checkpointer(f"{workdir}/{stage(task)}")) as checkpointer:
        return checkpointer.steps()


def load_iteration(config, workdir: str, task: str, iteration: int) -> PolicyParams:
    """The policy of one of `saved_iterations`.

    Raises:
      ValueError: that checkpoint is damaged or of another size.
    """
    base = train_policy.load(config, workdir, task)
    template = jax.eval_shape(functools.partial(initial_state, config, task), base)
    with contextlib.closing(Checkpointer(f"{workdir}/{stage(task)}")) as checkpointer:
        state = checkpointer.restore(template, ppo_settings(config).to_dict(), step=iteration)
    return PolicyParams(base=base, finetuned=state.ema_actor)


if __name__ == "__main__":
    launch.main(run, trains=True)
