"""What all binaries share: flags, checks of the config, one-line errors, the compilation cache."""

import fcntl
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from experiments import several_processes
from experiments.configs import base
from wam_jax import (
    datasets,
    environments,
    host_memory,
    input_pipeline,
    json_files,
    parallel,
    shards,
    specs,
    world_model,
)

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. experiments/configs/quickstart.py")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: datasets, checkpoints, metrics, tables")

_OWN_FILES = ("config.json", ".lock", "stages.json")  # a workdir with nothing else holds no work
_LOCKS: list = []  # open lock files, for as long as the process lives
# Numbers by the name of their key. Whole numbers that are not named here are 1 or more, others 0 or more.
_LEAST = {"window_length": 2, "time_dim": 4, "num_windows": 2} | dict.fromkeys(
    ("seed", "num_devices", "max_start_step", "critic_warmup", "warmup_steps"), 0
)
_MAX_SEED = 2**31 - 1000  # seeds are int32 on the devices, and each task adds its number
_SHARES = ("kl_balance", "ema_decay", "threshold", "discount", "gae_lambda", "denoising_discount")
_POSITIVE = (
    *("learning_rate", "final_learning_rate", "actor_learning_rate", "critic_learning_rate", "temperature"),
    *("adam_epsilon", "kl_weight", "exploration_std", "evaluation_std", "noise_clip", "reward_clip", "clip_rate"),
)
# What may change between two commands in one workdir. Everything else decides what its files mean: a longer training of
# the world model, say, would leave policies behind that were cloned on other latents.
_FREE = (
    "num_devices",
    "evaluation.num_episodes",
    "evaluation.batch_size",
    ".tasks_at_once",
    ".updates_per_call",
    ".save_every",
    ".cache",
    ".prediction.",  # read by evaluate_prediction alone, which notes its values
)


def main(
    run: Callable[[FrozenConfigDict, str], None],
    choose_config: Callable[[ConfigDict | None], ConfigDict] | None = None,
    *,
    trains: bool = False,
) -> None:
    """Runs a binary: parses its flags, checks its config, and turns a user's mistake into one line of error.

    Args:
      run: gets the config and the workdir.
      trains: whether several processes may run it together.
      choose_config: what other flags make of the config, which then may be left out; None: it is taken as it is.
    """
    flags.mark_flags_as_required(["workdir"] if choose_config else ["config", "workdir"])

    def guarded(argv: Sequence[str]) -> None:
        try:
            if len(argv) > 1:
                raise ValueError(f"unexpected argument {argv[1]!r}; options are written --name=value")
            if not WORKDIR.value:
                raise ValueError("--workdir is empty; name the folder of the run, e.g. --workdir=runs/quickstart")
            several_processes.connect(trains)
            config = choose_config(CONFIG.value) if choose_config else CONFIG.value
            run(prepare(config, str(WORKDIR.value)), str(WORKDIR.value))
        except (ValueError, FloatingPointError, OSError) as error:
            logging.debug("traceback", exc_info=True)
            sys.exit(f"error: {error}")
        except KeyboardInterrupt as interruption:
            where = str(interruption) or "finished work is kept; the same command goes on from there"
            print(f"interrupted: {where}", file=sys.stderr)
            sys.exit(130)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what cleans up then, cleans up now
    app.run(guarded, flags_parser=parse_flags)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the flags; a mistake in them ends in one line instead of a library's traceback."""
    try:
        rest = flags.FLAGS(argv)
        getattr(CONFIG.value, "seed", None)  # a file that could not be loaded raises only now
        return rest
    except OSError as error:
        reason = [line.strip(" )") for line in str(error).splitlines() if line.strip()][-1]  # the cause stands last
        sys.exit(f"error: the file that --config names cannot be read: {reason}")
    except (flags.Error, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        loading = any("config file" in line or "Traceback" in line for line in lines)  # the cause stands last
        sys.exit(f"error: {lines[-1] if loading else '; '.join(lines)}")
    except Exception as error:  # whatever a file of Python raises while it is loaded, or an override of what it lacks
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        overrides = [argument.partition("=")[0] for argument in argv if argument.startswith("--config.")]
        if isinstance(error, AttributeError | KeyError | TypeError):
            named = [name for name in overrides if any(key in str(error) for key in name.split(".")[1:])]
            if named or (overrides and isinstance(error, TypeError)):
                sys.exit(f"error: {' or '.join(named or overrides)}: the config has no such key ({reason})")
        sys.exit(f"error: the file that --config names could not be loaded ({reason})")


def prepare(config: ConfigDict, workdir: str) -> FrozenConfigDict:
    """Checks a config against itself, the machine and the workdir, before any work starts.

    Args:
      config: from the config file and its overrides.
      workdir: folder of the run; gets config.json.

    Returns:
      the config, frozen and hashable.

    Raises:
      ValueError: a value that cannot work, named, with the mend.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    before_devices()
    check(config)
    if parallel.is_first_process():  # it writes for all
        _lock(workdir)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/wam_jax/xla"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    parallel.any_process(False)  # processes connect while they are together: on a CPU one waits 30 s for the others
    if parallel.is_first_process():
        _check_workdir(config, workdir)
    return FrozenConfigDict(config)


def before_devices() -> None:
    """What must be set before JAX first looks for devices."""
    host_memory.keep()
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # Virtual CPU devices can deadlock in a rendezvous when the host runs ahead of them.
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def check(config: ConfigDict) -> None:
    """Checks the values of a config that no later stage should trip over."""
    if config.environment not in environments.ENVIRONMENTS:
        raise ValueError(
            f"config.environment={config.environment!r}; expected one of {', '.join(environments.ENVIRONMENTS)}"
        )
    if config.method not in base.METHODS:
        raise ValueError(f"config.method={config.method!r}; expected one of {', '.join(base.METHODS)}")
    if not config.tasks:
        raise ValueError(f"config.tasks is empty; name at least one of {', '.join(specs.TASKS)}")
    for task in config.tasks:
        specs.task_index(task)
        if list(config.tasks).count(task) > 1:
            raise ValueError(f"config.tasks names {task!r} twice; name each task once")
    _check_ranges(_flat(config.to_dict(), "config."))
    specs.task_index(config.evaluation.video_task)
    num_devices = parallel.device_count(config.num_devices)
    for stage, key in (("world_model", "batch_size"), ("policy", "batch_size"), ("ppo", "num_rollouts")):
        parallel.check_batch_size(config[stage][key], num_devices, name=f"config.{stage}.{key}")
    if config.reward.batch_size % (2 * num_devices):
        raise ValueError(
            f"config.reward.batch_size={config.reward.batch_size} must be even on each of {num_devices} devices: half "
            f"of a batch are successes; take a multiple of {2 * num_devices}"
        )
    lengths = {"world_model": "num_steps", "policy": "num_steps", "reward": "num_steps", "ppo": "num_iterations"}
    for stage, key in lengths.items():
        steps, call = config[stage][key], config[stage].updates_per_call
        if steps % call:
            raise ValueError(
                f"config.{stage}.{key}={steps} is not a positive multiple of updates_per_call={call}; take "
                f"{max(1, round(steps / call)) * call}"
            )
    if config.policy.warmup_steps >= config.policy.num_steps:
        raise ValueError(
            f"config.policy.warmup_steps={config.policy.warmup_steps} must be less than num_steps="
            f"{config.policy.num_steps}: the learning rate falls after it"
        )
    if config.policy.finetuned_steps > config.policy.denoising_steps:
        raise ValueError(
            f"config.policy.finetuned_steps={config.policy.finetuned_steps} exceeds denoising_steps="
            f"{config.policy.denoising_steps}; PPO trains the last steps of those"
        )
    world_model.build(FrozenConfigDict(config.world_model))
    _check_agreement(config)
    _check_data(config)


def _check_ranges(values: dict) -> None:
    """Checks every number by the kind that its name says: a size, a count, a share, a rate or a weight."""
    for name, value in values.items():
        key = name.rpartition(".")[2]
        if isinstance(value, tuple | list) and key.endswith("_dims"):
            whole = all(isinstance(size, int) for size in value)
            good, expected = len(value) > 0 and whole and min(value) >= 1, "one size or more, each at least 1"
        elif isinstance(value, bool) or not isinstance(value, int | float):
            continue
        elif isinstance(value, int):
            least, most = _LEAST.get(key, 1), _MAX_SEED if key == "seed" else math.inf
            good, expected = least <= value <= most, f"{least} or more" + f", at most {most}" * (key == "seed")
        elif key in _SHARES:
            good, expected = 0 <= value <= 1, "a number from 0 to 1"
        elif key in _POSITIVE:
            good, expected = 0 < value < math.inf, "a number above 0"
        else:
            unbounded = key.endswith("max_gradient_norm")
            good, expected = 0 <= value < math.inf or (unbounded and value == math.inf), "a number of 0 or more"
        if not good:
            raise ValueError(f"{name}={value}; expected {expected}")


def _check_agreement(config: ConfigDict) -> None:
    """Checks values that only make sense together."""
    if config.policy.compute_dtype not in ("float32", "bfloat16"):
        raise ValueError(
            f"config.policy.compute_dtype={config.policy.compute_dtype!r}; expected 'float32' or 'bfloat16'"
        )
    chunk, max_steps = config.policy.chunk, config.evaluation.max_steps
    if max_steps < chunk or max_steps % chunk:
        raise ValueError(
            f"config.evaluation.max_steps={max_steps} is not a positive multiple of config.policy.chunk={chunk}: an "
            f"episode, real or imagined, is a number of whole chunks; take {max(1, round(max_steps / chunk)) * chunk}"
        )
    if config.policy.time_dim % 2:
        raise ValueError(f"config.policy.time_dim={config.policy.time_dim} is odd: half are sines, half cosines")
    decisions = config.ppo.num_rollouts * max_steps // chunk
    if config.ppo.batch_size < decisions:  # more means all of them, on any number of devices
        num_devices = parallel.device_count(config.num_devices)
        parallel.check_batch_size(config.ppo.batch_size, num_devices, name="config.ppo.batch_size")
    settings = config.world_model
    if (settings.action_weight > 0) != (config.method == "wam"):
        raise ValueError(
            f"config.world_model.action_weight={settings.action_weight} with method {config.method!r}: tables would "
            "name the wrong method; choose it with the config file, FILE.py:wam or FILE.py:dreamer_v2"
        )
    if settings.open_loop_weight and not 2 <= settings.open_loop_steps <= settings.window_length:
        raise ValueError(
            f"config.world_model.open_loop_steps={settings.open_loop_steps}; expected 2 to window_length="
            f"{settings.window_length}"
        )
    if settings.soft_prior and not config.policy.soft_feature:
        raise ValueError(
            "config.world_model.soft_prior=True needs config.policy.soft_feature=True: a policy that was cloned on "
            "samples of z would meet probabilities in imagination"
        )


def _check_pictures(data: ConfigDict) -> None:
    """Checks that the simulator will draw as the pictures of the named datasets were made."""
    for key in ("play", "demonstrations"):
        found = shards.pictures(data[key]) if data[key] else ""
        if found and (found == "drawn") != (data.pictures == "drawn"):
            raise ValueError(
                f"config.dataset.{key}={data[key]} holds pictures that are {found!r}, and config.dataset.pictures="
                f"{data.pictures!r}: a policy would see others in the simulator than it was trained on; take "
                f"--config.dataset.pictures={found}"
            )


def _check_data(config: ConfigDict) -> None:
    """Checks the sizes of what will be collected, and opens what is there already."""
    data, window = config.dataset, config.world_model.window_length
    pictures = base.PICTURES if config.environment == "calvin" else base.PICTURES[:1]
    if data.pictures not in pictures:
        raise ValueError(
            f"config.dataset.pictures={data.pictures!r}; expected one of {', '.join(pictures)} for {config.environment}"
        )
    if data.cache not in input_pipeline.CACHES:
        raise ValueError(f"config.dataset.cache={data.cache!r}; expected one of {', '.join(input_pipeline.CACHES)}")
    if config.environment == "calvin":
        _check_pictures(data)
    if not data.play:
        if window > data.play_steps:
            raise ValueError(
                f"config.world_model.window_length={window} is longer than every episode: config.dataset.play_steps="
                f"{data.play_steps}; shorten the window or play longer"
            )
    else:
        longest = max(datasets.episode_lengths(data.play, "train"))
        if window > longest:
            raise ValueError(
                f"config.world_model.window_length={window} is longer than every episode of {data.play}, the longest "
                f"has {longest} steps; shorten the window"
            )
    if data.demonstrations:
        found = set(datasets.episode_tasks(data.demonstrations))
        missing = [task for task in config.tasks if specs.task_index(task) not in found]
        if missing:
            raise ValueError(
                f"config.dataset.demonstrations={data.demonstrations} holds no demonstration of {', '.join(missing)}; "
                "collect some, or leave the task out: --config.tasks=\"('open_drawer',)\""
            )


def _check_workdir(config: ConfigDict, workdir: str) -> None:
    """Writes config.json, or compares it: a workdir holds the files of one config, once it holds any."""
    path = os.path.join(workdir, "config.json")
    new = json.loads(config.to_json_best_effort())
    if os.path.exists(path) and _holds_work(workdir):
        old = json_files.read(path, "delete it if you know that the config of this run has not changed")
        flat_old, flat_new = _flat(old), _flat(new)
        # An option that came after the run was made changes nothing at the value that base.py gives it.
        before = _flat(json.loads(base.get_config(config.method).to_json_best_effort()))
        flat_old = {key: before[key] for key in flat_new if key in before} | flat_old
        changed = sorted(
            key
            for key in {*flat_old, *flat_new}
            if flat_old.get(key) != flat_new.get(key) and not any(part in f".{key}" for part in _FREE)
        )
        if changed:
            key = changed[0]
            more = f" (and {len(changed) - 1} more differences)" if changed[1:] else ""
            if key not in flat_new:
                raise ValueError(
                    f"{workdir} holds a run made by another version, with config.{key}={flat_old[key]!r}, which this "
                    f"one does not know{more}; use that version, or another --workdir"
                )
            raise ValueError(
                f"{workdir} holds a run with config.{key}={flat_old.get(key)!r}, not {flat_new.get(key)!r}{more}; use "
                "another --workdir, or the value it was made with"
            )
    json_files.write(path, new)


def _holds_work(workdir: str) -> bool:
    return any(name not in _OWN_FILES for _, _, names in os.walk(workdir) for name in names)


def _lock(workdir: str) -> None:
    """Refuses a second run in the workdir while this one lives; the lock ends with the process.

    Raises:
      ValueError: another process works there, or the folder cannot be made or written.
    """
    try:
        os.makedirs(workdir, exist_ok=True)
        file = open(os.path.join(workdir, ".lock"), "w")  # noqa: SIM115 (held as long as the process lives)
    except OSError as error:
        raise ValueError(f"--workdir={workdir} cannot be made or written ({error}); name another folder") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run works in {workdir}; wait for it, or use another --workdir") from None
    except OSError as error:  # some network file systems have no locks
        logging.warning("%s is not locked: %s", workdir, error)
    _LOCKS.append(file)


def _flat(tree: dict, prefix: str = "") -> dict:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: value for name, child in tree.items() for key, value in _flat(child, f"{prefix}{name}.").items()}


def play_directory(config: FrozenConfigDict, workdir: str) -> str:
    """Where the play is: the config's, or what was collected into the workdir."""
    return _dataset_directory(config, workdir, "play")


def demonstration_directory(config: FrozenConfigDict, workdir: str) -> str:
    """Where the demonstrations are: the config's, or what was collected into the workdir."""
    return _dataset_directory(config, workdir, "demonstrations")


def _dataset_directory(config, workdir: str, key: str) -> str:
    collected = collected_directory(config, workdir, key)
    if config.environment != "playtable" and not config.dataset[key] and not os.path.isdir(collected):
        raise ValueError(
            f"config.dataset.{key} is empty, and {collected} does not exist; collect it there with "
            f"experiments.collect_{config.environment}, or give its shards: --config.dataset.{key}=DIR (see "
            "data/README.md)"
        )
    return config.dataset[key] or collected


def dataset_name(config: FrozenConfigDict, key: str) -> str:
    """The name of a dataset that is collected; `key` is "play" or "demonstrations"."""
    return f"{config.environment}_{key}"


def collected_directory(config: FrozenConfigDict, workdir: str, key: str) -> str:
    """Where a dataset is collected to."""
    return os.path.join(workdir, "data", dataset_name(config, key))


def stage_settings(settings: FrozenConfigDict, **changes) -> FrozenConfigDict:
    """A stage's settings with derived values."""
    return FrozenConfigDict({**settings.to_dict(), **changes})
