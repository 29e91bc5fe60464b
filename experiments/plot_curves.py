"""Draws the learning curves of a run: of the world model, and of PPO, in imagination or in the environment.

python -m experiments.plot_curves --workdir=runs/quickstart [--output=curves.png]
"""

import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from absl import flags

from experiments import runs
from wam_jax import cli, metrics, specs

_WORKDIRS = flags.DEFINE_list("workdir", None, "Folders of runs, comma separated; each is a line", required=True)
_OUTPUT = flags.DEFINE_string("output", "", "Picture to write; default: curves.png in the first workdir")
_WORLD_MODEL = ("reconstruction", "kl", "inverse_dynamics", "open_loop_proprioception")


def main(argv) -> None:
    """Writes one picture with a panel for each curve."""
    del argv
    workdirs = _WORKDIRS.value
    if not workdirs or "" in workdirs:
        raise ValueError(f"--workdir={','.join(workdirs)}: name each run, with single commas")
    runs.check_distinct(workdirs)
    path = _OUTPUT.value or os.path.join(workdirs[0], "curves.png")
    cli.check_output(path, ".png")
    for workdir in workdirs:
        if not metrics.read(workdir, "world_model"):
            sys.exit(f"error: {workdir}/metrics.jsonl has no rows of the world model; train it first")
    figure, axes = plt.subplots(3, 4, figsize=(16, 9), constrained_layout=True)
    for axis, name in zip(axes[0], _WORLD_MODEL, strict=True):
        for workdir in workdirs:
            _line(axis, metrics.read(workdir, "world_model"), name, os.path.basename(os.path.normpath(workdir)))
        axis.set(title=f"world model: {name.replace('_', ' ')}", xlabel="update", yscale="log")
    axes[0, 0].legend(fontsize=8)
    for axis, task in zip(axes[1:].ravel(), specs.TASKS, strict=True):
        for workdir in workdirs:
            name = os.path.basename(os.path.normpath(workdir))
            rows = metrics.read(workdir, f"ppo/{task}")
            _line(axis, rows, success(rows), name)
        axis.set(
            title=f"PPO: {task.replace('_', ' ')}",
            xlabel="iteration",
            ylabel="success of the rollouts",
            ylim=(-0.03, 1.03),
        )  # lines at 0 and 1 stay visible
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path + ".tmp", format="png", dpi=90)
    os.replace(path + ".tmp", path)
    print(f"written to {path}")


def success(rows: list[dict]) -> str:
    """The name of what PPO's rollouts are counted as: with ppo.rollouts=environment the oracle's, else imagined."""
    return "environment_success" if any("environment_success" in row for row in rows) else "imagined_success"


def _line(axis, rows: list[dict], name: str, label: str) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, linewidth=1)


if __name__ == "__main__":
    cli.run(main)
