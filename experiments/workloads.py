"""What `benchmark` measures: each stage's own compiled program on made-up inputs of a config's sizes."""

import atexit
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from experiments import finetune_policy, train_policy, train_reward
from experiments.configs import quickstart
from wam_jax import (
    diffusion_policy,
    flops,
    input_pipeline,
    parallel,
    ppo,
    rlds,
    shards,
    specs,
    success_classifier,
    world_model,
)
from wam_jax.diffusion_policy import PolicyBank, PolicyBatch
from wam_jax.environments.playtable import dynamics, environment, starts
from wam_jax.imagination import ImaginationInputs
from wam_jax.types import LatentState, Observation, StepBatch

WINDOWS = ((4, 50), (10, 50), (50, 50))  # windows and steps of a world-model update
NUM_LATENTS, IMAGINED_STEPS = 50, 18 * 4  # of one PPO iteration
NUM_TABLES, NUM_TABLE_STEPS = 64, 50
NUM_FED_UPDATES = 2  # for which a batch of the input pipeline is
NUM_EPISODES, EPISODE_STEPS = 16, 200  # of the dataset that it reads
NUM_FRAMES = 29  # that a policy sees at once: the episodes of a task


@dataclasses.dataclass(frozen=True)
class Workload:
    """A program and its arguments."""

    name: str
    dtype: str  # that it computes in
    batch: int  # over all devices
    length: int  # steps of each of the batch; 1 where there are none
    devices: int
    items: int  # a call works on
    unit: str  # of the items
    program: Any  # jitted or pmapped; None: the feed alone
    arguments: tuple
    feed: Iterator[Any] | None = None  # its next item is what a call gets
    variant: str = ""  # of the same name: where an input pipeline's data lie
    carried: bool = False  # whether a call's first result is the next one's first argument, whose memory it takes
    flops: int = 0  # matrix products and convolutions of a call, over all devices


def cases(config: FrozenConfigDict) -> dict[str, Callable[[], Workload]]:
    """What builds each workload, by "NAME/BATCHxLENGTH/DTYPE" or less where there is nothing to tell apart.

    Args:
      config: gives the sizes; its `num_devices` run data parallel, with batches that divide by them.
    """
    devices = len(parallel.local_devices(config.num_devices))
    found: dict[str, Callable[[], Workload]] = {}
    for dtype in ("float32", "bfloat16"):
        sizes = _changed(_changed(config, "world_model", compute_dtype=dtype), "policy", compute_dtype=dtype)
        for batch, length in WINDOWS:
            windows = _changed(sizes, "world_model", batch_size=batch, window_length=length)
            label = f"world_model_update/{batch}x{length}/{dtype}"
            if batch % devices == 0:
                found[label] = functools.partial(world_model_update, windows, "world_model_update")
        for build in (imagination, bc_update, ppo_iteration, encoder):
            found[f"{build.__name__}/{dtype}"] = functools.partial(build, sizes)
    small = quickstart.get_config(config.method)
    small.num_devices = config.num_devices
    if small.world_model.batch_size % devices == 0:
        name = "world_model_update_quickstart"
        found[name] = functools.partial(world_model_update, FrozenConfigDict(small), name)
    for cache in input_pipeline.CACHES:
        found[f"input_pipeline/{cache}"] = functools.partial(window_batches, config, cache)
    return found | {"playtable_step": playtable_step, "playtable_render": playtable_render}


def world_model_update(config: FrozenConfigDict, name: str) -> Workload:
    """One dispatch of updates, as `train_world_model` makes it."""
    settings, devices = config.world_model, parallel.local_devices(config.num_devices)
    model = world_model.build(settings)
    num_updates = 1 if devices[0].platform == "cpu" else settings.updates_per_call
    share = settings.batch_size // len(devices)
    batch = made_up_steps((len(devices), num_updates, share, settings.window_length))
    state = jax.jit(functools.partial(world_model.create_state, model))(jax.random.key(0))
    update = functools.partial(world_model.update, model=model)
    one = jax.tree.map(lambda x: x[0, 0], batch)
    return Workload(
        name=name,
        dtype=settings.compute_dtype,
        batch=settings.batch_size,
        length=settings.window_length,
        devices=len(devices),
        items=num_updates * settings.batch_size * settings.window_length,
        unit="frames",
        program=parallel.compile_updates(functools.partial(update, axis_name=parallel.AXIS_NAME), devices),
        arguments=(parallel.replicate(state, devices), parallel.shard(batch, devices), 0, 0),
        carried=True,
        flops=len(devices) * num_updates * flops.count(update, state, one, jax.random.key(0)),
    )


def imagination(config: FrozenConfigDict) -> Workload:
    """The prior alone: open-loop steps from some latents under given actions."""
    model, params = _world_model(config)
    rng = jax.random.key(0)
    latent = _latents(config, NUM_LATENTS)
    action = _uniform((NUM_LATENTS, IMAGINED_STEPS, specs.ACTION_DIM))
    imagine = functools.partial(world_model.imagine, model)

    def last(params, latent, action, rng):
        return jax.tree.map(lambda x: x[:, -1], imagine(params, latent, action, rng))

    return Workload(
        name="imagination",
        dtype=config.world_model.compute_dtype,
        batch=NUM_LATENTS,
        length=IMAGINED_STEPS,
        devices=1,
        items=NUM_LATENTS * IMAGINED_STEPS,
        unit="latents",
        program=jax.jit(last),
        arguments=(params, latent, action, rng),
        flops=flops.count(last, params, latent, action, rng),
    )


def bc_update(config: FrozenConfigDict) -> Workload:
    """One dispatch of updates of one task's policy, as `train_policy` makes it."""
    devices, settings = parallel.local_devices(config.num_devices), train_policy.policy_settings(config)
    num_updates = 10 if devices[0].platform == "cpu" else settings.updates_per_call
    rows = PolicyBatch(_latents(config, 2048), _uniform((2048, settings.chunk, specs.ACTION_DIM)))
    bank = PolicyBank(rows, np.array(2048, np.int32))
    state = train_policy.initial_state(config, config.tasks[0])
    state = diffusion_policy.set_statistics(state, rows.latent, settings=settings)
    update = functools.partial(diffusion_policy.update_from_bank, settings=settings)
    return Workload(
        name="bc_update",
        dtype=settings.compute_dtype,
        batch=config.policy.batch_size,
        length=1,
        devices=len(devices),
        items=num_updates * config.policy.batch_size,
        unit="samples",
        program=parallel.compile_updates(
            functools.partial(update, axis_name=parallel.AXIS_NAME), devices, num_updates=num_updates
        ),
        arguments=(parallel.replicate(state, devices), parallel.replicate(bank, devices), 0, 0),
        carried=True,
        flops=len(devices) * num_updates * flops.count(update, state, bank, jax.random.key(0)),
    )


def ppo_iteration(config: FrozenConfigDict) -> Workload:
    """One iteration of one task, as `finetune_policy` makes it: rollouts in imagination and all their updates."""
    devices, settings = parallel.local_devices(config.num_devices), finetune_policy.ppo_settings(config)
    model, params = _world_model(config)
    base_policy = train_policy.initial_state(config, config.tasks[0]).params
    reward_settings = train_reward.reward_settings(config)
    inputs = ImaginationInputs(
        start=_latents(config, 64),
        world_model_params=params,
        reward_params=success_classifier.init(
            jax.random.key(2), world_model.feature_dim(config.world_model), reward_settings
        ).params,
        base_policy_params=base_policy,
    )
    state = finetune_policy.initial_state(config, config.tasks[0], base_policy)
    update = functools.partial(
        ppo.iteration,
        **finetune_policy.imagination_functions(config, model),
        policy_settings=train_policy.policy_settings(config),
        settings=settings,
    )
    return Workload(
        name="ppo_iteration",
        dtype=config.world_model.compute_dtype,
        batch=config.ppo.num_rollouts,
        length=settings.horizon,
        devices=len(devices),
        items=1,
        unit="iterations",
        program=parallel.compile_updates(
            functools.partial(update, axis_name=parallel.AXIS_NAME), devices, num_updates=1
        ),
        arguments=(parallel.replicate(state, devices), parallel.replicate(inputs, devices), 0, 0),
        carried=True,
        flops=len(devices) * flops.count(update, state, inputs, jax.random.key(0)),
    )


def encoder(config: FrozenConfigDict) -> Workload:
    """Frames of as many episodes as an evaluation runs at once, embedded and filtered: what a policy waits for."""
    model, params = _world_model(config)
    observation = jax.tree.map(lambda x: x[:, 0], made_up_steps((NUM_FRAMES, 1)).observation)
    arguments = (
        params,
        _latents(config, NUM_FRAMES),
        _uniform((NUM_FRAMES, specs.ACTION_DIM)),
        observation,
        jax.random.key(0),
    )
    step = functools.partial(world_model.observe_step, model)
    return Workload(
        name="encoder",
        dtype=config.world_model.compute_dtype,
        batch=NUM_FRAMES,
        length=1,
        devices=1,
        items=NUM_FRAMES,
        unit="frames",
        program=jax.jit(step),
        arguments=arguments,
        flops=flops.count(step, *arguments),
    )


def playtable_step() -> Workload:
    """Control steps of many tables side by side."""

    def run(state, actions):
        def step(state, action):
            return jax.vmap(dynamics.step)(state, action), None

        return jax.lax.scan(step, state, actions)[0]

    return Workload(
        name="playtable_step",
        dtype="float32",
        batch=NUM_TABLES,
        length=NUM_TABLE_STEPS,
        devices=1,
        items=NUM_TABLES * NUM_TABLE_STEPS,
        unit="steps",
        program=jax.jit(run),
        arguments=(_tables(), _uniform((NUM_TABLE_STEPS, NUM_TABLES, specs.ACTION_DIM))),
    )


def playtable_render() -> Workload:
    """Both cameras of many tables."""
    return Workload(
        name="playtable_render",
        dtype="float32",
        batch=NUM_TABLES,
        length=1,
        devices=1,
        items=NUM_TABLES,
        unit="frames",
        program=jax.jit(jax.vmap(environment.observe)),
        arguments=(_tables(),),
    )


def window_batches(config: FrozenConfigDict, cache: str) -> Workload:
    """The input pipeline alone: batches of windows on the devices; with "device" what cuts them out there."""
    devices, settings = parallel.local_devices(config.num_devices), config.world_model
    share = settings.batch_size // len(devices) * len(devices)
    batches = input_pipeline.make_batches(
        _made_up_dataset(), "train", share, settings.window_length, 0,
        num_devices=len(devices), updates_per_dispatch=NUM_FED_UPDATES, cache=cache,
    )  # fmt: skip
    cut = functools.partial(input_pipeline.take_windows, length=settings.window_length, axis_name=parallel.AXIS_NAME)
    resident = cache == "device"
    return Workload(
        name="input_pipeline",
        variant=cache,
        dtype="uint8",
        batch=share,
        length=settings.window_length,
        devices=len(devices),
        items=NUM_FED_UPDATES * share * settings.window_length,
        unit="frames",
        program=parallel.compile_updates(lambda state, batch, rng: (state, batch), devices, take=cut)
        if resident
        else None,
        arguments=(parallel.replicate(np.zeros(()), devices), next(batches), 0, 0) if resident else (),
        feed=None if resident else batches,
        carried=resident,
    )


# --- Inputs ---


def made_up_steps(shape: tuple[int, ...]) -> StepBatch:
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
def _made_up_dataset() -> str:
    """Shards of smooth random pictures, which compress about as those of a simulator; gone with the process."""
    folder = tempfile.TemporaryDirectory(prefix="benchmark_")
    atexit.register(folder.cleanup)
    rng, spec = (
        np.random.default_rng(0),
        rlds.DatasetSpec("benchmark", (specs.IMAGE_SIZE,) * 2, (specs.IMAGE_SIZE,) * 2),
    )
    shards.start_dataset(folder.name, {})

    def episode(index: int) -> rlds.Episode:
        steps = made_up_steps((EPISODE_STEPS,))
        coarse = rng.integers(0, 256, (2, EPISODE_STEPS, 16, 16, 3), np.uint8).repeat(4, axis=2).repeat(4, axis=3)
        observation = steps.observation.replace(rgb_static=coarse[0], rgb_gripper=coarse[1])
        position = np.arange(EPISODE_STEPS)
        ends = {"is_first": position == 0, "is_last": position == EPISODE_STEPS - 1}
        return rlds.Episode(steps.replace(observation=observation, **ends), "made up", str(index))

    lengths = shards.write_shard(folder.name, spec, "train", 0, 1, map(episode, range(NUM_EPISODES)))
    shards.finish_dataset(folder.name, spec, {"train": [lengths]})
    return folder.name


def _uniform(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def _latents(config: FrozenConfigDict, count: int) -> LatentState:
    settings, rng = config.world_model, np.random.default_rng(2)
    logits = rng.normal(size=(count, settings.num_latents, settings.num_classes)).astype(np.float32)
    deterministic = rng.uniform(-1, 1, (count, settings.deterministic_dim)).astype(np.float32)
    return LatentState(deterministic, logits, (logits == logits.max(-1, keepdims=True)).astype(np.float32))


def _world_model(config: FrozenConfigDict):
    model = world_model.build(config.world_model)
    return model, jax.jit(functools.partial(world_model.init, model))(jax.random.key(0))


def _tables():
    return jax.jit(jax.vmap(starts.reset))(jax.random.split(jax.random.key(0), NUM_TABLES))


def _changed(config: FrozenConfigDict, section: str, **changes) -> FrozenConfigDict:
    changed = ConfigDict(config)
    with changed.unlocked():
        changed[section].update(changes)
    return FrozenConfigDict(changed)
