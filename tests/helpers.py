"""Tiny settings, made-up steps and sampling without noise, shared by the tests."""

import dataclasses
import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from experiments.configs import quickstart
from wam_jax import input_pipeline, parallel, reward_rules, rlds, specs, world_model, world_model_training
from wam_jax import shards as shard_files
from wam_jax.types import LatentState, Observation, StepBatch

ROOT = Path(__file__).resolve().parent.parent
B, T = 4, 8
WORLD_MODEL = dict(
    encoder_width=4,
    fused_dim=16,
    deterministic_dim=16,
    num_latents=4,
    num_classes=4,
    rssm_hidden_dim=16,
    decoder_width=4,
    decoder_dim=16,
    inverse_dynamics_dims=(16, 16),
    proprioception_dims=(16,),
    scene_dims=(16,),
    kl_weight=3.0,
    kl_balance=0.8,
    proprioception_weight=10.0,
    open_loop_weight=1.0,
    open_loop_steps=4,
    soft_prior=False,
    learning_rate=1e-3,
    final_learning_rate=1e-3,
    batch_size=B,
    window_length=T,
    num_steps=4,
    updates_per_call=2,
    save_every=2,
)
POLICY = dict(
    hidden_dim=16, denoising_steps=4, finetuned_steps=2, warmup_steps=1, batch_size=8, num_steps=4, updates_per_call=2,
    save_every=2,
)  # fmt: skip
REWARD = dict(
    embedding_dims=(16, 16), classification_dims=(16,), consecutive=1, batch_size=16, num_steps=4, updates_per_call=2,
    save_every=2,
)  # fmt: skip
PPO = dict(num_iterations=4, num_rollouts=8, epochs=2, critic_hidden_dim=16, updates_per_call=2, save_every=2)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """For modules that compile far longer than they compute: they make it their own by naming it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_config(method: str = "wam", **world_model_changes) -> ConfigDict:
    """The quickstart with networks of a few units, still to be frozen."""
    config = quickstart.get_config(method)
    config.world_model.update(WORLD_MODEL | world_model_changes)
    config.policy.update(POLICY)
    config.reward.update(REWARD)
    config.ppo.update(PPO)
    config.evaluation.max_steps = 12  # 3 decisions
    return config


def make_model(method: str = "wam", **world_model_changes) -> world_model.WorldModel:
    return world_model.build(FrozenConfigDict(make_config(method, **world_model_changes).world_model))


def freeze(settings: ConfigDict, **changes) -> FrozenConfigDict:
    """A stage's settings as the binaries hand them on, with derived values."""
    return FrozenConfigDict({**settings.to_dict(), **changes})


def classifier_rule(settings):
    """The reward rule of imagination by the success classifier."""
    verdict = functools.partial(reward_rules.by_classifier, settings=settings)
    return functools.partial(reward_rules.in_a_row, verdict=verdict, consecutive=settings.consecutive)


@functools.cache
def make_state(model: world_model.WorldModel) -> world_model_training.WorldModelState:
    """The state before the first update, on the host."""
    return jax.device_get(jax.jit(functools.partial(world_model_training.create_state, model))(jax.random.key(0)))


def make_steps(seed: int = 0, shape: tuple[int, ...] = (B, T)) -> StepBatch:
    """Steps in which the hand moves by the actions, so that the actions can be read off; images of one colour each."""
    rng = np.random.default_rng(seed)
    action = rng.uniform(-1, 1, (*shape, specs.ACTION_DIM)).astype(np.float32)
    action[..., -1] = np.where(action[..., -1] > 0, 1, -1)
    robot_obs = np.zeros((*shape, specs.ROBOT_OBS_DIM), np.float32)
    robot_obs[..., 1:, :6] = 0.1 * np.cumsum(action[..., :-1, :6], axis=-2)
    robot_obs[..., 1:, 14] = action[..., :-1, 6]
    colour = rng.integers(0, 256, (2, *shape, 1, 1, 3), np.uint8)
    static, gripper = np.broadcast_to(colour, (2, *shape, specs.IMAGE_SIZE, specs.IMAGE_SIZE, 3)).copy()
    position = np.broadcast_to(np.arange(shape[-1]), shape)
    scene_obs = np.zeros((*shape, specs.SCENE_OBS_DIM), np.float32)
    return StepBatch(
        observation=Observation(static, gripper, robot_obs, scene_obs),
        action=action,
        is_first=position == 0,
        is_last=position == shape[-1] - 1,
        task=np.full(shape, -1, np.int32),
        reward=np.zeros(shape, np.float32),
    )


def make_latents(seed: int, shape: tuple[int, ...], settings) -> LatentState:
    """Made-up states of the RSSM, numpy."""
    rng = np.random.default_rng(seed)
    latent_shape = (*shape, settings.num_latents, settings.num_classes)
    logits = rng.normal(size=latent_shape).astype(np.float32)
    stochastic = (logits == logits.max(axis=-1, keepdims=True)).astype(np.float32)
    return LatentState(rng.normal(size=(*shape, settings.deterministic_dim)).astype(np.float32), logits, stochastic)


class Drawer:
    """A table on which only the drawer moves, by a tenth of an action's first entry."""

    name = "drawer"

    def __init__(self):
        self.drawn = []  # whose pictures were asked for, at the start and after each chunk

    def reset_to_task(self, rng, task, number):
        assert len(task) == len(number)
        return jax.random.uniform(rng, (100,), maxval=0.05)[np.asarray(number)]

    def observe(self, state, drawn=None):
        self.drawn.append(drawn)
        image = jnp.broadcast_to(jnp.uint8(1000 * state)[..., None, None, None], (*state.shape, 64, 64, 3))
        scene_obs = jnp.zeros((*state.shape, specs.SCENE_OBS_DIM)).at[..., specs.DRAWER].set(state)
        return Observation(image, image, jnp.zeros((*state.shape, specs.ROBOT_OBS_DIM)), scene_obs)

    def step_chunk(self, state, actions, drawn=None):
        positions = state[:, None] + 0.1 * jnp.cumsum(actions[..., 0], axis=1)
        return positions[:, -1], self.observe(positions, drawn)

    def start_expert(self, rngs, task, state):
        assert task.shape == state.shape == rngs.shape
        return state + 0.14  # where it wants the drawer

    def act_expert(self, expert, state):
        action = jnp.zeros((*state.shape, specs.ACTION_DIM)).at[:, 0].set(jnp.clip(10 * (expert - state), -0.5, 0.5))
        return expert, action


def sample_mode(logits, noise):
    """Stands in for `sample_stochastic` where noise would be in the way: the likeliest class, straight-through."""
    del noise
    probability = jax.nn.softmax(logits)
    mode = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return mode + probability - jax.lax.stop_gradient(probability)


def assert_equal(a, b):
    """The same, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def assert_close_to_largest(found, expected, tolerance=1e-5):
    """Within 1e-5, or another share, of the largest entry of each array: sums of float32 in another order."""

    def check(x, y):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * float(np.abs(y).max()) + 1e-7)

    jax.tree.map(check, found, expected)


def run_python(*arguments: str, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python in the project's root, and returns what it printed and how it ended."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# --- Datasets of a few episodes ---


def spec_of(name: str, episode: rlds.Episode) -> rlds.DatasetSpec:
    """Reads the specification of a dataset from one of its episodes."""
    observation = episode.steps.observation
    extra = tuple((key, int(value.shape[1])) for key, value in sorted(episode.extra.items()))
    static, gripper = observation.rgb_static.shape, observation.rgb_gripper.shape
    return rlds.DatasetSpec(name, (static[1], static[2]), (gripper[1], gripper[2]), extra)


def write_dataset(
    directory: str | Path,
    name: str,
    splits: Mapping[str, Iterable[rlds.Episode]],
    episodes_per_shard: int = 64,
) -> Path:
    """Writes a dataset as the binaries do.

    Args:
      directory: where the dataset goes; the directory itself is what `tfds.builder_from_directory` opens.
      name: of the dataset, lower case.
      splits: episodes of "train" and, where there are any, "validation"; image sizes equal throughout.
      episodes_per_shard: the last shard of a split may hold fewer.

    Returns:
      the directory.

    Raises:
      ValueError: a split is empty, an episode is malformed, or the directory holds a different dataset.
    """
    episodes = {split: list(of_split) for split, of_split in splits.items()}
    if not episodes or not all(episodes.values()):
        counts = {split: len(of_split) for split, of_split in episodes.items()}
        raise ValueError(f"nothing to write: episodes of each split {counts}; expected at least one in each")
    spec = spec_of(name, next(iter(episodes.values()))[0])
    fingerprints = {split: _fingerprint(of_split) for split, of_split in episodes.items()}
    plan = {"spec": dataclasses.asdict(spec), "episodes_per_shard": episodes_per_shard, "episodes": fingerprints}
    shard_files.start_dataset(directory, plan)
    lengths = {}
    for split, of_split in episodes.items():
        shards = [of_split[i : i + episodes_per_shard] for i in range(0, len(of_split), episodes_per_shard)]
        lengths[split] = [
            shard_files.write_shard(directory, spec, split, i, len(shards), shard) for i, shard in enumerate(shards)
        ]
    shard_files.finish_dataset(directory, spec, lengths)
    return Path(directory)


def _fingerprint(episodes: Sequence[rlds.Episode]) -> str:
    """A digest of the states and actions, which tells two datasets apart; images follow from them."""
    digest = hashlib.sha256()
    for episode in episodes:
        for array in (episode.steps.action, episode.steps.observation.robot_obs, episode.steps.observation.scene_obs):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def resident_windows(directory: str | Path, length: int, count: int, num_devices: int, **arguments) -> StepBatch:
    """What updates get of data that live on the devices: windows [updates, B, T, ...] in the order of the batch."""
    arguments = {"directory": directory, "split": "train", "length": length, "seed": 0, "cache": "device"} | arguments
    batches = input_pipeline.make_batches(num_devices=num_devices, **arguments)
    cut = functools.partial(input_pipeline.take_windows, length=length, axis_name=parallel.AXIS_NAME)
    devices = parallel.local_devices(num_devices)
    run = parallel.compile_updates(lambda state, batch, rng: (state, batch), devices, take=cut)
    try:
        found = [run(parallel.replicate(np.zeros(()), devices), next(batches), 0, 0)[1] for _ in range(count)]
    finally:
        batches.close()
    joined = [jax.tree.map(lambda x: np.concatenate(np.asarray(x), axis=1), batch) for batch in found]
    return jax.tree.map(lambda *x: np.concatenate(x), *joined)
