"""Measures CALVIN's simulator on one core: frames per CPU second as it draws them, and with every link drawn.

python -m experiments.measure_calvin --calvin_assets=calvin_env/data --output=docs/results/calvin_speed

Follows the expert of each task from a random start, with and without the links of the robot that no picture can show,
compares the pictures, and writes environment.json. CPU seconds count: other programs do little harm.
"""

import contextlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import flags

from experiments import simulators
from wam_jax import cli, json_files, metrics, specs
from wam_jax.environments.calvin import experts, follower, scene, starts, worker
from wam_jax.environments.calvin.simulator import Simulator

_OUTPUT = flags.DEFINE_string("output", "docs/results/calvin_speed", "Folder for environment.json")
_NUM_STEPS = flags.DEFINE_integer("num_steps", 60, "Steps of each task", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes."""
    del argv
    for name in ("calvin_workers", "calvin_python"):
        if flags.FLAGS[name].present:
            raise ValueError(f"--{name} has no effect here: one simulator runs in this process")
    os.makedirs(_OUTPUT.value, exist_ok=True)  # before minutes of work
    with _silence():
        figures = measure(simulators.calvin_options()["assets"], _NUM_STEPS.value)
    json_files.write(os.path.join(_OUTPUT.value, "environment.json"), figures)
    print(json.dumps(figures, indent=1))


def measure(directory: str, num_steps: int) -> dict:
    """Runs every expert in both simulators; a frame is both pictures of 64 x 64 pixels.

    Raises:
      ValueError: the simulator cannot run here.
    """
    quick, plain = Simulator(directory), Simulator(directory, draw_all=True)
    seconds: defaultdict[str, float] = defaultdict(float)

    def timed(name: str, work: Callable, *arguments):
        start = time.process_time()
        result = work(*arguments)
        seconds[name] += time.process_time() - start
        return result

    identical = 0
    for number, task in enumerate(specs.TASKS):
        rng = np.random.default_rng(number)
        start = starts.draw(quick, scene.get_scene("D"), task, rng)
        for simulator in (quick, plain):
            timed("reset", simulator.reset, *start)
            simulator.render(specs.IMAGE_SIZE, specs.IMAGE_SIZE)  # the first is slower
        target = np.concatenate([quick.target_position, quick.target_euler])
        plan = experts.plan(task, target, quick.scene_obs(), rng)
        for _ in range(num_steps):
            plan, action = follower.act(plan, quick.robot_obs())
            timed("step", quick.step, action)
            plain.step(action)
            pictures = timed("quick", quick.render, specs.IMAGE_SIZE, specs.IMAGE_SIZE)
            expected = timed("plain", plain.render, specs.IMAGE_SIZE, specs.IMAGE_SIZE)
            identical += sum(map(np.array_equal, pictures, expected))
    steps = num_steps * len(specs.TASKS)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": metrics.machine(),
        "simulator": worker.facts(worker.Settings(directory)),
        "pictures": 2 * steps,
        "identical_pictures": identical,
        "frames_per_cpu_second": round(steps / (seconds["step"] + seconds["quick"]), 1),
        "frames_per_cpu_second_of_all_links": round(steps / (seconds["step"] + seconds["plain"]), 1),
        "milliseconds": {
            "control step": round(1000 * seconds["step"] / steps, 2),
            "frame": round(1000 * seconds["quick"] / steps, 2),
            "frame of all links": round(1000 * seconds["plain"] / steps, 2),
            "reset": round(1000 * seconds["reset"] / (2 * len(specs.TASKS)), 2),
        },
    }


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps what pybullet's C code prints off the terminal."""
    stdout = os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


if __name__ == "__main__":
    cli.run(main)
