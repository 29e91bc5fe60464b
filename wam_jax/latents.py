"""Latents of recorded episodes under a frozen world model, and the banks that policy, classifier and PPO draw from."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from wam_jax import world_model
from wam_jax.diffusion_policy import PolicyBank, PolicyBatch
from wam_jax.success_classifier import ClassifierBatch
from wam_jax.types import Array, LatentState, Params, StepBatch
from wam_jax.world_model import WorldModel

_SHORT, _LONG = 32, 128  # episodes are padded to multiples of the first, from the second on to multiples of that one


def encode_episodes(
    model: WorldModel, params: Params, episodes: Sequence[StepBatch], rng: Array, *, batch_size: int = 32
) -> list[LatentState]:
    """Filters every episode from its first frame on, as an acting policy does.

    Args:
      model, params: the frozen world model.
      episodes: steps [T, ...] each, of any lengths.
      rng: key for z.
      batch_size: episodes at a time.

    Returns:
      posterior states [T, ...] of each episode, numpy.
    """
    lengths = [len(episode.action) for episode in episodes]
    return _in_batches(functools.partial(encoder(model), params), episodes, lengths, rng, batch_size, "encoding")


def imagine_episodes(
    model: WorldModel,
    params: Params,
    latents: Sequence[LatentState],
    episodes: Sequence[StepBatch],
    rng: Array,
    *,
    batch_size: int = 32,
) -> tuple[list[LatentState], list[StepBatch]]:
    """Imagines every episode's own actions, open loop from the posterior of its first frame.

    Args:
      model, params: the frozen world model.
      latents: posterior states [T, ...] of each episode, from `encode_episodes`.
      episodes: the same episodes' steps.
      rng: key for z.
      batch_size: episodes at a time.

    Returns:
      prior states [T - 1, ...] of each episode, numpy, and the recorded steps that they stand for: all but the first.
    """
    lengths = [len(episode.action) for episode in episodes]
    recorded = [(latent, episode.action) for latent, episode in zip(latents, episodes, strict=True)]
    imagine = functools.partial(_imaginer(model), params)
    imagined = _in_batches(imagine, recorded, lengths, rng, batch_size, "imagining")
    followed = [jax.tree.map(lambda x: x[1:], episode) for episode in episodes]
    return [latent_at(latent, slice(0, -1)) for latent in imagined], followed  # the last action leads nowhere


def _in_batches(apply, items: Sequence, lengths: Sequence[int], rng: Array, batch_size: int, name: str) -> list:
    """Applies `apply(batch, rng)` to padded batches of items [T, ...], whose results [T, ...] are cut to length."""
    progress = tqdm(total=len(items), desc=name, unit="episode", leave=False, disable=None)
    order = sorted(range(len(items)), key=lambda i: lengths[i])  # alike lengths share a batch
    found: dict[int, LatentState] = {}
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        longest = max(lengths[i] for i in indices)
        multiple = _SHORT if longest <= _LONG else _LONG
        length = -(-longest // multiple) * multiple
        rows = indices + indices[-1:] * (batch_size - len(indices))  # a full batch, so that one program serves all
        batch = jax.tree.map(lambda *x: np.stack(x), *[pad(items[i], length) for i in rows])
        results = jax.device_get(apply(batch, jax.random.fold_in(rng, first)))
        for row, index in enumerate(indices):
            found[index] = jax.tree.map(lambda x, row=row, steps=lengths[index]: x[row, :steps], results)
        progress.update(len(indices))
    progress.close()
    return [found[index] for index in range(len(items))]


@functools.lru_cache(maxsize=4)
def encoder(model: WorldModel):
    """Compiled: (params, steps [B, T, ...], rng) -> posterior states [B, T, ...], from each first frame on."""

    @jax.jit
    def encode(params, batch, rng):
        embedding = world_model.embed(model, params, batch.observation)
        return world_model.observe(model, params, embedding, batch.action, rng)

    return encode


@functools.lru_cache(maxsize=4)
def _imaginer(model: WorldModel):
    @jax.jit
    def imagine(params, batch, rng):
        latent, action = batch
        return world_model.imagine(model, params, jax.tree.map(lambda x: x[:, 0], latent), action, rng)

    return imagine


def pad(item: Any, length: int) -> Any:
    """Repeats the last step up to `length`; what a model makes of the padding is cut off again."""
    return jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], length - len(x), axis=0)]), item)


def policy_bank(latents: Sequence[LatentState], episodes: Sequence[StepBatch], chunk: int) -> PolicyBank:
    """Every latent of the demonstrations with the `chunk` actions taken from there on, windows wholly inside.

    Args:
      latents: [T, ...] of each episode.
      episodes: the same episodes' steps.
      chunk: C.

    Returns:
      M rows: latent [M, ...], action float32 [M, C, 7]; no padding.

    Raises:
      ValueError: no episode is as long as a chunk.
    """
    rows = [
        (latent_at(latent, slice(0, len(episode.action) - chunk + 1)), _windows(episode.action, chunk))
        for latent, episode in zip(latents, episodes, strict=True)
        if len(episode.action) >= chunk
    ]
    if not rows:
        raise ValueError(f"no demonstration is as long as policy.chunk={chunk}; collect demonstrations first")
    batch = PolicyBatch(*(jax.tree.map(lambda *x: np.concatenate(x), *part) for part in zip(*rows, strict=True)))
    return PolicyBank(batch, np.array(len(batch.action), np.int32))


def _windows(action: Array, chunk: int) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(action, chunk, axis=0)  # [T - C + 1, 7, C]
    return np.ascontiguousarray(windows.swapaxes(1, 2), np.float32)


def classifier_bank(latents: Sequence[LatentState], episodes: Sequence[StepBatch]) -> ClassifierBatch:
    """Every latent of the episodes, labelled by the oracle's reward."""
    labels = [np.asarray(episode.reward > 0.5, np.int32) for episode in episodes]
    return ClassifierBatch(jax.tree.map(lambda *x: np.concatenate(x), *latents), np.concatenate(labels))


def pad_policy_banks(banks: Sequence[PolicyBank]) -> list[PolicyBank]:
    """Pads banks to the longest with rows that are never drawn, so that one compiled update serves them all."""
    longest = max(len(bank.rows.action) for bank in banks)
    return [bank.replace(rows=jax.tree.map(lambda x: _pad_rows(x, longest, 0), bank.rows)) for bank in banks]


def pad_classifier_banks(banks: Sequence[ClassifierBatch]) -> list[ClassifierBatch]:
    """Pads banks to the longest with rows of label -1, which are never drawn."""
    longest = max(len(bank.label) for bank in banks)
    return [
        ClassifierBatch(
            jax.tree.map(lambda x: _pad_rows(x, longest, 0), bank.latent), _pad_rows(bank.label, longest, -1)
        )
        for bank in banks
    ]


def _pad_rows(x: Array, num_rows: int, value: int) -> np.ndarray:
    padding = np.full((num_rows - x.shape[0], *x.shape[1:]), value, x.dtype)
    return np.concatenate([np.asarray(x), padding])


def start_bank(latents: Sequence[LatentState], first_step: int, last_step: int) -> LatentState:
    """Where imagination begins: the episodes' latents from `first_step` to `last_step`, which have seen one frame more.

    An episode that is too short for that gives its last latent.
    """

    def chosen(latent):
        first = min(first_step, len(latent.deterministic) - 1)
        return latent_at(latent, slice(first, last_step + 1))

    return jax.tree.map(lambda *x: np.concatenate(x), *map(chosen, latents))


def pad_start_banks(banks: Sequence[LatentState]) -> list[tuple[LatentState, Array]]:
    """Pads banks to the longest, so that one compiled iteration serves them all; and their numbers of rows before."""
    sizes = [len(bank.deterministic) for bank in banks]
    padded = [jax.tree.map(lambda x: _pad_rows(x, max(sizes), 0), bank) for bank in banks]
    return list(zip(padded, np.array(sizes, np.int32), strict=True))


def latent_at(latent: LatentState, index: slice | int) -> LatentState:
    """Indexes the leading axis."""
    return jax.tree.map(lambda x: x[index], latent)
