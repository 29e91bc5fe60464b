"""Trains the success classifier of each task on latents: it is the reward of PPO in imagination.

With `reward.disagreement_quantile` it also finds how much the ensemble may disagree on a frame that counts.

python -m experiments.train_reward --config=experiments/configs/quickstart.py --workdir=runs/quickstart
"""

import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments import launch, train_policy, train_world_model
from wam_jax import (
    datasets,
    json_files,
    latents,
    parallel,
    prior_ensemble,
    raw_cache,
    reward_rules,
    specs,
    success_classifier,
    training,
    world_model,
)
from wam_jax.networks import rssm
from wam_jax.types import LatentState, Params, StepBatch
from wam_jax.world_model import WorldModel

_init = jax.jit(success_classifier.init, static_argnums=(1, 2))  # one program, not one for each operation
_ROWS = 1024  # states at a time whose disagreement is measured
_IMAGINED = 1  # tells the key of imagination from those of the filter


def run(config, workdir: str) -> None:
    """Trains the classifier of every task to `reward.num_steps`, and measures it on held-out play; then the limits."""
    if config.reward.kind == "scene":
        print("reward.kind='scene': the rule reads what the world model decodes; there is nothing to train")
        return
    read_limits(workdir)  # what is damaged or missing is named before any work
    if config.reward.disagreement_quantile:
        train_world_model.load_ensemble(config, workdir)
    _train(config, workdir)
    if config.reward.disagreement_quantile:
        _limit_disagreement(config, workdir)


def _train(config, workdir: str) -> None:
    settings = reward_settings(config)
    quality = read_quality(workdir)
    tasks = [
        task
        for task in config.tasks
        if training.steps_done(workdir, stage(task)) < settings.num_steps or task not in quality
    ]
    if not tasks:
        return
    devices = parallel.local_devices(config.num_devices)
    update = functools.partial(success_classifier.update_from_bank, settings=settings, axis_name=parallel.AXIS_NAME)
    compiled = parallel.compile_updates(update, devices, num_updates=settings.updates_per_call)
    demonstrations = train_policy.encode_demonstrations(config, workdir)
    held_out = encode_attempts(config, workdir, "validation", tasks)
    play = encode_attempts(config, workdir, "train", tasks) if settings.use_play else {}
    banks = []
    for task in tasks:
        more_latents, more_episodes = play.get(task, ([], []))
        demonstrated, episodes = demonstrations[task]
        encoded, episodes = demonstrated + more_latents, episodes + more_episodes
        if settings.use_imagined:
            imagined, followed = imagine_attempts(config, workdir, task, encoded, episodes)
            encoded, episodes = encoded + imagined, episodes + followed
        banks.append(latents.classifier_bank(encoded, episodes))
        success_classifier.check_labels(banks[-1].label, task=task)
    for task, bank in zip(tasks, latents.pad_classifier_banks(banks), strict=True):
        state = training.fit(
            compiled,
            initial_state(config, task),
            training.repeat(parallel.replicate(bank, devices)),
            stage=stage(task),
            workdir=workdir,
            settings=settings.to_dict(),
            seed=config.seed + specs.task_index(task),
            num_steps=settings.num_steps,
            updates_per_call=settings.updates_per_call,
            save_every=settings.save_every,
            devices=devices,
        )
        quality[task] = _quality(state.params, bank, held_out[task], settings)
        _write_limits(workdir, {other: limit for other, limit in read_limits(workdir).items() if other != task})
        if parallel.is_first_process():
            write_quality(workdir, quality)


def stage(task: str) -> str:
    """Name of the stage, and the folder of its checkpoints in the workdir."""
    return f"reward/{task}"


def reward_settings(config):
    """`config.reward` with what follows from the rest: the share of a device in the batch, and the kind of features."""
    batch_size = config.reward.batch_size // parallel.device_count(config.num_devices)
    return launch.stage_settings(config.reward, batch_size=batch_size, soft_feature=config.policy.soft_feature)


def initial_state(config, task: str) -> success_classifier.ClassifierState:
    """The classifier before training."""
    rng = jax.random.fold_in(jax.random.key(config.seed), specs.task_index(task))
    return _init(rng, world_model.feature_dim(config.world_model), reward_settings(config))


def encode_attempts(
    config, workdir: str, split: str, tasks: Sequence[str]
) -> dict[str, tuple[list[LatentState], list[StepBatch]]]:
    """The annotated attempts of play at some tasks, failures among them, and their latents; none without the split.

    Those of all tasks can be gigabytes, and nothing is kept here: who needs them one task after another asks so. Where
    the split has a raw cache they are views into it, and nothing is decoded.
    """
    model, params = train_world_model.load(config, workdir)
    directory = launch.play_directory(config, workdir)
    read = raw_cache.read_attempts if raw_cache.is_current(directory, split) else datasets.read_attempts
    attempts = read(directory, split, [specs.task_index(task) for task in tasks])
    encoded = {}
    for task in tasks:
        chosen = attempts[specs.task_index(task)]
        rng = jax.random.fold_in(jax.random.key(config.seed), specs.task_index(task))
        encoded[task] = latents.encode_episodes(model, params, chosen, rng), chosen
    return encoded


def imagine_attempts(
    config, workdir: str, task: str, encoded: list[LatentState], episodes: list[StepBatch]
) -> tuple[list[LatentState], list[StepBatch]]:
    """The attempts at a task as the world model imagines them under their own actions, with the oracle's verdicts."""
    model, params = train_world_model.load(config, workdir)
    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), specs.task_index(task)), _IMAGINED)
    return latents.imagine_episodes(model, params, encoded, episodes, rng)


def _limit_disagreement(config, workdir: str) -> None:
    """Writes `reward/disagreement.json`: for each task the ensemble's disagreement below which a frame may count."""
    limits = read_limits(workdir)
    for task in [task for task in config.tasks if task not in limits]:
        attempts = encode_attempts(config, workdir, "train", [task])[task]
        limits[task] = _max_disagreement(config, workdir, task, *attempts)
        if limits[task] is None:
            print(
                f"{task}: imagination shows none of the successes in {len(attempts[1])} attempts of play, so nothing "
                "says how much the ensemble may disagree: every frame may count",
                flush=True,
            )
        _write_limits(workdir, limits)


def _max_disagreement(
    config, workdir: str, task: str, encoded: list[LatentState], episodes: list[StepBatch]
) -> float | None:
    """The quantile of the disagreement over the successes of some attempts that imagination, too, shows as such.

    None where it shows none.
    """
    shown = _shown_successes(config, workdir, task, encoded, episodes)
    if not len(shown):
        return None
    ensemble, params = train_world_model.load_ensemble(config, workdir)
    measure = jax.jit(functools.partial(prior_ensemble.disagreement, ensemble))
    parts = [measure(params, shown[i : i + _ROWS]) for i in range(0, len(shown), _ROWS)]
    return float(np.quantile(np.concatenate(parts), config.reward.disagreement_quantile))


def _shown_successes(
    config, workdir: str, task: str, encoded: list[LatentState], episodes: list[StepBatch]
) -> np.ndarray:
    """Imagined h [N, D] of the frames that the oracle finds solved, as they were recorded, and the classifier, too."""
    if not episodes:
        return np.zeros((0, config.world_model.deterministic_dim), np.float32)
    rows = latents.classifier_bank(*imagine_attempts(config, workdir, task, encoded, episodes))
    settings, params = reward_settings(config), _load_classifier(config, workdir, task)
    feature = rssm.feature(rows.latent, soft=settings.soft_feature)
    positive = reward_rules.by_classifier(params, feature, feature, settings=settings)
    return np.asarray(rows.latent.deterministic)[np.asarray(positive) & (rows.label == 1)]


def _quality(params: Params, bank, held_out, settings) -> dict:
    """Frame-wise precision and recall, on the training rows, imagined ones among them, and on real held-out play."""
    measured = {"train": success_classifier.evaluate(params, bank, settings=settings)}
    if held_out[0]:
        rows = latents.classifier_bank(*held_out)
        measured["held_out"] = success_classifier.evaluate(params, rows, settings=settings)
    return jax.tree.map(lambda x: round(float(np.asarray(x)), 4), measured)


def read_quality(workdir: str) -> dict:
    """What `write_quality` has written, {} where it has not."""
    path = os.path.join(workdir, "reward", "quality.json")
    return json_files.read(path, "delete it; the same command writes it again", dict) if os.path.exists(path) else {}


def write_quality(workdir: str, quality: dict) -> None:
    """Writes `reward/quality.json`: for each task and split precision, recall, accuracy and the share of successes."""
    json_files.write(os.path.join(workdir, "reward", "quality.json"), quality)


def read_limits(workdir: str) -> dict[str, float | None]:
    """Of each task the largest disagreement of the ensemble, in nats, on a frame that counts; None is no limit.

    Raises:
      ValueError: the file holds something else.
    """
    path = _limits_path(workdir)
    mend = "delete it and run experiments.train_reward with this config and workdir again"
    limits = json_files.read(path, mend) if os.path.exists(path) else {}
    if not isinstance(limits, dict) or not all(map(_is_limit, limits.values())):
        raise ValueError(f"{path} holds {limits!r}; expected for each task a number of nats, or null; {mend}")
    return limits


def _is_limit(value: Any) -> bool:
    return value is None or (type(value) is float and 0 <= value < math.inf)


def _write_limits(workdir: str, limits: dict[str, float | None]) -> None:
    if parallel.is_first_process() and limits != read_limits(workdir):
        json_files.write(_limits_path(workdir), limits)


def _limits_path(workdir: str) -> str:
    return os.path.join(workdir, "reward", "disagreement.json")


def rule(config, model: WorldModel) -> dict:
    """The reward rule's verdict and the number of frames in a row, as reward_rules.py asks for them."""
    if config.reward.kind == "scene":
        verdict = functools.partial(reward_rules.by_scene, decoder=model.scene_decoder)
    else:
        verdict = functools.partial(reward_rules.by_classifier, settings=reward_settings(config))
        if config.reward.disagreement_quantile:
            ensemble = train_world_model.build_ensemble(config)
            verdict = functools.partial(reward_rules.where_ensemble_agrees, verdict=verdict, ensemble=ensemble)
    return {"verdict": verdict, "consecutive": config.reward.consecutive}


def load(config, workdir: str, task: str) -> Params:
    """What the reward rule of a task reads: the success classifier, or the world model's decoder of scene states.

    With `reward.disagreement_quantile` the ensemble and the task's limit, too.

    Raises:
      ValueError: one of them is missing.
    """
    if config.reward.kind == "scene":
        return reward_rules.scene_params(train_world_model.load(config, workdir)[1], task)
    params = _load_classifier(config, workdir, task)
    if not config.reward.disagreement_quantile:
        return params
    limits = read_limits(workdir)
    if task not in limits:
        raise ValueError(
            f"{_limits_path(workdir)} has no limit for {task}; run experiments.train_reward with this config and "
            "workdir first"
        )
    limit, ensemble_params = limits[task], train_world_model.load_ensemble(config, workdir)[1]
    return reward_rules.agreement_params(params, ensemble_params, math.inf if limit is None else limit)


def _load_classifier(config, workdir: str, task: str) -> Params:
    template = jax.eval_shape(functools.partial(initial_state, config, task))
    return training.load_finished(
        template, stage=stage(task), workdir=workdir, settings=reward_settings(config).to_dict(),
        num_steps=config.reward.num_steps, binary="train_reward",
    ).params  # fmt: skip


if __name__ == "__main__":
    launch.main(run, trains=True)
