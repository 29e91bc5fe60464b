"""Inputs of the benchmark's workloads: noise of the right shapes, untrained networks, a dataset of random pictures."""

import atexit
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from experiments import train_reward, train_world_model
from experiments.config_values import changed
from wam_jax import prior_ensemble, reward_rules, rlds, shards, specs
from wam_jax import world_model as world_model_lib
from wam_jax.types import LatentState, Observation, Params, StepBatch
from wam_jax.world_model import WorldModel

NUM_EPISODES, EPISODE_STEPS = 16, 200  # of the dataset


def steps(shape: tuple[int, ...]) -> StepBatch:
    """Steps of noise, [*shape, ...]; numpy."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, *shape, specs.IMAGE_SIZE, specs.IMAGE_SIZE, 3), np.uint8)
    robot_obs = rng.normal(size=(*shape, specs.ROBOT_OBS_DIM)).astype(np.float32)
    scene_obs = rng.normal(size=(*shape, specs.SCENE_OBS_DIM)).astype(np.float32)
    return StepBatch(
        observation=Observation(images[0], images[1], robot_obs, scene_obs),
        action=rng.uniform(-1, 1, (*shape, specs.ACTION_DIM)).astype(np.float32),
        is_first=np.zeros(shape, bool),
        is_last=np.zeros(shape, bool),
        task=np.full(shape, -1, np.int32),
        reward=np.zeros(shape, np.float32),
    )


@functools.cache
def dataset() -> str:
    """Shards of pictures of random 4 x 4 squares; gone with the process."""
    folder = tempfile.TemporaryDirectory(prefix="benchmark_")
    atexit.register(folder.cleanup)
    rng, spec = (
        np.random.default_rng(0),
        rlds.DatasetSpec("benchmark", (specs.IMAGE_SIZE,) * 2, (specs.IMAGE_SIZE,) * 2),
    )
    shards.start_dataset(folder.name, {})

    def episode(index: int) -> rlds.Episode:
        noise = steps((EPISODE_STEPS,))
        coarse = rng.integers(0, 256, (2, EPISODE_STEPS, 16, 16, 3), np.uint8).repeat(4, axis=2).repeat(4, axis=3)
        observation = noise.observation.replace(rgb_static=coarse[0], rgb_gripper=coarse[1])
        position = np.arange(EPISODE_STEPS)
        ends = {"is_first": position == 0, "is_last": position == EPISODE_STEPS - 1}
        return rlds.Episode(noise.replace(observation=observation, **ends), "made up", str(index))

    lengths = shards.write_shard(folder.name, spec, "train", 0, 1, map(episode, range(NUM_EPISODES)))
    shards.finish_dataset(folder.name, spec, {"train": [lengths]})
    return folder.name


def uniform(shape: tuple[int, ...]) -> np.ndarray:
    """Actions and the like, in [-1, 1]: float32 [*shape]."""
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def latents(config: FrozenConfigDict, count: int) -> LatentState:
    """States of the config's world model, [count, ...], h in its compute dtype as `observe` leaves it; numpy."""
    settings, rng = config.world_model, np.random.default_rng(2)
    logits = rng.normal(size=(count, settings.num_latents, settings.num_classes)).astype(np.float32)
    deterministic = rng.uniform(-1, 1, (count, settings.deterministic_dim)).astype(jnp.dtype(settings.compute_dtype))
    stochastic = (logits == logits.max(-1, keepdims=True)).astype(np.float32)
    robot = uniform((count, specs.PROPRIOCEPTION_DIM)) if settings.robot_state else None
    return LatentState(deterministic, logits, stochastic, robot)


def world_model(config: FrozenConfigDict) -> tuple[WorldModel, Params]:
    """A world model before training."""
    alike = changed(config, "world_model", compute_dtype="float32", batch_size=1, window_length=1)  # to its parameters
    return world_model_lib.build(config.world_model), _world_model_params(alike.world_model)


@functools.lru_cache(maxsize=2)  # a program of its own, as slow to compile on a GPU as some of the workloads
def _world_model_params(settings: FrozenConfigDict) -> Params:
    return jax.jit(functools.partial(world_model_lib.init, world_model_lib.build(settings)))(jax.random.key(0))


def frozen_world_model(config: FrozenConfigDict) -> tuple[WorldModel, Params]:
    """The same as later stages load it: with the ensemble that it imagines with, where the config has one."""
    plain = world_model(config)
    return train_world_model.with_ensemble(*plain, *_ensemble(config)) if train_world_model.imagines(config) else plain


@functools.lru_cache(maxsize=1)
def _ensemble(config: FrozenConfigDict) -> tuple[prior_ensemble.PriorEnsemble, Params]:
    ensemble = train_world_model.build_ensemble(config)
    return ensemble, jax.jit(functools.partial(prior_ensemble.init, ensemble))(jax.random.key(0)).params


def reward_params(config: FrozenConfigDict, world_model_params: Params) -> Params:
    """What the reward rule of the config's first task reads, of untrained networks."""
    task = config.tasks[0]
    if config.reward.kind == "scene":
        return reward_rules.scene_params(world_model_params, task)
    classifier = train_reward.initial_state(config, task).params
    if not config.reward.disagreement_quantile:
        return classifier
    return reward_rules.agreement_params(classifier, _ensemble(config)[1], max_disagreement=1.0)
