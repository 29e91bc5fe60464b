"""What `benchmark` measures: each stage's own compiled program on made-up inputs of a config's sizes."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from experiments import finetune_policy, made_up, train_policy
from experiments.config_values import changed
from experiments.configs import quickstart
from wam_jax import diffusion_policy, flops, input_pipeline, parallel, ppo, specs, world_model, world_model_training
from wam_jax import imagination as imagination_lib
from wam_jax.diffusion_policy import PolicyBank, PolicyBatch
from wam_jax.environments.playtable import dynamics, environment, starts
from wam_jax.imagination import ImaginationInputs
from wam_jax.input_pipeline import Batches
from wam_jax.networks import plain
from wam_jax.types import StepBatch

WINDOWS = ((4, 50), (10, 50), (50, 50))  # windows and steps of a world-model update
NUM_LATENTS, IMAGINED_STEPS = 50, 18 * 4  # of one PPO iteration
NUM_TABLES, NUM_TABLE_STEPS = 64, 50
NUM_FED_UPDATES = 2  # for which a batch of the input pipeline is
NUM_TASKS, NUM_FRAMES = 8, 29  # of a policy's evaluation; it sees that many frames at once
_BATCHES = (("world_model", "batch_size"), ("policy", "batch_size"), ("ppo", "num_rollouts"), ("ppo", "batch_size"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What a call works on."""

    name: str
    variant: str = ""  # of the same name: where an input pipeline's data lie
    dtype: str  # that it computes in
    batch: int  # over all devices
    length: int  # steps of each of the batch; 1 where there are none
    devices: int
    items: int  # a call works on
    unit: str  # of the items
    flops: int = 0  # matrix products and convolutions of a call, over all devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feed(Workload):
    """A call waits for a batch."""

    feed: Batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program(Workload):
    """A call runs a compiled program."""

    program: Any  # jitted or pmapped
    arguments: tuple
    carried: bool = False  # whether a call's first result is the next one's first argument, whose memory it takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class FedProgram(Program):
    """A call waits for a batch, the program's second argument, and runs the program."""

    feed: Batches


def cases(config: FrozenConfigDict) -> dict[str, Callable[[], Workload]]:
    """What builds each workload, by "NAME/BATCHxLENGTH/DTYPE" or less where there is nothing to tell apart.

    Args:
      config: gives the sizes of one device; its `num_devices` run data parallel, each with a batch of that size.
    """
    config = _of_all(config, devices := len(parallel.local_devices(config.num_devices)))
    found: dict[str, Callable[[], Workload]] = {}
    for dtype in ("float32", "bfloat16"):
        sizes = changed(changed(config, "world_model", compute_dtype=dtype), "policy", compute_dtype=dtype)
        for batch, length in WINDOWS:
            windows = changed(sizes, "world_model", batch_size=batch * devices, window_length=length)
            label = f"world_model_update/{batch}x{length}/{dtype}"
            found[label] = functools.partial(world_model_update, windows, "world_model_update")
        for build in (imagination, bc_update, ppo_iteration, ppo_iteration_without_bc, ppo_iteration_of_tasks, encoder):
            found[f"{build.__name__}/{dtype}"] = functools.partial(build, sizes)
    name, small = "world_model_update_quickstart", _quickstart(config, devices)
    found[name] = functools.partial(world_model_update, small, name)
    fast = config if jax.default_backend() == "cpu" else changed(config, "world_model", compute_dtype="bfloat16")
    for cache in input_pipeline.CACHES:
        found[f"input_pipeline/{cache}"] = functools.partial(window_batches, config, cache)
        found[f"training/{cache}"] = functools.partial(training, fast, "training", cache)
        found[f"training_quickstart/{cache}"] = functools.partial(training, small, "training_quickstart", cache)
    found["dispatch"] = functools.partial(dispatch, config)
    return found | {"playtable_step": playtable_step, "playtable_render": playtable_render}


def world_model_update(config: FrozenConfigDict, name: str) -> Program:
    """One dispatch of updates, as `train_world_model` makes it."""
    settings, devices = config.world_model, parallel.local_devices(config.num_devices)
    num_updates = _updates_per_call(settings, on_cpu=1)
    batch = made_up.steps((len(devices), num_updates, settings.batch_size // len(devices), settings.window_length))
    return Program(name=name, **_world_model_updates(config, num_updates, parallel.shard(batch, devices)))


def training(config: FrozenConfigDict, name: str, cache: str) -> FedProgram:
    """The same, fed by the input pipeline."""
    settings, devices = config.world_model, parallel.local_devices(config.num_devices)
    num_updates = _updates_per_call(settings, on_cpu=NUM_FED_UPDATES)
    batches, cut = _batches(settings, len(devices), num_updates, cache)
    updates = _world_model_updates(config, num_updates, next(batches), take=cut)
    return FedProgram(name=name, variant=cache, feed=batches, **updates)


def dispatch(config: FrozenConfigDict) -> Program:
    """What a call costs beside its updates: one that only counts, with the whole state of the world model."""
    devices = parallel.local_devices(config.num_devices)
    state = world_model_training.first_state(made_up.world_model(config)[1], config.world_model)

    def count(state, batch, rng):
        return state.replace(step=state.step + 1), {"loss": batch}

    return Program(
        name="dispatch",
        dtype="float32",
        batch=len(devices),
        length=1,
        devices=len(devices),
        items=1,
        unit="calls",
        program=parallel.compile_updates(count, devices),
        arguments=(parallel.replicate(state, devices), parallel.replicate(np.zeros(1, np.float32), devices), 0, 0),
        carried=True,
    )


def _world_model_updates(
    config: FrozenConfigDict, num_updates: int, batch: Any, take: Callable | None = None
) -> dict[str, Any]:
    """What workloads of the world model's updates have in common: most fields of a Program."""
    settings, devices = config.world_model, parallel.local_devices(config.num_devices)
    model, params = made_up.world_model(config)
    state = world_model_training.first_state(params, settings)
    update = functools.partial(world_model_training.update, model=model, axis_name=parallel.AXIS_NAME)
    one = made_up.steps((settings.batch_size // len(devices), settings.window_length))
    return {
        "dtype": settings.compute_dtype,
        "batch": settings.batch_size,
        "length": settings.window_length,
        "devices": len(devices),
        "items": num_updates * settings.batch_size * settings.window_length,
        "unit": "frames",
        "program": parallel.compile_updates(update, devices, take=take),
        "arguments": (parallel.replicate(state, devices), batch, 0, 0),
        "carried": True,
        "flops": len(devices) * num_updates * update_flops(settings, one),
    }


def update_flops(settings, batch: StepBatch) -> int:
    """FLOPs of one update of the world model; rows that only fill registers up are no work."""
    model = world_model.build(settings)
    state = jax.eval_shape(functools.partial(world_model_training.create_state, model), jax.random.key(0))
    return _count(functools.partial(world_model_training.update, model=model), state, batch, jax.random.key(0))


def _count(function: Callable, *arguments: Any) -> int:
    """FLOPs of a call, each product once, in whatever form the device computes it."""
    with plain.plain_products():
        return flops.count(function, *arguments)


def imagination(config: FrozenConfigDict) -> Program:
    """The prior alone: open-loop steps from some latents under given actions."""
    model, params = made_up.frozen_world_model(config)
    rng = jax.random.key(0)
    latent = made_up.latents(config, NUM_LATENTS)
    action = made_up.uniform((NUM_LATENTS, IMAGINED_STEPS, specs.ACTION_DIM))

    def last(params, latent, action, rng):
        return jax.tree.map(lambda x: x[:, -1], world_model.imagine(model, params, latent, action, rng))

    return Program(
        name="imagination",
        dtype=config.world_model.compute_dtype,
        batch=NUM_LATENTS,
        length=IMAGINED_STEPS,
        devices=1,
        items=NUM_LATENTS * IMAGINED_STEPS,
        unit="latents",
        program=jax.jit(last),
        arguments=(params, latent, action, rng),
        flops=_count(last, params, latent, action, rng),
    )


def bc_update(config: FrozenConfigDict) -> Program:
    """One dispatch of updates of one task's policy, as `train_policy` makes it."""
    devices, settings = parallel.local_devices(config.num_devices), train_policy.policy_settings(config)
    num_updates = _updates_per_call(config.policy, on_cpu=10)
    rows = PolicyBatch(made_up.latents(config, 2048), made_up.uniform((2048, settings.chunk, specs.ACTION_DIM)))
    bank = PolicyBank(rows, np.array(2048, np.int32))
    fresh, draws = train_policy.initial_state(config, config.tasks[0]), settings.noise_draws
    state = diffusion_policy.set_statistics(fresh, rows.latent, settings=settings)
    update = functools.partial(diffusion_policy.update_from_bank, settings=settings)
    on_each = functools.partial(update, axis_name=parallel.AXIS_NAME)
    return Program(
        name="bc_update",
        variant=f"{draws} draws" if draws > 1 else "",
        dtype=settings.compute_dtype,
        batch=config.policy.batch_size,
        length=1,
        devices=len(devices),
        items=num_updates * config.policy.batch_size,
        unit="samples",
        program=parallel.compile_updates(on_each, devices, num_updates=num_updates),
        arguments=(parallel.replicate(state, devices), parallel.replicate(bank, devices), 0, 0),
        carried=True,
        flops=len(devices) * num_updates * _count(update, state, bank, jax.random.key(0)),
    )


def ppo_iteration(config: FrozenConfigDict, *, variant: str = "", num_tasks: int = 1) -> Program:
    """One iteration, as `finetune_policy` makes it: rollouts in imagination and all their updates."""
    devices, settings = parallel.local_devices(config.num_devices), finetune_policy.ppo_settings(config)
    model, params = made_up.frozen_world_model(config)
    base_policy = train_policy.initial_state(config, config.tasks[0]).params
    start, num_starts = made_up.latents(config, 64), np.array(64, np.int32)
    frozen = world_model.imagination_params(model, params)
    inputs = ImaginationInputs(start, num_starts, frozen, made_up.reward_params(config, params), base_policy)
    state = finetune_policy.initial_state(config, config.tasks[0], base_policy)
    update = functools.partial(
        ppo.iteration,
        **finetune_policy.imagination_functions(config, model),
        policy_settings=train_policy.policy_settings(config),
        settings=settings,
    )
    iteration_flops = _count(update, state, inputs, jax.random.key(0))
    program: Callable = functools.partial(update, axis_name=parallel.AXIS_NAME)
    seed: Any = 0
    if num_tasks > 1:
        program = jax.vmap(program, in_axes=(0, imagination_lib.TASK_AXES, 0))
        inputs = imagination_lib.stack_tasks([inputs] * num_tasks)
        state, seed = jax.tree.map(lambda x: np.stack([x] * num_tasks), state), np.arange(num_tasks, dtype=np.int32)
    return Program(
        name="ppo_iteration",
        variant=variant,
        dtype=config.world_model.compute_dtype,
        batch=config.ppo.num_rollouts,
        length=settings.horizon,
        devices=len(devices),
        items=num_tasks * config.ppo.num_rollouts * settings.horizon,
        unit="decisions",
        program=parallel.compile_updates(program, devices, num_updates=1),
        arguments=(parallel.replicate(state, devices), parallel.replicate(inputs, devices), seed, 0),
        carried=True,
        flops=len(devices) * num_tasks * iteration_flops,
    )


def ppo_iteration_without_bc(config: FrozenConfigDict) -> Program:
    """Without the regulariser, whose chains and log-probabilities are nearly half of the work."""
    return ppo_iteration(changed(config, "ppo", bc_weight=0.0), variant="without bc")


def ppo_iteration_of_tasks(config: FrozenConfigDict) -> Program:
    """One iteration of eight tasks as one program."""
    return ppo_iteration(config, variant=f"{NUM_TASKS} tasks", num_tasks=NUM_TASKS)


def encoder(config: FrozenConfigDict) -> Program:
    """Frames of as many episodes as an evaluation runs at once, embedded and filtered: what a policy waits for."""
    model, params = made_up.world_model(config)
    observation = jax.tree.map(lambda x: x[:, 0], made_up.steps((NUM_FRAMES, 1)).observation)
    arguments = (
        params,
        made_up.latents(config, NUM_FRAMES),
        made_up.uniform((NUM_FRAMES, specs.ACTION_DIM)),
        observation,
        jax.random.key(0),
    )
    step = functools.partial(world_model.observe_step, model)
    return Program(
        name="encoder",
        dtype=config.world_model.compute_dtype,
        batch=NUM_FRAMES,
        length=1,
        devices=1,
        items=NUM_FRAMES,
        unit="frames",
        program=jax.jit(step),
        arguments=arguments,
        flops=_count(step, *arguments),
    )


def playtable_step() -> Program:
    """Control steps of many tables side by side."""

    def run(state, actions):
        def step(state, action):
            return jax.vmap(dynamics.step)(state, action), None

        return jax.lax.scan(step, state, actions)[0]

    return Program(
        name="playtable_step",
        dtype="float32",
        batch=NUM_TABLES,
        length=NUM_TABLE_STEPS,
        devices=1,
        items=NUM_TABLES * NUM_TABLE_STEPS,
        unit="steps",
        program=jax.jit(run),
        arguments=(_tables(), made_up.uniform((NUM_TABLE_STEPS, NUM_TABLES, specs.ACTION_DIM))),
    )


def playtable_render() -> Program:
    """Both cameras of many tables."""
    return Program(
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
    batches, cut = _batches(settings, len(devices), NUM_FED_UPDATES, cache)
    described: dict[str, Any] = {
        "name": "input_pipeline",
        "variant": cache,
        "dtype": "uint8",
        "batch": settings.batch_size,
        "length": settings.window_length,
        "devices": len(devices),
        "items": NUM_FED_UPDATES * settings.batch_size * settings.window_length,
        "unit": "frames",
    }
    if cut is None:
        return Feed(feed=batches, **described)
    keep = parallel.compile_updates(lambda state, batch, rng: (state, batch), devices, take=cut)
    with contextlib.closing(batches):
        arguments = parallel.replicate(np.zeros(()), devices), next(batches), 0, 0
    return Program(program=keep, arguments=arguments, carried=True, **described)


def _batches(settings, num_devices: int, num_updates: int, cache: str) -> tuple[Batches, Callable | None]:
    """Batches for `num_updates` of a call, and what cuts windows out of those that lie on the devices."""
    batches = input_pipeline.make_batches(
        made_up.dataset(), "train", settings.batch_size, settings.window_length, 0,
        num_devices=num_devices, updates_per_dispatch=num_updates, cache=cache,
    )  # fmt: skip
    cut = functools.partial(input_pipeline.take_windows, length=settings.window_length, axis_name=parallel.AXIS_NAME)
    return batches, cut if cache == "device" else None


def _updates_per_call(settings, *, on_cpu: int) -> int:
    return on_cpu if jax.default_backend() == "cpu" else settings.updates_per_call


def _of_all(config: FrozenConfigDict, devices: int) -> FrozenConfigDict:
    """A config with the batches of one device -> with those of all."""
    for section, key in _BATCHES:
        config = changed(config, section, **{key: config[section][key] * devices})
    return config


def _quickstart(config: FrozenConfigDict, devices: int) -> FrozenConfigDict:
    small = quickstart.get_config(config.method)
    small.num_devices = config.num_devices
    return _of_all(FrozenConfigDict(small), devices)


def _tables():
    return jax.jit(jax.vmap(starts.reset))(jax.random.split(jax.random.key(0), NUM_TABLES))
