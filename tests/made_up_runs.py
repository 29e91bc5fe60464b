"""Made-up finished runs for tests of tables: a config, rows and episodes of given outcomes."""

import dataclasses
import json

import numpy as np

from experiments.configs import quickstart
from wam_jax import specs, tables

OPEN, CLOSE = specs.TASKS[:2]


def maker(folder):
    """Returns a function that writes a run into the folder: config, rows and, of each stage, episodes of outcomes."""

    def make(name, outcomes, *, method="wam", seed=0, simulator="", untrained=(), **changes):
        config = quickstart.get_config(method)
        config.seed = seed
        config.update_from_flattened_dict(changes)
        return write(f"{folder}/{name}", json.loads(config.to_json_best_effort()), outcomes, simulator, untrained)

    return make


def write(workdir, config, outcomes, simulator="", untrained=()):
    rows = []
    for stage, tasks in outcomes.items():
        episodes = []
        for task, success in tasks.items():
            success = np.asarray(success, bool)
            fixed = {"environment": config["environment"], "method": config["method"], "seed": config["seed"]}
            row = tables.make_row(
                task=task, stage=stage, successes=int(success.sum()), episodes=len(success), imagined_success=None,
                simulator=simulator, **fixed,
            )  # fmt: skip
            rows.append(dataclasses.replace(row, untrained=stage == "ppo" and task in untrained))
            episodes += [tables.Episode(task, n, bool(success[n]), 72, simulator) for n in range(len(success))]
        order = np.random.default_rng(len(workdir)).permutation(len(episodes))  # kept as they end, so in any order
        tables.save(f"{workdir}/evaluation/{stage}.episodes.json", [episodes[i] for i in order])
    tables.save(f"{workdir}/table.json", rows)
    with open(f"{workdir}/config.json", "w") as file:
        json.dump(config, file)
    return workdir


def of(successes, episodes=10):
    """Outcomes of N episodes, the first of them successes."""
    return np.arange(episodes) < successes


def every_task(outcome):
    return {task: outcome for task in specs.TASKS}


def lines(text):
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert len({len(row) for row in cells}) == 1
    return {row[0]: row[1:] for row in cells}
