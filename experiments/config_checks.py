"""Checks of a config's values against each other, the machine and the data, before any work starts."""

import math

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from experiments import config_values
from experiments.configs import base
from wam_jax import datasets, environments, input_pipeline, inverse_dynamics, parallel, shards, specs, world_model

# Numbers by the name of their key. Whole numbers that are not named here are 1 or more, others 0 or more.
_LEAST = {"window_length": 2, "time_dim": 4, "num_windows": 2, "keep_checkpoints": 2} | dict.fromkeys(
    (
        *("seed", "num_devices", "min_start_step", "max_start_step", "critic_warmup", "warmup_steps", "num_members"),
        "config.ppo.max_steps",
    ),
    0,
)
_MAX_SEED = 2**31 - 1000  # seeds are int32 on the devices, and each task adds its number
_SHARES = (
    *("kl_balance", "ema_decay", "threshold", "discount", "gae_lambda", "denoising_discount", "min_trust"),
    *("disagreement_quantile", "disturbed_share"),
)
_POSITIVE = (
    *("learning_rate", "final_learning_rate", "actor_learning_rate", "critic_learning_rate", "temperature"),
    *("adam_epsilon", "kl_weight", "exploration_std", "evaluation_std", "noise_clip", "reward_clip", "clip_rate"),
)


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
    _check_ranges(config_values.flat(config.to_dict(), "config."))
    specs.task_index(config.evaluation.video_task)
    num_devices = parallel.device_count(config.num_devices)
    shared = [("world_model", "batch_size"), ("policy", "batch_size"), ("ppo", "num_rollouts")]
    if config.prior_ensemble.num_members:
        shared.append(("prior_ensemble", "batch_size"))
    for stage, key in shared:
        parallel.check_batch_size(config[stage][key], num_devices, name=f"config.{stage}.{key}")
    if config.reward.batch_size % (2 * num_devices):
        raise ValueError(
            f"config.reward.batch_size={config.reward.batch_size} must be even on each of {num_devices} devices: half "
            f"of a batch are successes; take a multiple of {2 * num_devices}"
        )
    trained = ("world_model", "prior_ensemble", "policy", "reward")
    for stage, key in [*((stage, "num_steps") for stage in trained), ("ppo", "num_iterations")]:
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
            least, most = _LEAST.get(name, _LEAST.get(key, 1)), _MAX_SEED if key == "seed" else math.inf
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
    for stage, key, *choices in (
        ("policy", "kind", "diffusion", "gaussian"),
        ("policy", "compute_dtype", "float32", "bfloat16"),
        ("reward", "kind", "classifier", "scene"),
    ):
        if config[stage][key] not in choices:
            raise ValueError(f"config.{stage}.{key}={config[stage][key]!r}; expected {' or '.join(map(repr, choices))}")
    if config.reward.kind == "scene" and not config.world_model.scene_weight:
        raise ValueError(
            "config.reward.kind='scene' needs a world model that decodes scene states, and config.world_model."
            "scene_weight is 0; take a weight above 0, e.g. 1000, or reward.kind=classifier"
        )
    if config.world_model.robot_state and config.world_model.action_input == "features":
        raise ValueError(
            "config.world_model.action_input='features' with robot_state: the features hold the measured state, "
            "from which the action can be read off; take action_input=embeddings or robot_state=False"
        )
    if config.world_model.robot_state and not config.world_model.proprioception_weight:
        raise ValueError(
            "config.world_model.robot_state=True learns the robot's state, and proprioception_weight is 0; "
            "take another, e.g. 1000"
        )
    chunk, max_steps = config.policy.chunk, config.ppo.max_steps or config.evaluation.max_steps
    for name, steps in (("evaluation", config.evaluation.max_steps), ("ppo", max_steps)):
        if steps < chunk or steps % chunk:
            raise ValueError(
                f"config.{name}.max_steps={steps} is not a positive multiple of config.policy.chunk={chunk}: an "
                f"episode, real or imagined, is a number of whole chunks; take {max(1, round(steps / chunk)) * chunk}"
            )
    _check_ensemble(config)
    _check_policy(config)
    decisions = config.ppo.num_rollouts * max_steps // chunk
    if config.ppo.batch_size < decisions:  # more means all of them, on any number of devices
        num_devices = parallel.device_count(config.num_devices)
        parallel.check_batch_size(config.ppo.batch_size, num_devices, name="config.ppo.batch_size")
    _check_rollouts(config.ppo)
    settings = config.world_model
    if (settings.action_weight > 0) != (config.method == "wam"):
        raise ValueError(
            f"config.world_model.action_weight={settings.action_weight} with method {config.method!r}: tables would "
            "name the wrong method; choose it with the config file, FILE.py:wam or FILE.py:dreamer_v2"
        )
    for key, names in (("action_input", inverse_dynamics.INPUTS), ("action_target", inverse_dynamics.TARGETS)):
        if settings[key] not in names:
            raise ValueError(f"config.world_model.{key}={settings[key]!r}; expected one of {', '.join(names)}")
    if settings.action_steps >= settings.window_length:
        raise ValueError(
            f"config.world_model.action_steps={settings.action_steps} frames apart do not fit into window_length="
            f"{settings.window_length}; take {settings.window_length - 1} or less"
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


def _check_ensemble(config: ConfigDict) -> None:
    """Checks that the reward has the ensemble that it asks for."""
    quantile, members = config.reward.disagreement_quantile, config.prior_ensemble.num_members
    if quantile and members < 2:
        raise ValueError(
            f"config.reward.disagreement_quantile={quantile} asks for priors that may disagree, and config."
            f"prior_ensemble.num_members={members}; take 2 or more, e.g. 5"
        )
    if quantile and config.reward.kind != "classifier":
        raise ValueError(
            f"config.reward.disagreement_quantile={quantile} limits the classifier's reward, and config.reward.kind="
            f"{config.reward.kind!r}; take reward.kind=classifier, or a quantile of 0"
        )
    if members and not quantile and not config.prior_ensemble.imagine:
        raise ValueError(
            f"config.prior_ensemble.num_members={members} would be trained for nothing: imagine=False and config."
            "reward.disagreement_quantile=0; change one of them, or take no members"
        )


def _check_policy(config: ConfigDict) -> None:
    """Checks how the policy is cloned."""
    draws, batch_size = config.policy.noise_draws, config.policy.batch_size
    per_device = batch_size // parallel.device_count(config.num_devices)
    if per_device % draws:
        raise ValueError(
            f"config.policy.noise_draws={draws} does not divide the {per_device} noised chunks of a batch on a device "
            f"(config.policy.batch_size={batch_size}); take a divisor, e.g. {math.gcd(draws, per_device)}"
        )
    if config.policy.kind == "gaussian" and draws > 1:
        raise ValueError(f"config.policy.noise_draws={draws}, but a Gaussian policy is cloned without noise; take 1")
    if config.policy.ema_decay == 1:
        raise ValueError(
            "config.policy.ema_decay=1.0 keeps the network as it was drawn for ever; take less, e.g. 0.995"
        )
    if config.policy.time_dim % 2:
        raise ValueError(f"config.policy.time_dim={config.policy.time_dim} is odd: half are sines, half cosines")


def _check_rollouts(settings: ConfigDict) -> None:
    """Checks where PPO's rollouts come from and that its policy can move."""
    for key, choices in (("rollouts", ("imagination", "environment")), ("starts", ("demonstrations", "play", "both"))):
        if settings[key] not in choices:
            raise ValueError(f"config.ppo.{key}={settings[key]!r}; expected one of {', '.join(choices)}")
    if settings.ema_decay == 1:
        raise ValueError("config.ppo.ema_decay=1.0 keeps the cloned policy for ever; expected less, e.g. 0.9")
    if settings.critic_warmup >= settings.num_iterations:
        raise ValueError(
            f"config.ppo.critic_warmup={settings.critic_warmup} leaves the actor none of num_iterations="
            f"{settings.num_iterations}; take fewer, or more iterations"
        )
    if settings.min_start_step > settings.max_start_step:
        raise ValueError(
            f"config.ppo.min_start_step={settings.min_start_step} exceeds max_start_step={settings.max_start_step}"
        )
    if settings.rollouts == "environment":
        # max_start_step has no effect either, but configs set it, and their rollouts are to be one value to change
        for key, value in (("starts", "demonstrations"), ("min_start_step", 0), ("min_trust", 0.0)):
            if settings[key] != value:
                raise ValueError(
                    f"config.ppo.{key}={settings[key]!r} is about imagination, and ppo.rollouts='environment' has "
                    f"none; take {value!r}"
                )
        for key in ("updates_per_call", "tasks_at_once"):
            if settings[key] != 1:
                raise ValueError(
                    f"config.ppo.{key}={settings[key]}, but rollouts of the environment are one iteration of one task "
                    "a call; take 1"
                )
        if jax.process_count() > 1:
            raise ValueError("config.ppo.rollouts='environment' runs in one process; start one")


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


def _check_play(config: ConfigDict) -> None:
    """Checks that named play is play, and that the config says of it what its plan says, where it was collected."""
    data, default = config.dataset, config_values.defaults(config.method)["dataset.disturbed_share"]
    plan = shards.read_plan(data.play) if data.play else {}
    if plan.get("kind") == "demonstrations":
        raise ValueError(
            f"config.dataset.play={data.play} holds demonstrations, not play; name a dataset of play, and these as "
            "config.dataset.demonstrations"
        )
    if plan.get("kind") != "play":
        return  # nothing is known without a plan, and converted play has no such share
    found = plan.get("disturbed_share", default)
    if not isinstance(found, int | float) or not 0 <= found <= 1:
        raise ValueError(
            f"{data.play}/{shards.PLAN_FILE} has disturbed_share={found!r}, expected a share from 0 to 1; collect that "
            "play again"
        )
    if found != data.disturbed_share:
        raise ValueError(
            f"config.dataset.disturbed_share={data.disturbed_share} decides how play is collected, and that of "
            f"config.dataset.play={data.play} is there, with {found}; take --config.dataset.disturbed_share={found}"
        )


def _check_windows(config: ConfigDict) -> None:
    """Checks that the windows of play fit into its episodes."""
    data = config.dataset
    if data.play:
        longest = max(datasets.episode_lengths(data.play, "train"))
        played = f"of {data.play}, the longest has {longest} steps; shorten the window"
    else:
        longest = data.play_steps
        played = f"of config.dataset.play_steps={longest}; shorten the window or play longer"
    for section in ("world_model", *(["prior_ensemble"] if config.prior_ensemble.num_members else [])):
        window = config[section].window_length
        if window > longest:
            raise ValueError(f"config.{section}.window_length={window} is longer than every episode {played}")


def _check_data(config: ConfigDict) -> None:
    """Checks the sizes of what will be collected, and opens what is there already."""
    data = config.dataset
    pictures = base.PICTURES if config.environment == "calvin" else base.PICTURES[:1]
    if data.pictures not in pictures:
        raise ValueError(
            f"config.dataset.pictures={data.pictures!r}; expected one of {', '.join(pictures)} for {config.environment}"
        )
    if data.cache not in input_pipeline.CACHES:
        raise ValueError(f"config.dataset.cache={data.cache!r}; expected one of {', '.join(input_pipeline.CACHES)}")
    if config.environment == "calvin":
        _check_pictures(data)
    _check_windows(config)
    _check_play(config)
    if data.demonstrations:
        found = set(datasets.episode_tasks(data.demonstrations))
        missing = [task for task in config.tasks if specs.task_index(task) not in found]
        if missing:
            raise ValueError(
                f"config.dataset.demonstrations={data.demonstrations} holds no demonstration of {', '.join(missing)}; "
                "collect some, or leave the task out: --config.tasks=\"('open_drawer',)\""
            )
