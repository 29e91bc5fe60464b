"""Measures Playtable: frames and control steps per second, and the scripted experts' success with intervals.

python -m experiments.measure_playtable --output=docs/results/playtable/speed

Writes environment.json (a row per figure) and experts.json (rows of results). Run it with nothing else running; with
`taskset -c 0` in front it is the speed of one core.
"""

import functools
import json
import os
import statistics
import time

import jax
import jax.numpy as jnp
from absl import flags

from wam_jax import cli, environments, evaluation, json_files, metrics, specs, tables
from wam_jax.environments.playtable import dynamics, environment, starts

_OUTPUT = flags.DEFINE_string("output", "docs/results/playtable/speed", "Folder for environment.json and experts.json")
_NUM_ENVIRONMENTS = flags.DEFINE_integer("num_environments", 64, "Tables side by side", lower_bound=1)
_NUM_EPISODES = flags.DEFINE_integer("num_episodes", 256, "Random starts per task for the experts", lower_bound=1)
_REPEATS = 7


def main(argv) -> None:
    """Measures, prints and writes."""
    del argv
    figures = measure_speed(_NUM_ENVIRONMENTS.value)
    json_files.write(os.path.join(_OUTPUT.value, "environment.json"), figures)
    print(json.dumps(figures, indent=1))
    rows = [evaluate_expert(task, _NUM_EPISODES.value) for task in specs.TASKS]
    tables.save(os.path.join(_OUTPUT.value, "experts.json"), rows)
    print(tables.markdown(rows))


def measure_speed(num_environments: int) -> dict:
    """Median throughput of rendering (both cameras) and of physics, per wall second and per CPU second."""
    state = jax.jit(jax.vmap(starts.reset))(jax.random.split(jax.random.key(0), num_environments))
    observe = jax.jit(jax.vmap(environment.observe))
    steps = 50

    @jax.jit
    def move(state, rng):
        def step(state, rng):
            action = jax.random.uniform(rng, (num_environments, specs.ACTION_DIM), minval=-1, maxval=1)
            return jax.vmap(dynamics.step)(state, action), None

        return jax.lax.scan(step, state, jax.random.split(rng, steps))[0]

    render = _throughput(functools.partial(observe, state), num_environments)
    physics = _throughput(functools.partial(move, state, jax.random.key(0)), steps * num_environments)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": metrics.machine(),
        "environments": num_environments,
        "frames_per_second": render,
        "control_steps_per_second": physics,
    }


def _throughput(run, items: int) -> dict[str, int]:
    jax.block_until_ready(run())  # compiles
    wall, cpu = [], []
    for _ in range(_REPEATS):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    return {"wall": round(items / statistics.median(wall)), "per_cpu_second": round(items / statistics.median(cpu))}


def evaluate_expert(task: str, num_episodes: int) -> tables.Row:
    """An expert's success from random starts within the papers' limit of 72 steps."""
    table = environments.make("playtable")
    result = evaluation.rollout(
        table, evaluation.ScriptedPolicy(table), task, jax.random.key(0),
        numbers=range(num_episodes), max_steps=specs.MAX_EPISODE_STEPS,
    )  # fmt: skip
    return tables.make_row(
        environment=table.name, method="-", task=task, stage="expert",
        successes=int(jnp.sum(result.success)), episodes=num_episodes, imagined_success=None, seed=0,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
