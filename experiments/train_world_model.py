"""Trains the world model on play: WAM with `action_weight` 1000, the DreamerV2 baseline with 0.

python -m experiments.train_world_model --config=experiments/configs/quickstart.py --workdir=runs/quickstart
"""

import functools

import jax

from experiments import launch
from wam_jax import datasets, input_pipeline, parallel, training, world_model, world_model_training
from wam_jax.types import Params
from wam_jax.world_model import WorldModel

STAGE = "world_model"


def run(config, workdir: str) -> None:
    """Trains to `world_model.num_steps`, from the newest checkpoint where there is one."""
    settings = config.world_model
    if training.steps_done(workdir, STAGE) >= settings.num_steps:
        return
    play_directory = launch.play_directory(config, workdir)
    datasets.open_builder(play_directory, "train")  # a missing one is named before anything is built
    devices = parallel.local_devices(config.num_devices)
    model = world_model.build(settings)
    update = functools.partial(world_model_training.update, model=model, axis_name=parallel.AXIS_NAME)

    def make_batches(first_step: int):
        return input_pipeline.make_batches(
            play_directory,
            "train",
            settings.batch_size,
            settings.window_length,
            config.seed,
            start_step=first_step,
            num_devices=len(devices),
            updates_per_dispatch=settings.updates_per_call,
            cache=config.dataset.cache,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    take = functools.partial(input_pipeline.take_windows, length=settings.window_length, axis_name=parallel.AXIS_NAME)
    training.fit(
        parallel.compile_updates(update, devices, take=take if config.dataset.cache == "device" else None),
        jax.jit(functools.partial(world_model_training.create_state, model))(jax.random.key(config.seed)),
        make_batches,
        stage=STAGE,
        workdir=workdir,
        settings=settings.to_dict(),
        seed=config.seed,
        num_steps=settings.num_steps,
        updates_per_call=settings.updates_per_call,
        save_every=settings.save_every,
        devices=devices,
    )


@functools.lru_cache(maxsize=1)  # frozen from now on: one copy serves all stages of a run
def load(config, workdir: str) -> tuple[WorldModel, Params]:
    """Loads the frozen world model that later stages build on.

    Raises:
      ValueError: there is none yet, it is not trained to the end, or it is of another size than the config says.
    """
    model = world_model.build(config.world_model)
    template = jax.eval_shape(functools.partial(world_model_training.create_state, model), jax.random.key(0))
    state = training.load_finished(
        template, stage=STAGE, workdir=workdir, settings=config.world_model.to_dict(),
        num_steps=config.world_model.num_steps, binary="train_world_model",
    )  # fmt: skip
    return model, state.params


if __name__ == "__main__":
    launch.main(run, trains=True)
