"""Runs a config's whole chain, from nothing to the table; finished stages are skipped, broken ones go on.

python -m experiments.reproduce --config=experiments/configs/quickstart.py --workdir=runs/quickstart

--reuse=OTHER_WORKDIR takes over what the config would make just the same as another run did: one lever, one command.
--until=evaluate_bc stops after that stage, here before PPO; the same command without it goes on.
"""

import os
import time

import jax
from absl import flags, logging

from experiments import (
    collect_calvin,
    collect_playtable,
    evaluate,
    finetune_policy,
    launch,
    reuse,
    simulators,
    train_policy,
    train_reward,
    train_world_model,
)
from wam_jax import evaluation, json_files, metrics, tables, videos

VIDEO_CONTEXT = 5  # real frames the model sees before it predicts the rest


def run(config, workdir: str, source: str = "", until: str = "video") -> None:
    """Runs the stages and prints the table.

    Args:
      config, workdir: of the run.
      source: a run to take over from what would be the same; empty: none.
      until: the last of STAGES to run.
    """
    simulators.check(config)
    if source:
        print(
            f"taken over from {source}: {', '.join(reuse.take_over(config, workdir, source)) or 'nothing'}", flush=True
        )
    names = list(STAGES)[: list(STAGES).index(until) + 1]
    for number, name in enumerate(names, start=1):
        print(f"[{number}/{len(names)}] {name}", flush=True)
        started = time.monotonic()
        try:
            STAGES[name](config, workdir)
        finally:  # an interrupted stage has cost its seconds too
            note_seconds(workdir, name, time.monotonic() - started)
    rows = evaluate.write_table(workdir)
    if rows:
        print(f"\n{tables.markdown(rows)}")
    print(f"written to {workdir}: {', '.join(sorted(set(os.listdir(workdir)) - {'.lock'}))}")


def collect(config, workdir: str) -> None:
    """Collects play and demonstrations, where the config names no directories of them."""
    stage = collect_calvin if config.environment == "calvin" else collect_playtable
    stage.run(config, workdir)


def evaluate_bc(config, workdir: str) -> None:
    """Evaluates the cloned policies."""
    evaluate.run(config, workdir, "bc")


def evaluate_ppo(config, workdir: str) -> None:
    """Evaluates the fine-tuned policies."""
    evaluate.run(config, workdir, "ppo")


def film(config, workdir: str) -> None:
    """Writes rollout.gif: the first evaluated episode of the final policy beside the model's open-loop prediction."""
    path = os.path.join(workdir, "rollout.gif")
    if os.path.exists(path):
        return
    task = config.evaluation.video_task if config.evaluation.video_task in config.tasks else config.tasks[0]
    policy = evaluate.latent_policy(config, workdir, "ppo", task)
    rng = jax.random.key(config.evaluation.seed)
    result = evaluation.rollout(  # a whole batch again: the evaluation's compiled programs serve
        simulators.make(config), policy, task, rng, films=1, max_steps=config.evaluation.max_steps,
        numbers=range(min(config.evaluation.batch_size, config.evaluation.num_episodes)),
    )  # fmt: skip
    video, actions = jax.tree.map(lambda x: x[0], (result.video, result.actions))
    model, params = train_world_model.load(config, workdir)
    predicted = videos.open_loop(model, params, video, actions, rng, context=VIDEO_CONTEXT)
    videos.save_gif(path, videos.side_by_side(video, predicted, context=VIDEO_CONTEXT))


def note_seconds(workdir: str, stage: str, seconds: float) -> None:
    """Adds wall seconds to a stage's sum in stages.json, over all runs that worked on it."""
    path = os.path.join(workdir, "stages.json")
    try:
        before = json_files.read(path, "", dict).get("seconds")
    except (OSError, ValueError):  # none yet, or damaged: they are only notes
        before = None
    sums = before if isinstance(before, dict) else {}
    spent = sums.get(stage, 0.0)
    spent = spent if isinstance(spent, float | int) else 0.0
    json_files.write(path, {"machine": metrics.machine(), "seconds": {**sums, stage: round(spent + seconds, 1)}})
    logging.info("%s took %.1f s", stage, seconds)


STAGES = {
    "collect": collect,
    "world_model": train_world_model.run,
    "policy": train_policy.run,
    "reward": train_reward.run,
    "evaluate_bc": evaluate_bc,
    "ppo": finetune_policy.run,
    "evaluate_ppo": evaluate_ppo,
    "video": film,
}

if __name__ == "__main__":
    _REUSE = flags.DEFINE_string("reuse", "", "Workdir of another run, to take over what would be the same here")
    _UNTIL = flags.DEFINE_enum("until", "video", list(STAGES), "The last stage to run")
    launch.main(lambda config, workdir: run(config, workdir, _REUSE.value, _UNTIL.value))
