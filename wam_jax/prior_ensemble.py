"""Priors that are fitted anew to a frozen world model: their mixture to imagine with, their disagreement to doubt it.

A world model trains its prior while the posterior that it has to predict still moves. Afterwards each of J small
networks p_j(z_t | h_t) is trained on frames of filtered play by the KL of the frozen posterior from it, from initial
values and on batches of its own. Imagination then draws z from their mixture (deep ensembles, Lakshminarayanan et al.
2017), and where they disagree it is beyond what the play has shown (Sekar et al. 2020, Plan2Explore).

Keys of `settings` (all ours):
    num_members 0 (J; 0: none, imagination is the world model's own), hidden_dims (256, 256)
    imagine True: imagination draws z from the mixture; False: only the disagreement is used
    num_windows 2000, window_length 48: the play that the members learn from, all frames but the first of each window
    batch_size 256 (frames of each member, per device), learning_rate 1e-3, weight_decay 1e-3
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from wam_jax.networks.layers import NormElu, dense
from wam_jax.networks.rssm import categorical_kl
from wam_jax.optimizers import adamw
from wam_jax.parallel import pmean
from wam_jax.types import Array, LatentState, Metrics, Params


@flax.struct.dataclass
class PriorBatch:
    """Frames of filtered play; also the whole bank of them."""

    deterministic: Array  # [B, D], h_t
    logits: Array  # float32 [B, S, V], of q(z_t | h_t, e_t)


@flax.struct.dataclass
class EnsembleState:
    """Training state of all members."""

    params: Params  # float32, leaves [J, ...]
    optimizer_state: Any
    step: Array  # int32 [], updates done


class Member(nn.Module):
    """One prior: hidden layers with LayerNorm and ELU, then logits."""

    hidden_dims: tuple[int, ...]
    num_latents: int
    num_classes: int
    dtype: Any

    @nn.compact
    def __call__(self, deterministic: Array) -> Array:
        """Maps h [..., D] to float32 logits [..., S, V]."""
        x = deterministic.astype(self.dtype)
        for width in self.hidden_dims:
            x = NormElu(self.dtype)(dense(width, self.dtype)(x))
        flat = dense(self.num_latents * self.num_classes, self.dtype)(x).astype(jnp.float32)
        return flat.reshape(*deterministic.shape[:-1], self.num_latents, self.num_classes)


@dataclasses.dataclass(frozen=True)
class PriorEnsemble:
    """The members' module and settings: static, hashable, without parameters."""

    member: Member
    deterministic_dim: int
    settings: Any  # FrozenConfigDict, config.prior_ensemble


def build(settings: Any, world_model_settings: Any) -> PriorEnsemble:
    """The ensemble that fits a world model's states, in its compute dtype."""
    sizes = world_model_settings
    member = Member(tuple(settings.hidden_dims), sizes.num_latents, sizes.num_classes, jnp.dtype(sizes.compute_dtype))
    return PriorEnsemble(member, sizes.deterministic_dim, settings)


def optimizer(settings: Any) -> optax.GradientTransformation:
    """AdamW at a constant learning rate."""
    return adamw(settings.learning_rate, weight_decay=settings.weight_decay)


def init(ensemble: PriorEnsemble, rng: Array) -> EnsembleState:
    """Fresh training state; no two members begin alike."""
    h = jnp.zeros((1, ensemble.deterministic_dim))
    params = jax.vmap(lambda key: ensemble.member.init(key, h))(jax.random.split(rng, ensemble.settings.num_members))
    optimizer_state = jax.vmap(optimizer(ensemble.settings).init)(params)
    return EnsembleState(params, optimizer_state, jnp.zeros((), jnp.int32))


def bank(latents: Iterable[LatentState]) -> PriorBatch:
    """The frames of filtered windows, [B, T, ...] each, but for each window's first, of which h knows nothing."""
    frames = [
        PriorBatch(*(np.asarray(x)[:, 1:].reshape(-1, *x.shape[2:]) for x in (latent.deterministic, latent.logits)))
        for latent in latents
    ]
    return jax.tree.map(lambda *x: np.concatenate(x), *frames)


def loss(params: Params, batch: PriorBatch, *, ensemble: PriorEnsemble) -> tuple[Array, Metrics]:
    """KL(q(z|h,e) || p_j(z|h)) in nats of each member on its own frames, summed over members so that none sees another.

    Args:
      params: leaves [J, ...].
      batch: leaves [J, B, ...].
      ensemble: its module.

    Returns:
      float32 scalar, and as a metric the members' mean.
    """
    logits = jax.vmap(ensemble.member.apply)(params, batch.deterministic)
    kl = jnp.mean(categorical_kl(batch.logits, logits), axis=-1)
    return jnp.sum(kl), {"loss": jnp.mean(kl)}


def update_from_bank(
    state: EnsembleState, bank: PriorBatch, rng: Array, *, ensemble: PriorEnsemble, axis_name: str | None = None
) -> tuple[EnsembleState, Metrics]:
    """One step of AdamW for every member, each on `settings.batch_size` rows of the bank that it draws for itself.

    Args:
      state: of all members.
      bank: M frames.
      rng: one key.
      ensemble: its module and settings.
      axis_name: devices to average gradients over, each with rows of its own.
    """
    settings = ensemble.settings
    rows = jax.random.randint(rng, (settings.num_members, settings.batch_size), 0, len(bank.deterministic))
    batch = jax.tree.map(lambda x: x[rows], bank)
    grads, metrics = jax.grad(loss, has_aux=True)(state.params, batch, ensemble=ensemble)
    grads, metrics = pmean(grads, axis_name), pmean(metrics, axis_name)
    updates, optimizer_state = jax.vmap(optimizer(settings).update)(grads, state.optimizer_state, state.params)
    return EnsembleState(optax.apply_updates(state.params, updates), optimizer_state, state.step + 1), metrics


def log_probabilities(ensemble: PriorEnsemble, params: Params, deterministic: Array) -> Array:
    """Log p_j(z | h) of every member: h [..., D] -> float32 [J, ..., S, V]."""
    return jax.nn.log_softmax(jax.vmap(ensemble.member.apply, in_axes=(0, None))(params, deterministic))


def mixture(log_p: Array) -> Array:
    """Logits of the mean of the members' distributions, each categorical's by itself: [J, ..., S, V] -> [..., S, V]."""
    return jax.nn.logsumexp(log_p, axis=0) - jnp.log(len(log_p))


def mutual_information(log_p: Array) -> Array:
    """How much z tells of the member that it is drawn from (Houlsby et al. 2011): 0 where all say the same.

    The entropy of the mixture less the members' mean entropy.

    Args:
      log_p: float32 [J, ..., S, V], normalised.

    Returns:
      float32 [...], in nats, summed over the S categoricals; each adds log J at most.
    """

    def entropy(log_p):
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=(-2, -1))

    return entropy(mixture(log_p)) - jnp.mean(entropy(log_p), axis=0)


def disagreement(ensemble: PriorEnsemble, params: Params, deterministic: Array) -> Array:
    """The members' mutual information on states: h [..., D] -> float32 [...], in nats."""
    return mutual_information(log_probabilities(ensemble, params, deterministic))
