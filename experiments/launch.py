"""What all binaries share: flags, the workdir and its lock, one-line errors, the compilation cache."""

import fcntl
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from experiments import config_values, several_processes
from experiments.config_checks import check
from wam_jax import host_memory, json_files, parallel

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. experiments/configs/quickstart.py")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: datasets, checkpoints, metrics, tables")

_OWN_FILES = ("config.json", ".lock", "stages.json")  # a workdir with nothing else holds no work
_FOLDERS = (
    *("data", "world_model", "prior_ensemble", "policy", "reward", "ppo"),
    *("evaluation", "diagnose", "tensorboard", "videos", "chains"),
)
_LOCKS: list = []  # open lock files, for as long as the process lives


def main(
    run: Callable[[FrozenConfigDict, str], None],
    choose_config: Callable[[ConfigDict | None], ConfigDict] | None = None,
    *,
    trains: bool = False,
    reads: Callable[[], bool] = lambda: False,
) -> None:
    """Runs a binary: parses its flags, checks its config, and turns a user's mistake into one line of error.

    Args:
      run: gets the config and the workdir.
      trains: whether several processes may run it together.
      choose_config: what other flags make of the config, which then may be left out; None: it is taken as it is.
      reads: whether, as the other flags say, it only measures a run that is there.
    """
    flags.mark_flags_as_required(["workdir"] if choose_config else ["config", "workdir"])

    def guarded(argv: Sequence[str]) -> None:
        try:
            if len(argv) > 1:
                raise ValueError(f"unexpected argument {argv[1]!r}; options are written --name=value")
            if not WORKDIR.value:
                raise ValueError("--workdir is empty; name the folder of the run, e.g. --workdir=runs/quickstart")
            if reads() and not os.path.exists(os.path.join(WORKDIR.value, "config.json")):
                raise ValueError(
                    f"--workdir={WORKDIR.value} holds no run (it has no config.json); name the folder of one, finished "
                    "or not; where that file was deleted, experiments.reproduce --until=collect with the run's config "
                    "writes it again"
                )
            several_processes.connect(trains)
            config = choose_config(CONFIG.value) if choose_config else CONFIG.value
            run(prepare(config, str(WORKDIR.value), reads=reads()), str(WORKDIR.value))
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
        sys.exit(f"error: {lines[-1].removeprefix('ValueError: ') if loading else '; '.join(lines)}")
    except Exception as error:  # whatever a file of Python raises while it is loaded, or an override of what it lacks
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        overrides = [argument.partition("=")[0] for argument in argv if argument.startswith("--config.")]
        if isinstance(error, AttributeError | KeyError | TypeError):
            named = [name for name in overrides if any(key in str(error) for key in name.split(".")[1:])]
            if named or (overrides and isinstance(error, TypeError)):
                sys.exit(f"error: {' or '.join(named or overrides)}: the config has no such key ({reason})")
        sys.exit(f"error: the file that --config names could not be loaded ({reason})")


def prepare(config: ConfigDict, workdir: str, *, reads: bool = False) -> FrozenConfigDict:
    """Checks a config against itself, the machine and the workdir, before any work starts.

    Args:
      config: from the config file and its overrides.
      workdir: folder of the run; gets config.json.
      reads: the run is there: its config.json is compared even where it lies alone.

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
        _check_folders(workdir)
        _check_workdir(config, workdir, reads)
    return FrozenConfigDict(config)


def before_devices() -> None:
    """What must be set before JAX first looks for devices."""
    host_memory.keep()
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # Virtual CPU devices can deadlock in a rendezvous when the host runs ahead of them.
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def _check_folders(workdir: str) -> None:
    """Checks that no file is in place of a folder that a run writes to."""
    for path in (os.path.join(workdir, name) for name in _FOLDERS):
        if os.path.exists(path) and not os.path.isdir(path):
            raise ValueError(f"{path} should be a folder of the run, and is a file; move it away")


def _check_workdir(config: ConfigDict, workdir: str, reads: bool) -> None:
    """Writes config.json, or compares it: a workdir holds the files of one config, once it holds any."""
    path = os.path.join(workdir, "config.json")
    new = json.loads(config.to_json_best_effort())
    if os.path.exists(path) and (reads or _holds_work(workdir)):
        old = config_values.read(path, "delete it if you know that the config of this run has not changed")
        changed = list(config_values.differing(old, new).items())
        if changed:
            key, (was, now) = changed[0]
            more = f" (and {len(changed) - 1} more differences)" if changed[1:] else ""
            if key not in config_values.flat(new):
                raise ValueError(
                    f"{workdir} holds a run made by another version, with config.{key}={was!r}, which this one does "
                    f"not know{more}; use that version, or another --workdir"
                )
            raise ValueError(
                f"{workdir} holds a run with config.{key}={was!r}, not {now!r}{more}; use another --workdir, or the "
                "value it was made with"
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


def play_plan(config: FrozenConfigDict) -> dict:
    """What decides the shards of collected play, for `shards.start_dataset`.

    An option that came later is left out at its default: plans of older datasets lack it.
    """
    data = config.dataset
    plan = {"kind": "play", "seed": config.seed, "steps": data.play_steps}
    if data.disturbed_share != config_values.defaults(config.method)["dataset.disturbed_share"]:
        plan["disturbed_share"] = data.disturbed_share
    return {**plan, "train": data.play_episodes, "validation": data.validation_episodes}


def collected_directory(config: FrozenConfigDict, workdir: str, key: str) -> str:
    """Where a dataset is collected to."""
    return os.path.join(workdir, "data", dataset_name(config, key))


def stage_settings(settings: FrozenConfigDict, **changes) -> FrozenConfigDict:
    """A stage's settings with derived values."""
    return FrozenConfigDict({**settings.to_dict(), **changes})
