"""Clones a policy, diffusion or Gaussian, for each task from demonstrations, on the latents of the frozen world model.

python -m experiments.train_policy --config=experiments/configs/quickstart.py --workdir=runs/quickstart
"""

import functools

import jax

from experiments import launch, train_world_model
from wam_jax import datasets, diffusion_policy, latents, parallel, specs, training, world_model
from wam_jax.types import LatentState, Params, StepBatch

_init = jax.jit(diffusion_policy.init, static_argnums=(1, 2))  # one program, not one for each operation


def run(config, workdir: str) -> None:
    """Trains the policy of every task to `policy.num_steps`."""
    settings = policy_settings(config)
    tasks = [task for task in config.tasks if training.steps_done(workdir, stage(task)) < settings.num_steps]
    if not tasks:
        return
    devices = parallel.local_devices(config.num_devices)
    update = functools.partial(diffusion_policy.update_from_bank, settings=settings, axis_name=parallel.AXIS_NAME)
    compiled = parallel.compile_updates(update, devices, num_updates=settings.updates_per_call)
    encoded = encode_demonstrations(config, workdir)
    banks = latents.pad_policy_banks([latents.policy_bank(*encoded[task], settings.chunk) for task in tasks])
    for task, bank in zip(tasks, banks, strict=True):
        demonstrated = latents.latent_at(bank.rows.latent, slice(0, int(bank.num_rows)))
        training.fit(
            compiled,
            diffusion_policy.set_statistics(initial_state(config, task), demonstrated, settings=settings),
            training.repeat(parallel.replicate(bank, devices)),
            stage=stage(task),
            workdir=workdir,
            settings=settings.to_dict(),
            seed=config.seed + specs.task_index(task),
            num_steps=settings.num_steps,
            updates_per_call=settings.updates_per_call,
            save_every=settings.save_every,
            devices=devices,
        )


def stage(task: str) -> str:
    """Name of the stage, and the folder of its checkpoints in the workdir."""
    return f"policy/{task}"


def policy_settings(config):
    """`config.policy` with what follows from it: a device's share of a batch, the decay's length, a Gaussian's step."""
    batch_size = config.policy.batch_size // parallel.device_count(config.num_devices)
    steps = {"denoising_steps": 1, "finetuned_steps": 1} if config.policy.kind == "gaussian" else {}
    return launch.stage_settings(config.policy, batch_size=batch_size, decay_steps=config.policy.num_steps, **steps)


def initial_state(config, task: str) -> diffusion_policy.PolicyState:
    """The policy before training."""
    rng = jax.random.fold_in(jax.random.key(config.seed), specs.task_index(task))
    return _init(rng, world_model.feature_dim(config.world_model), policy_settings(config))


@functools.lru_cache(maxsize=1)  # policy, reward and PPO of one run read the same
def encode_demonstrations(config, workdir: str) -> dict[str, tuple[list[LatentState], list[StepBatch]]]:
    """The demonstrations of each task and their latents under the workdir's world model."""
    model, params = train_world_model.load(config, workdir)
    directory = launch.demonstration_directory(config, workdir)
    episodes = datasets.read_episodes(directory)
    encoded = {}
    for task in config.tasks:
        chosen = [episode for episode in episodes if episode.task[0] == specs.task_index(task)]
        chosen = chosen[: config.dataset.demonstrations_per_task]  # a dataset may hold more
        if not chosen:
            raise ValueError(f"{directory} holds no demonstration of {task}; collect some, or leave the task out")
        rng = jax.random.fold_in(jax.random.key(config.seed), specs.task_index(task))
        encoded[task] = latents.encode_episodes(model, params, chosen, rng), chosen
    return encoded


def load(config, workdir: str, task: str) -> Params:
    """The cloned policy of a task: the moving average of its parameters."""
    template = jax.eval_shape(functools.partial(initial_state, config, task))
    return training.load_finished(
        template, stage=stage(task), workdir=workdir, settings=policy_settings(config).to_dict(),
        num_steps=config.policy.num_steps, binary="train_policy",
    ).ema_params  # fmt: skip


if __name__ == "__main__":
    launch.main(run, trains=True)
