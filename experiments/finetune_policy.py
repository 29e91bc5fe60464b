"""Fine-tunes each task's policy by PPO entirely inside the frozen world model: no step of the environment.

python -m experiments.finetune_policy --config=experiments/configs/quickstart.py --workdir=runs/quickstart
"""

import functools

import jax

from experiments import launch, train_policy, train_reward, train_world_model
from wam_jax import imagination, latents, parallel, ppo, specs, success_classifier, training, world_model
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
    compiled = parallel.compile_updates(update, devices, num_updates=settings.updates_per_call)
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
    for task in tasks:
        training.fit(
            compiled,
            initial_state(config, task, inputs[task].base_policy_params),
            training.repeat(parallel.replicate(inputs[task], devices)),
            stage=stage(task),
            workdir=workdir,
            settings=settings.to_dict(),
            seed=config.seed + specs.task_index(task),
            num_steps=settings.num_iterations,
            updates_per_call=settings.updates_per_call,
            save_every=settings.save_every,
            devices=devices,
        )


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
        "reward_rule": functools.partial(success_classifier.reward_rule, settings=train_reward.reward_settings(config)),
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


if __name__ == "__main__":
    launch.main(run, trains=True)
