"""Success classifier: losses, balanced batches, reward rule."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from wam_jax import success_classifier
from wam_jax.networks import rssm
from wam_jax.success_classifier import ClassifierBatch
from wam_jax.types import LatentState

STATE_DIM = 8 + 2 * 4


def make_settings(**changes):
    settings = {
        "embedding_dims": (32, 32),
        "classification_dims": (32, 32),
        "temperature": 0.1,
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
        "resample_latent": True,
        "soft_feature": False,
        "batch_size": 32,
        "threshold": 0.5,
        "consecutive": 1,
    }
    return ml_collections.FrozenConfigDict({**settings, **changes})


def make_bank(size=64, successes=8):
    rng = jax.random.split(jax.random.key(0), 2)
    logits = 4 * jax.random.normal(rng[0], (size, 2, 4))
    latent = LatentState(
        deterministic=jax.random.normal(rng[1], (size, 8)),
        logits=logits,
        stochastic=jax.nn.one_hot(logits.argmax(-1), 4),
    )
    order = jnp.argsort(jnp.argsort(latent.deterministic[:, 0]))
    return ClassifierBatch(latent, (order < successes).astype(jnp.int32))


@functools.cache
def make_state():
    return jax.jit(lambda rng: success_classifier.init(rng, STATE_DIM, make_settings()))(jax.random.key(0))


def test_overfits_a_small_bank():
    settings, bank = make_settings(), make_bank()
    state = make_state()
    step = functools.partial(success_classifier.update_from_bank, settings=settings)

    @jax.jit
    def train(state, rng):
        return jax.lax.scan(lambda state, rng: step(state, bank, rng), state, jax.random.split(rng, 300))

    state, metrics = train(state, jax.random.key(1))
    assert metrics["cross_entropy"][-10:].mean() < 0.05
    assert metrics["contrastive_loss"][-10:].mean() < metrics["contrastive_loss"][0]
    quality = success_classifier.evaluate(state.params, bank, settings=settings)
    assert quality["precision"] == quality["recall"] == quality["accuracy"] == 1
    assert quality["success_share"] == 8 / 64
    probability = success_classifier.success_probability(state.params, rssm.feature(bank.latent), settings=settings)
    np.testing.assert_array_equal(probability > 0.5, bank.label == 1)


def test_contrastive_loss_is_the_formula():
    rng = np.random.default_rng(0)
    embedding, label = rng.normal(size=(7, 5)), np.array([0, 1, 0, 1, 1, 0, 2])
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    rows = []
    for i in range(7):
        others = [a for a in range(7) if a != i]
        positives = [p for p in others if label[p] == label[i]]
        if positives:
            total = sum(np.exp(unit[i] @ unit[a] / 0.5) for a in others)
            rows.append(-np.mean([np.log(np.exp(unit[i] @ unit[p] / 0.5) / total) for p in positives]))
    value = success_classifier.contrastive_loss(jnp.asarray(embedding, jnp.float32), jnp.asarray(label), 0.5)
    np.testing.assert_allclose(value, np.mean(rows), rtol=1e-5)


def test_balanced_rows_are_half_successes_and_cover_each_class():
    label = jnp.asarray([0, 1, -1, 0, 0, 1, 0, -1, 0, 0])
    draw = jax.jit(functools.partial(success_classifier.balanced_indices, batch_size=400))
    rows = np.asarray(draw(jax.random.key(0), label))
    np.testing.assert_array_equal(label[rows[:200]], 1)
    np.testing.assert_array_equal(label[rows[200:]], 0)
    counts = np.bincount(rows, minlength=10)
    assert counts[[2, 7]].sum() == 0
    assert counts[[1, 5]].min() > 60 and counts[[0, 3, 4, 6, 8, 9]].min() > 15


def test_user_mistakes_are_named():
    with pytest.raises(ValueError, match="open_drawer: none of the 5 rows has label 1"):
        success_classifier.check_labels(np.zeros(5, np.int32), task="open_drawer")
    with pytest.raises(ValueError, match="batch_size=7"):
        success_classifier.balanced_indices(jax.random.key(0), jnp.asarray([0, 1]), 7)


def test_precision_and_recall_count_what_they_should():
    settings, bank = make_settings(), make_bank()
    state = make_state()
    probability = np.asarray(
        success_classifier.success_probability(state.params, rssm.feature(bank.latent), settings=settings)
    )
    threshold = float(np.median(probability))
    quality = success_classifier.evaluate(state.params, bank, settings=make_settings(threshold=threshold))
    positive, success = probability > threshold, np.asarray(bank.label) == 1
    np.testing.assert_allclose(quality["precision"], (positive & success).sum() / positive.sum(), rtol=1e-6)
    np.testing.assert_allclose(quality["recall"], (positive & success).sum() / success.sum(), rtol=1e-6)
    np.testing.assert_allclose(quality["accuracy"], (positive == success).mean(), rtol=1e-6)
