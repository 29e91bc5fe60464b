"""Fine-tunes each task's policy by PPO entirely inside the frozen world model: no step of the environment.

python -m experiments.finetune_policy --config=experiments/configs/quickstart.py --workdir=runs/quickstart
"""

import contextlib
import functools

import jax
import numpy as np

from experiments import launch, train_policy, train_reward, train_world_model
from wam_jax import imagination, latents, parallel, ppo, reward_rules, specs, training, world_model
from wam_jax.checkpoints import Checkpointer
from wam_jax.diffusion_policy import PolicyParams
from wam_jax.world_model import WorldModel


def run(config, workdir: str) -> None:
    """Runs `ppo.num_iterations` iterations for every task."""
    settings = ppo_settings(config)
    tasks = [task for task in config.tasks if training.steps_done(workdir, stage(task)) < settings.num_iterations]
    if not tasks:
        return
    devices = parallel.local_devices(config.num_devices)
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
    demonstrations = train_policy.encode_demonstrations(config, workdir)
    inputs = {
        task: imagination.ImaginationInputs(
            start=latents.start_bank(demonstrations[task][0], settings.max_start_step),
            world_model_params=world_model_params,
            reward_params=train_reward.load(config, workdir, task),
            base_policy_params=train_policy.load(config, workdir, task),
        )
        for task in tasks  # before the first is trained: what is missing is named at once
    }
    arguments = {
        "workdir": workdir,
        "settings": settings.to_dict(),
        "num_steps": settings.num_iterations,
        "updates_per_call": settings.updates_per_call,
        "save_every": settings.save_every,
        "devices": devices,
    }
    for group in groups(tasks, inputs, workdir, settings.tasks_at_once):
        banks, stages = [inputs[task] for task in group], [stage(task) for task in group]
        states = [initial_state(config, task, inputs[task].base_policy_params) for task in group]
        seeds = [config.seed + specs.task_index(task) for task in group]
        if len(group) == 1:
            bank = training.repeat(parallel.replicate(banks[0], devices))
            training.fit(one, states[0], bank, stage=stages[0], seed=seeds[0], **arguments)
        else:
            bank = training.repeat(parallel.replicate(imagination.stack_tasks(banks), devices))
            state = jax.tree.map(lambda *x: np.stack(x), *states)
            training.fit_together(together, state, bank, stages=stages, seed=np.array(seeds, np.int32), **arguments)


def groups(tasks: list[str], inputs: dict, workdir: str, size: int) -> list[list[str]]:
    """Up to `size` tasks each that can be one program: at the same iteration, with start banks of the same size."""
    alike: dict[tuple, list[str]] = {}
    for task in tasks:
        key = training.steps_done(workdir, stage(task)), len(inputs[task].start.deterministic)
        alike.setdefault(key, []).append(task)
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
        horizon=config.evaluation.max_steps // config.policy.chunk,
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
    return ppo.init(rng, base_policy_params, world_model.feature_dim(config.world_model), ppo_settings(config))


def load(config, workdir: str, task: str) -> PolicyParams:
    """The fine-tuned policy of a task: the cloned one for the first denoising steps, PPO's for the last."""
    base = train_policy.load(config, workdir, task)
    template = jax.eval_shape(functools.partial(initial_state, config, task), base)
    state = training.load_finished(
        template, stage=stage(task), workdir=workdir, settings=ppo_settings(config).to_dict(),
        num_steps=config.ppo.num_iterations, binary="finetune_policy",
    )  # fmt: skip
    return PolicyParams(base=base, finetuned=state.params.actor)


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
    return PolicyParams(base=base, finetuned=state.params.actor)


if __name__ == "__main__":
    launch.main(run, trains=True)
