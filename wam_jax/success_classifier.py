"""Success classifier on latents, from which imagination's reward follows (DiWA, Celik et al. 2025).

An embedding MLP is trained with NT-Xent on labels (supervised contrastive learning, Khosla et al. 2020) and a
classification MLP on the embedding with cross-entropy; the two losses are summed.

Keys of `settings` (the paper's values where it gives them):
    embedding_dims (512, 512), classification_dims (512, 512), temperature 0.1
    learning_rate 3e-4, weight_decay 1e-4, batch_size 256 (per device; only `update_from_bank`)
    resample_latent True, soft_feature False (the policy's)
    threshold 0.5, of a success (`reward_rules` counts them)
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from wam_jax.networks import categorical, rssm
from wam_jax.optimizers import adamw
from wam_jax.parallel import pmean
from wam_jax.types import Array, LatentState, Metrics, Params


@flax.struct.dataclass
class ClassifierBatch:
    """Labelled latents; also the whole bank of them."""

    latent: LatentState  # [B, ...]
    label: Array  # int32 [B], 1 success, 0 not; a bank may hold -1 for rows that are never drawn (padding, ambiguous)


@flax.struct.dataclass
class ClassifierState:
    """Training state of the classifier."""

    params: Params  # float32
    optimizer_state: Any
    step: Array  # int32 [], updates done


class SuccessClassifier(nn.Module):
    """Embedding MLP, then classification MLP on the embedding; ReLU between layers."""

    embedding_dims: tuple[int, ...]
    classification_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, feature: Array) -> tuple[Array, Array]:
        """Maps [..., state_dim] to the embedding [..., embedding_dims[-1]] and the logit of success [...]; float32."""
        x = feature.astype(jnp.float32)
        for width in self.embedding_dims[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        embedding = x = nn.Dense(self.embedding_dims[-1])(x)
        for width in self.classification_dims:
            x = nn.Dense(width)(nn.relu(x))
        return embedding, nn.Dense(1)(nn.relu(x))[..., 0]


def network(settings: Any) -> SuccessClassifier:
    """The classifier's module."""
    return SuccessClassifier(tuple(settings.embedding_dims), tuple(settings.classification_dims))


def optimizer(settings: Any) -> optax.GradientTransformation:
    """AdamW at a constant learning rate."""
    return adamw(settings.learning_rate, weight_decay=settings.weight_decay)


def init(rng: Array, state_dim: int, settings: Any) -> ClassifierState:
    """Fresh training state for features of `state_dim` entries."""
    params = network(settings).init(rng, jnp.zeros((1, state_dim)))
    return ClassifierState(params, optimizer(settings).init(params), jnp.zeros((), jnp.int32))


def contrastive_loss(embedding: Array, label: Array, temperature: float) -> Array:
    """NT-Xent in which all rows of the same label are each other's positives.

    Khosla et al. (2020), eq. 2: minus the mean log-softmax, over the other rows, of the similarity to the positives.

    Args:
      embedding: float32 [B, E], any length; normalised here.
      label: int [B].
      temperature: divides the cosine similarities.

    Returns:
      float32 scalar, mean over the rows that have a positive.
    """
    embedding = embedding / jnp.sqrt(jnp.sum(jnp.square(embedding), axis=-1, keepdims=True) + 1e-12)
    itself = jnp.eye(label.shape[0], dtype=bool)
    similarity = jnp.where(itself, -jnp.inf, embedding @ embedding.T / temperature)
    log_softmax = jnp.where(itself, 0.0, jax.nn.log_softmax(similarity, axis=-1))
    positive = (label[:, None] == label[None]) & ~itself
    num_positives = jnp.sum(positive, axis=-1)
    row = -jnp.sum(jnp.where(positive, log_softmax, 0.0), axis=-1) / jnp.maximum(num_positives, 1)
    return jnp.sum(row) / jnp.maximum(jnp.sum(num_positives > 0), 1)


def loss(params: Params, batch: ClassifierBatch, rng: Array, *, settings: Any) -> tuple[Array, Metrics]:
    """Contrastive loss plus cross-entropy, each a mean over the batch.

    Args:
      params: of the classifier.
      batch: B latents with labels 0 or 1.
      rng: one key; draws z anew where `settings.resample_latent`.
      settings: see the module.

    Returns:
      float32 scalar and metrics.
    """
    latent = batch.latent
    if settings.resample_latent:
        latent = latent.replace(stochastic=categorical.sample_one_hot(latent.logits, rng))
    embedding, logit = network(settings).apply(params, rssm.feature(latent, soft=settings.soft_feature))
    contrastive = contrastive_loss(embedding, batch.label, settings.temperature)
    cross_entropy = jnp.mean(optax.sigmoid_binary_cross_entropy(logit, batch.label))
    accuracy = jnp.mean((logit > 0) == (batch.label == 1))
    metrics = {"contrastive_loss": contrastive, "cross_entropy": cross_entropy, "accuracy": accuracy}
    return contrastive + cross_entropy, metrics


def update(
    state: ClassifierState, batch: ClassifierBatch, rng: Array, *, settings: Any, axis_name: str | None = None
) -> tuple[ClassifierState, Metrics]:
    """One step of AdamW on a class-balanced batch. With several devices, each contrasts its own rows."""
    grads, metrics = jax.grad(loss, has_aux=True)(state.params, batch, rng, settings=settings)
    grads, metrics = pmean(grads, axis_name), pmean(metrics, axis_name)
    updates, optimizer_state = optimizer(settings).update(grads, state.optimizer_state, state.params)
    state = ClassifierState(optax.apply_updates(state.params, updates), optimizer_state, state.step + 1)
    return state, metrics


def update_from_bank(
    state: ClassifierState, bank: ClassifierBatch, rng: Array, *, settings: Any, axis_name: str | None = None
) -> tuple[ClassifierState, Metrics]:
    """`update` on `settings.batch_size` class-balanced rows of a bank on the device; see `check_labels`."""
    draw_rng, update_rng = jax.random.split(rng)
    rows = balanced_indices(draw_rng, bank.label, settings.batch_size)
    batch = jax.tree.map(lambda x: x[rows], bank)
    return update(state, batch, update_rng, settings=settings, axis_name=axis_name)


def balanced_indices(rng: Array, label: Array, batch_size: int) -> Array:
    """Draws rows with replacement, as many of label 1 as of label 0.

    Args:
      rng: one key.
      label: int [M], both classes present (`check_labels` makes sure of it); other values are never drawn.
      batch_size: rows to draw, even.

    Returns:
      int32 [batch_size], the successes first.

    Raises:
      ValueError: batch_size is odd.
    """
    if batch_size % 2:
        raise ValueError(f"batch_size={batch_size} is odd; half of it are successes: take {batch_size + 1}")

    def draw(rng, member):
        rank = jnp.cumsum(member)  # rank[i]: members up to row i, so the r-th member is the first row of rank r
        chosen = jax.random.randint(rng, (batch_size // 2,), 1, rank[-1] + 1)
        return jnp.searchsorted(rank, chosen)

    rng_success, rng_failure = jax.random.split(rng)
    return jnp.concatenate([draw(rng_success, label == 1), draw(rng_failure, label == 0)])


def check_labels(label: Array, *, task: str) -> None:
    """Raises a ValueError where the bank of a task lacks one of the two classes; for the host, before training."""
    for value, name in ((1, "success"), (0, "failure")):
        if not (label == value).any():
            raise ValueError(
                f"{task}: none of the {len(label)} rows has label {value} ({name}); the classifier needs both: add "
                "episodes that reach the end of the task and frames from before it"
            )


def success_probability(params: Params, feature: Array, *, settings: Any) -> Array:
    """Probability that the task is solved: features [..., state_dim] -> float32 [...]."""
    return nn.sigmoid(network(settings).apply(params, feature)[1])


def evaluate(params: Params, batch: ClassifierBatch, *, settings: Any) -> Metrics:
    """Frame-wise quality at the reward's threshold, on held-out latents with labels 0 or 1 (others are left out).

    Returns:
      float32 scalars: precision (0 where nothing is called a success), recall, accuracy, and the share of successes.
    """
    positive = (
        success_probability(params, rssm.feature(batch.latent, soft=settings.soft_feature), settings=settings)
        > settings.threshold
    )
    success, failure = batch.label == 1, batch.label == 0
    true_positives, false_positives = jnp.sum(positive & success), jnp.sum(positive & failure)
    labelled = jnp.maximum(jnp.sum(success) + jnp.sum(failure), 1)
    return {
        "precision": true_positives / jnp.maximum(true_positives + false_positives, 1),
        "recall": true_positives / jnp.maximum(jnp.sum(success), 1),
        "accuracy": (true_positives + jnp.sum(~positive & failure)) / labelled,
        "success_share": jnp.sum(success) / labelled,
    }
