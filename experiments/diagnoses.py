"""The parts of a diagnosis: each a set of units, named pieces of work that are measured and kept one by one."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from experiments import (
    config_values,
    evaluate,
    finetune_policy,
    launch,
    simulators,
    train_policy,
    train_reward,
    train_world_model,
)
from wam_jax import calibration, datasets, evaluation, open_loop, probes, replay, trust
from wam_jax.calibration import Point
from wam_jax.diffusion_policy import PolicyParams
from wam_jax.evaluation import LatentPolicy
from wam_jax.open_loop import Probes, Windows
from wam_jax.types import LatentState, Params

Units = dict[str, Callable[[], dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says."""

    tasks: tuple[str, ...]
    num_episodes: int = 64  # of each policy and task, real and imagined
    seed_offset: int = 1000  # added to config.evaluation.seed, whose starts are for reporting only
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)  # policies between the cloned and the fine-tuned; beyond 1 past it
    noise: tuple[float, ...] = ()  # values of policy.evaluation_std for more policies, with worse aim
    contexts: tuple[int, ...] = (1, 10)  # frames that the model sees before it imagines
    horizons: tuple[int, ...] = (1, 2, 5, 10, 15, 20, 30, 40)
    train_windows: int = 400  # of play, for the probes
    num_windows: int = 256  # of play's validation split, at most


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A policy to diagnose."""

    name: str
    policy: PolicyParams
    noise: float | None = None  # evaluation_std in place of the config's


def settings(config, workdir: str, options: Options, part: str) -> dict[str, Any]:
    """What every unit of a part was made with; figures made with other values cannot stand beside them."""
    made_by = {"world_model_sha256": _digest(train_world_model.load(config, workdir)[1])}
    windows = {name: getattr(options, name) for name in ("contexts", "horizons", "train_windows", "num_windows")}
    windows["penalties_of_each_target"] = probes.PENALTIES
    if part == "open_loop":
        return made_by | windows
    if part == "trust":
        return made_by | {"num_episodes": options.num_episodes, "held_steps": trust.HOLD}
    episodes = made_by | {
        "num_episodes": options.num_episodes,
        "start_seed": _start_seed(config, options),
        "simulator": simulators.describe(simulators.make(config)),
    }
    return episodes | ({**windows, "parting_cm": replay.PARTING} if part == "divergence" else {})


def _digest(params: Params) -> str:
    """SHA-256 of the parameters, in the order of the tree."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def calibration_units(config, workdir: str, options: Options) -> Units:
    """Each policy on each task: success outside, and imagined from two kinds of starts.

    Raises:
      ValueError: policies, rewards or the world model are missing; or what else is asked for cannot be.
    """
    return {
        f"{task}/{candidate.name}": functools.partial(_calibrate, config, workdir, options, task, candidate, rewards)
        for task, rewards in _rewards(config, workdir, options).items()
        for candidate in candidates(config, workdir, task, options)
    }


def classifier_units(config, workdir: str, options: Options) -> Units:
    """The success classifier of each task on the episodes of the cloned and of the newest fine-tuned policy.

    Raises:
      ValueError: policies, rewards or the world model are missing.
    """
    return {
        f"{task}/{candidate.name}": functools.partial(_classify, config, workdir, options, task, candidate, rewards)
        for task, rewards in _rewards(config, workdir, options).items()
        for candidate in _first_and_last(config, workdir, task)
    }


def open_loop_units(config, workdir: str, options: Options) -> Units:
    """The probes on held-out play, and their errors against the horizon for each context and kind of feedback.

    Raises:
      ValueError: the world model or a split of play is missing, or play's episodes are too short.
    """
    train_world_model.load(config, workdir)
    directory, length = launch.play_directory(config, workdir), _window_length(options)
    for split in ("train", "validation"):
        longest = max(datasets.episode_lengths(directory, split))
        if longest < length:
            raise ValueError(
                f"{directory}: the longest episode of {split!r} has {longest} steps, but contexts and horizons take "
                f"{length}; take shorter ones, --horizons={longest - max(options.contexts)}"
            )
    kinds = {"soft": True, "sampled": False}
    return {"probes": functools.partial(_probe_figures, config, workdir, options)} | {
        f"context {context}, {kind}": functools.partial(_imagine_windows, config, workdir, options, context, soft)
        for context in options.contexts
        for kind, soft in kinds.items()
    }


def divergence_units(config, workdir: str, options: Options) -> Units:
    """The episodes of the cloned and the newest fine-tuned policy, beside the same actions imagined.

    Raises:
      ValueError: policies, rewards, the world model or play are missing.
    """
    open_loop_units(config, workdir, options)  # its probes are needed
    return {
        f"{task}/{candidate.name}": functools.partial(_diverge, config, workdir, options, task, candidate, rewards)
        for task, rewards in _rewards(config, workdir, options).items()
        for candidate in _first_and_last(config, workdir, task)
    }


def trust_units(config, workdir: str, options: Options) -> Units:
    """Recorded attempts at each task, imagined under their own actions: no step of the environment.

    Raises:
      ValueError: rewards, the world model or the demonstrations are missing.
    """
    return {
        task: functools.partial(_trust, config, workdir, options, task, rewards)
        for task, rewards in _rewards(config, workdir, options).items()
    }


PARTS = {
    "trust": trust_units,
    "calibration": calibration_units,
    "classifier": classifier_units,
    "open_loop": open_loop_units,
    "divergence": divergence_units,
}


def candidates(config, workdir: str, task: str, options: Options) -> list[Candidate]:
    """The cloned policy, every checkpoint that PPO kept, policies on the way to the newest, and noisy ones."""
    found = _trained_policies(config, workdir, task, finetune_policy.saved_iterations(workdir, task))
    base, last = found[0].policy.base, found[-1]
    if len(found) > 1:
        found += [
            Candidate(f"{last.name} x {share:g}", calibration.along_path(base, last.policy.finetuned, share))
            for share in options.shares
        ]
    return found + [Candidate(f"{last.name}, noise {std:g}", last.policy, std) for std in options.noise]


def _first_and_last(config, workdir: str, task: str) -> list[Candidate]:
    return _trained_policies(config, workdir, task, finetune_policy.saved_iterations(workdir, task)[-1:])


def _trained_policies(config, workdir: str, task: str, iterations: list[int]) -> list[Candidate]:
    """The cloned policy and those of PPO's checkpoints.

    Without checkpoints that equal the cloned policy, those of the critic's warm-up or of a task that was left
    untrusted: as points of their own they would only be that policy again.
    """
    base = train_policy.load(config, workdir, task)
    tuned = {f"ppo {i}": finetune_policy.load_iteration(config, workdir, task, i) for i in iterations}
    return [Candidate("bc", PolicyParams(base=base, finetuned=base))] + [
        Candidate(name, policy)
        for name, policy in tuned.items()
        if not jax.tree.all(jax.tree.map(np.array_equal, policy.finetuned, base))
    ]


def _rewards(config, workdir: str, options: Options) -> dict[str, Params]:
    train_world_model.load(config, workdir)
    simulators.check_starts(simulators.make(config), options.tasks, options.num_episodes)
    return {task: train_reward.load(config, workdir, task) for task in options.tasks}


def _start_seed(config, options: Options) -> int:
    return config.evaluation.seed + options.seed_offset


def _with_options(config, options: Options, noise: float | None = None) -> FrozenConfigDict:
    """The config as the evaluation reads it, for this diagnosis' episodes."""
    seed = _start_seed(config, options)
    config = config_values.changed(config, "evaluation", num_episodes=options.num_episodes, seed=seed)
    return config if noise is None else config_values.changed(config, "policy", evaluation_std=noise)


def _trained(config, workdir: str, candidate: Candidate, rewards: Params) -> evaluate.Trained:
    return evaluate.Trained(candidate.policy, rewards, *train_world_model.load(config, workdir))


def _calibrate(
    config, workdir: str, options: Options, task: str, candidate: Candidate, rewards: Params
) -> dict[str, Any]:
    environment, trained = simulators.make(config), _trained(config, workdir, candidate, rewards)
    changed = _with_options(config, options, candidate.noise)
    policy = evaluate.make_policy(changed, environment, trained)
    rng, episodes = jax.random.key(_start_seed(config, options)), options.num_episodes
    real = [
        evaluation.rollout(environment, policy, task, rng, numbers=batch, max_steps=config.evaluation.max_steps)
        for batch in evaluate.batches(range(episodes), config.evaluation.batch_size)
    ]
    successes = sum(int(batch.success.sum()) for batch in real)

    def imagined(bank: LatentState) -> int:
        return round(evaluate.imagined_success(changed, trained, bank) * episodes)

    bank = _ppo_starts(config, workdir, task)
    point = Point(
        task, candidate.name, episodes, successes,
        demonstrations=None if bank is None else imagined(bank),
        imagined_real=imagined(evaluate.start_latents(changed, environment, policy, task)),
    )  # fmt: skip
    return dataclasses.asdict(point)


@functools.lru_cache(maxsize=1)  # a task's policies come one after another
def _ppo_starts(config, workdir: str, task: str) -> LatentState | None:
    return finetune_policy.start_bank(config, workdir, task, train_reward.load(config, workdir, task))[0]


def _record(config, workdir: str, options: Options, task: str, candidate: Candidate) -> tuple[Windows, np.ndarray]:
    """A policy's episodes, encoded: windows of all frames, and whether each frame is solved, bool [B, T + 1]."""
    model, params = train_world_model.load(config, workdir)
    environment, policy_settings = simulators.make(config), train_policy.policy_settings(config)
    batches = replay.record(
        environment,
        LatentPolicy(model, params, candidate.policy, policy_settings),
        task,
        jax.random.key(_start_seed(config, options)),
        batches=evaluate.batches(range(options.num_episodes), config.evaluation.batch_size),
        max_steps=config.evaluation.max_steps,
    )
    solved = []

    def noted() -> Iterator:
        for batch in batches:
            solved.append(batch.reward > 0.5)
            yield batch

    windows = open_loop.encode(model, params, noted())
    return windows, np.concatenate(solved)


def _trust(config, workdir: str, options: Options, task: str, rewards: Params) -> dict[str, Any]:
    """The first demonstrations, and as many attempts of play and of its validation split, from their first frames."""
    model, params = train_world_model.load(config, workdir)
    sources = {"demonstrations": train_policy.encode_demonstrations(config, workdir)[task]}
    for split in ("train", "validation"):
        sources |= {split: train_reward.encode_attempts(config, workdir, split, [task])[task]}
    judging = {
        "reward_rule": finetune_policy.imagination_functions(config, model)["reward_rule"],
        "reward_params": rewards,
        "policy_settings": train_policy.policy_settings(config),
    }
    found = {}
    for name, (encoded, episodes) in sources.items():
        chosen = encoded[: options.num_episodes], episodes[: options.num_episodes]
        _, verdicts = trust.start_bank(model, params, *chosen, jax.random.key(config.seed), 0, 0, **judging)
        found[name] = trust.agreement(verdicts)
    return found


def _classify(
    config, workdir: str, options: Options, task: str, candidate: Candidate, rewards: Params
) -> dict[str, Any]:
    windows, solved = _record(config, workdir, options, task, candidate)
    features = _filter(config, workdir, options, windows)
    rule = train_reward.rule(config, train_world_model.load(config, workdir)[0])
    quality = replay.classifier_quality(rewards, features, solved[:, 1:], **rule)
    return quality | {"data": train_reward.read_quality(workdir).get(task, {})}


def _filter(config, workdir: str, options: Options, windows: Windows) -> np.ndarray:
    model, params = train_world_model.load(config, workdir)
    rng = jax.random.key(_start_seed(config, options))
    return open_loop.filtered(model, params, windows, rng, settings=train_policy.policy_settings(config))


def _window_length(options: Options) -> int:
    return max(options.contexts) + max(options.horizons)


@functools.lru_cache(maxsize=1)
def _probes(config, workdir: str, length: int, num_windows: int) -> tuple[Probes, int]:
    """The probes, and the number of training windows they were fitted on."""
    model, params = train_world_model.load(config, workdir)
    batches = datasets.read_windows(launch.play_directory(config, workdir), "train", length, num_windows)
    windows = open_loop.encode(model, params, batches)
    rng = jax.random.key(config.seed)
    features = open_loop.filtered(model, params, windows, rng, settings=train_policy.policy_settings(config))
    return open_loop.fit_probes(windows, features), len(windows.action)


@functools.lru_cache(maxsize=1)
def _validation(config, workdir: str, length: int, num_windows: int) -> Windows:
    model, params = train_world_model.load(config, workdir)
    directory = launch.play_directory(config, workdir)
    return open_loop.encode(model, params, datasets.read_windows(directory, "validation", length, num_windows))


def _probe_figures(config, workdir: str, options: Options) -> dict[str, Any]:
    """On held-out windows: all frames; at the horizons' frames the filter that sees them; and standing still."""
    length = _window_length(options)
    fitted, train_windows = _probes(config, workdir, length, options.train_windows)
    windows = _validation(config, workdir, length, options.num_windows)
    features = _filter(config, workdir, options, windows)
    first = max(options.contexts) - 1
    frames = [first + h for h in options.horizons]
    still = np.repeat(windows.state[:, first : first + 1], len(frames), axis=1)
    return {
        "train_windows": train_windows,
        "windows": len(windows.action),
        "window_length": length,
        "held_out": open_loop.held_out(fitted, windows, features),
        "filtered": open_loop.curves(fitted, features[:, first:], windows, first=first, horizons=options.horizons),
        "standing_still": open_loop.state_curves(still, windows, frames),
    }


def _imagine_windows(config, workdir: str, options: Options, context: int, soft: bool) -> dict[str, Any]:
    length, first = _window_length(options), max(options.contexts) - 1
    fitted, _ = _probes(config, workdir, length, options.train_windows)
    windows = _validation(config, workdir, length, options.num_windows)
    model, params = train_world_model.load(config, workdir)
    model = dataclasses.replace(model, settings=launch.stage_settings(config.world_model, soft_prior=soft))
    features = open_loop.imagined(
        model, params, windows, jax.random.key(_start_seed(config, options)),
        settings=train_policy.policy_settings(config), first=first, context=context, horizon=max(options.horizons),
    )  # fmt: skip
    return open_loop.curves(fitted, features, windows, first=first, horizons=options.horizons)


def _diverge(
    config, workdir: str, options: Options, task: str, candidate: Candidate, rewards: Params
) -> dict[str, Any]:
    windows, solved = _record(config, workdir, options, task, candidate)
    model, params = train_world_model.load(config, workdir)
    filtered = _filter(config, workdir, options, windows)
    imagine = functools.partial(
        open_loop.imagined, model, params, windows, jax.random.key(_start_seed(config, options)), first=0, context=1,
        settings=train_policy.policy_settings(config), horizon=config.evaluation.max_steps,
    )  # fmt: skip
    imagined = imagine()
    rule = train_reward.rule(config, model)
    has_robot = config.world_model.robot_state
    fitted, _ = _probes(config, workdir, _window_length(options), options.train_windows)
    episodes = replay.Replay(
        imagined=imagined[:, 1:],
        filtered=filtered[:, 1:],
        state=windows.state[:, 1:],
        solved=solved[:, 1:],
        imagined_fires=replay.fires(rewards, imagined, **rule),
        filtered_fires=replay.fires(rewards, filtered, **rule),
        recorded_robot_fires=replay.fires(rewards, imagine(recorded_robot=True), **rule) if has_robot else None,
    )
    mechanism, consecutive = probes.task_quantity(task), config.reward.consecutive
    return replay.divergence(episodes, fitted.state, mechanism, consecutive=consecutive, slack=config.policy.chunk)
