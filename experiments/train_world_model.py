"""Trains the world model on play: WAM with `action_weight` 1000, the DreamerV2 baseline with 0.

With `prior_ensemble.num_members` above 0 that many priors are fitted anew to it afterwards (prior_ensemble.py).

python -m experiments.train_world_model --config=experiments/configs/quickstart.py --workdir=runs/quickstart
"""

import dataclasses
import functools

import jax
from tqdm import tqdm

from experiments import launch
from wam_jax import (
    datasets,
    input_pipeline,
    latents,
    parallel,
    prior_ensemble,
    training,
    world_model,
    world_model_training,
)
from wam_jax.prior_ensemble import PriorEnsemble
from wam_jax.types import Params
from wam_jax.world_model import WorldModel

STAGE = "world_model"
ENSEMBLE_STAGE = "prior_ensemble"


def run(config, workdir: str) -> None:
    """Trains to `world_model.num_steps`, from the newest checkpoint where there is one; then the ensemble, likewise."""
    _train(config, workdir)
    if config.prior_ensemble.num_members:
        _train_ensemble(config, workdir)


def _train(config, workdir: str) -> None:
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


def _train_ensemble(config, workdir: str) -> None:
    ensemble = build_ensemble(config)
    settings = ensemble.settings
    if training.steps_done(workdir, ENSEMBLE_STAGE) >= settings.num_steps:
        return
    devices = parallel.local_devices(config.num_devices)
    update = functools.partial(prior_ensemble.update_from_bank, ensemble=ensemble, axis_name=parallel.AXIS_NAME)
    training.fit(
        parallel.compile_updates(update, devices, num_updates=settings.updates_per_call),
        jax.jit(functools.partial(prior_ensemble.init, ensemble))(jax.random.key(config.seed)),
        training.repeat(parallel.replicate(_filtered_play(config, workdir), devices)),
        stage=ENSEMBLE_STAGE,
        workdir=workdir,
        settings=settings.to_dict(),
        seed=config.seed,
        num_steps=settings.num_steps,
        updates_per_call=settings.updates_per_call,
        save_every=settings.save_every,
        devices=devices,
    )


def build_ensemble(config) -> PriorEnsemble:
    """The ensemble's module and settings, a device's share of the batch among them."""
    batch_size = config.prior_ensemble.batch_size // parallel.device_count(config.num_devices)
    return prior_ensemble.build(launch.stage_settings(config.prior_ensemble, batch_size=batch_size), config.world_model)


def _filtered_play(config, workdir: str) -> prior_ensemble.PriorBatch:
    model, params = _load_trained(config, workdir)
    settings, rng = config.prior_ensemble, jax.random.key(config.seed)
    windows = datasets.read_windows(
        launch.play_directory(config, workdir), "train", settings.window_length, settings.num_windows
    )
    windows = tqdm(windows, desc="filtering play", unit="batch", leave=False, disable=None)
    encode = latents.encoder(model)
    return prior_ensemble.bank(encode(params, x, jax.random.fold_in(rng, i)) for i, x in enumerate(windows))


@functools.lru_cache(maxsize=1)
def _load_trained(config, workdir: str) -> tuple[WorldModel, Params]:
    model = world_model.build(config.world_model)
    template = jax.eval_shape(functools.partial(world_model_training.create_state, model), jax.random.key(0))
    state = training.load_finished(
        template, stage=STAGE, workdir=workdir, settings=config.world_model.to_dict(),
        num_steps=config.world_model.num_steps, binary="train_world_model",
    )  # fmt: skip
    return model, state.params


@functools.lru_cache(maxsize=1)  # frozen from now on: one copy serves all stages of a run
def load(config, workdir: str) -> tuple[WorldModel, Params]:
    """Loads the frozen world model that later stages build on, with the ensemble that it imagines with, if it does.

    Raises:
      ValueError: there is none yet, it is not trained to the end, or it is of another size than the config says.
    """
    model, params = _load_trained(config, workdir)
    return with_ensemble(model, params, *load_ensemble(config, workdir)) if imagines(config) else (model, params)


def imagines(config) -> bool:
    """Whether imagination draws from the ensemble."""
    return bool(config.prior_ensemble.num_members and config.prior_ensemble.imagine)


def with_ensemble(
    model: WorldModel, params: Params, ensemble: PriorEnsemble, ensemble_params: Params
) -> tuple[WorldModel, Params]:
    """A world model that imagines with an ensemble."""
    return dataclasses.replace(model, prior_ensemble=ensemble), {**params, "prior_ensemble": ensemble_params}


@functools.lru_cache(maxsize=1)
def load_ensemble(config, workdir: str) -> tuple[PriorEnsemble, Params]:
    """Loads the priors that were fitted to the world model afterwards.

    Raises:
      ValueError: as `load`.
    """
    ensemble = build_ensemble(config)
    template = jax.eval_shape(functools.partial(prior_ensemble.init, ensemble), jax.random.key(0))
    state = training.load_finished(
        template, stage=ENSEMBLE_STAGE, workdir=workdir, settings=ensemble.settings.to_dict(),
        num_steps=config.prior_ensemble.num_steps, binary="train_world_model",
    )  # fmt: skip
    return ensemble, state.params


if __name__ == "__main__":
    launch.main(run, trains=True)
