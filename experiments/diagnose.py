"""Measures why imagination does or does not transfer, for any finished or partly finished run.

python -m experiments.diagnose --config=experiments/configs/playtable.py --workdir=runs/playtable_wam [--only=open_loop]

Writes into WORKDIR/diagnose, each part as JSON and PNG, and summary.md over all parts:
    trust        recorded attempts imagined under their own actions: no step of the environment
    calibration  success imagined against success outside, over policies and tasks
    classifier   the success classifier on the frames of real episodes, beside its figures on play
    open_loop    linear probes of hand, mechanisms and action: on filtered latents, and in imagination by horizon
    divergence   real episodes and the same actions imagined: where they part
Figures are kept as they come, and the same command goes on with the missing ones. Starts are not the evaluation's
(--seed_offset). Parts whose stages have not been trained are left out and named, unless --only asks for them.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

from absl import flags
from tqdm import tqdm

from experiments import diagnoses, diagnosis_report, launch
from experiments.diagnoses import Options, Units
from wam_jax import calibration, json_files, specs


def run(config, workdir: str, options: Options, only: Sequence[str] = ()) -> str:
    """Measures what is missing of the parts, draws them and writes the summary; returns it.

    Args:
      config, workdir: of the run.
      options: see there.
      only: some of diagnoses.PARTS; none: all that the run has what they need.

    Raises:
      ValueError: something is missing, before any work; or figures made with other options are there.
    """
    check(config, options, only)
    parts, left_out = _choose(config, workdir, options, only)
    records = {name: _open(config, workdir, options, name) for name in parts}
    for name, units in parts.items():
        missing = [unit for unit in units if unit not in records[name]["units"]]
        for unit in tqdm(missing, desc=name, unit="unit", disable=not missing):
            records[name]["units"][unit] = _plain(units[unit]())
            json_files.write(_path(workdir, name), records[name])
        _finish(workdir, name, records[name])
    return diagnosis_report.write_summary(_directory(workdir), left_out)


def check(config, options: Options, only: Sequence[str]) -> None:
    """Checks what the command line asks for.

    Raises:
      ValueError: a value that cannot work, named, with the mend.
    """
    for name in only:
        if name not in diagnoses.PARTS:
            raise ValueError(f"--only={name}: no such part; expected some of {', '.join(diagnoses.PARTS)}")
    for task in options.tasks:
        if specs.task_index(task) not in map(specs.task_index, config.tasks):
            raise ValueError(f"--tasks={task}: the run has {', '.join(config.tasks)}")
    if options.seed_offset == 0:
        raise ValueError("--seed_offset=0 would be the evaluation's own starts; nothing is to be chosen on those")
    if options.noise and config.policy.kind == "gaussian":
        raise ValueError("--noise changes policy.evaluation_std, which a Gaussian policy does not have; leave it out")
    for name in ("contexts", "horizons"):
        values = getattr(options, name)
        if not values or min(values) < 1 or list(values) != sorted(set(values)):
            raise ValueError(f"--{name}={','.join(map(str, values))}; expected rising numbers of frames from 1")
    if "starts" in flags.FLAGS and flags.FLAGS["starts"].present:
        raise ValueError("--starts are the evaluation's, whatever the seed; leave it out, for random starts")


def _choose(config, workdir: str, options: Options, only: Sequence[str]) -> tuple[dict[str, Units], dict[str, str]]:
    """The units of each part, everything they need loaded; and of parts that nobody asked for what they lack."""
    parts, left_out = {}, {}
    for name in [part for part in diagnoses.PARTS if part in (only or diagnoses.PARTS)]:
        try:
            parts[name] = diagnoses.PARTS[name](config, workdir, options)
        except ValueError as error:
            if only:
                raise
            left_out[name] = str(error)
    if not parts:
        raise ValueError(next(iter(left_out.values())))
    return parts, left_out


def _open(config, workdir: str, options: Options, part: str) -> dict[str, Any]:
    """The figures of a part that there are.

    Raises:
      ValueError: they are damaged, or were made with other options.
    """
    path, now = _path(workdir, part), _plain(diagnoses.settings(config, workdir, options, part))
    if not os.path.exists(path):
        return {"settings": now, "units": {}}
    mend = "delete it; the same command measures again"
    record = json_files.read(path, mend, dict)
    if not all(isinstance(record.get(key), dict) for key in ("settings", "units")):
        raise ValueError(f"{path} holds no figures of a diagnosis; {mend}")
    for unit, figures in record["units"].items():
        if not figures or not isinstance(figures, dict):
            raise ValueError(f"{path}: {unit} is {figures!r}, expected figures; {mend}")
    for key, value in now.items():
        if record["settings"].get(key) != value:
            raise ValueError(
                f"{path}: its figures were made with {key}={record['settings'].get(key)!r}, not {value!r}; take that "
                "value, or delete it"
            )
    return record


def _finish(workdir: str, part: str, record: dict[str, Any]) -> None:
    if part == "calibration":
        points = [calibration.Point(**unit) for unit in record["units"].values()]
        record["summary"] = _plain(calibration.summarise(points))
        json_files.write(_path(workdir, part), record)
    diagnosis_report.draw(part, record, os.path.join(_directory(workdir), f"{part}.png"))


def _plain(value: Any) -> Any:
    """The value as JSON reads it back; what is no number becomes None."""
    if isinstance(value, dict):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _directory(workdir: str) -> str:
    return os.path.join(workdir, "diagnose")


def _path(workdir: str, part: str) -> str:
    return os.path.join(_directory(workdir), f"{part}.json")


def _options(config) -> Options:
    """What the flags say."""
    try:
        return Options(
            tasks=tuple(_TASKS.value or config.tasks),
            num_episodes=_EPISODES.value,
            seed_offset=_SEED_OFFSET.value,
            shares=tuple(float(share) for share in _SHARES.value),
            noise=tuple(float(std) for std in _NOISE.value),
            contexts=tuple(int(frames) for frames in _CONTEXTS.value),
            horizons=tuple(int(steps) for steps in _HORIZONS.value),
            train_windows=_TRAIN_WINDOWS.value,
            num_windows=_WINDOWS.value,
        )
    except ValueError as error:
        raise ValueError(f"--shares, --noise, --contexts and --horizons are numbers: {error}") from None


if __name__ == "__main__":
    _default = Options(tasks=())
    _ONLY = flags.DEFINE_list("only", [], f"Parts, comma separated: {', '.join(diagnoses.PARTS)}; empty: all")
    _TASKS = flags.DEFINE_list("tasks", [], "Some of the run's tasks; empty: all")
    _EPISODES = flags.DEFINE_integer("num_episodes", _default.num_episodes, "Of each policy and task", lower_bound=2)
    _SEED_OFFSET = flags.DEFINE_integer(
        "seed_offset", _default.seed_offset, "Added to config.evaluation.seed for the starts", lower_bound=0
    )
    _SHARES = flags.DEFINE_list(
        "shares",
        list(map(str, _default.shares)),
        "More policies: shares of the way from the cloned parameters to PPO's",
    )
    _NOISE = flags.DEFINE_list("noise", [], "More policies: the newest with this policy.evaluation_std")
    _CONTEXTS = flags.DEFINE_list("contexts", list(map(str, _default.contexts)), "Frames seen before imagining")
    _HORIZONS = flags.DEFINE_list("horizons", list(map(str, _default.horizons)), "Steps imagined")
    _TRAIN_WINDOWS = flags.DEFINE_integer(
        "train_windows", _default.train_windows, "Windows of play that the probes are fitted on", lower_bound=1
    )
    _WINDOWS = flags.DEFINE_integer("num_windows", _default.num_windows, "Windows of held-out play", lower_bound=2)
    launch.main(lambda config, workdir: print(run(config, workdir, _options(config), _ONLY.value)), reads=lambda: True)
