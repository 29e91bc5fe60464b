"""Latents of episodes, and the banks that are made of them."""

from unittest import mock

import helpers
import jax
import numpy as np
import pytest

from wam_jax import latents, world_model

quick_compilation = helpers.quick_compilation
CHUNK = 4
LENGTHS = (6, 3, 9, 4)  # one is shorter than a chunk
SETTINGS = helpers.make_model().settings


def make_episodes(lengths=LENGTHS):
    """Episodes whose actions and latents both tell episode and step."""
    episodes, encoded = [], []
    for index, length in enumerate(lengths):
        steps, latent = helpers.make_steps(index, (length,)), helpers.make_latents(index, (length,), SETTINGS)
        steps.action[:, 0], steps.action[:, 1] = index, np.arange(length)
        latent.deterministic[:, 0], latent.deterministic[:, 1] = index, np.arange(length)
        episodes.append(steps)
        encoded.append(latent)
    return episodes, encoded


def test_a_row_of_the_policy_bank_pairs_a_latent_with_the_actions_from_there_on():
    episodes, encoded = make_episodes()
    bank = latents.policy_bank(encoded, episodes, CHUNK)
    windows = [(index, start) for index, length in enumerate(LENGTHS) for start in range(length - CHUNK + 1)]
    assert bank.num_rows == len(windows)
    assert bank.rows.action.shape == (len(windows), CHUNK, 7)
    assert bank.rows.action.dtype == np.float32
    for row, (index, start) in enumerate(windows):
        np.testing.assert_array_equal(bank.rows.action[row], episodes[index].action[start : start + CHUNK])
        helpers.assert_equal(latents.latent_at(bank.rows.latent, row), latents.latent_at(encoded[index], start))


def test_no_demonstration_as_long_as_a_chunk_is_named():
    episodes, encoded = make_episodes((3, 2))
    with pytest.raises(ValueError, match="policy.chunk=4"):
        latents.policy_bank(encoded, episodes, CHUNK)


def test_the_classifier_bank_labels_every_latent_by_the_reward():
    episodes, encoded = make_episodes((3, 2))
    episodes = [
        steps.replace(reward=np.float32(reward)) for steps, reward in zip(episodes, ([0, 1, 1], [0, 0]), strict=True)
    ]
    bank = latents.classifier_bank(encoded, episodes)
    assert bank.label.tolist() == [0, 1, 1, 0, 0]
    assert bank.latent.deterministic[:, :2].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]


def test_padding_makes_banks_of_one_size_and_leaves_their_rows():
    banks = [latents.policy_bank(*reversed(make_episodes(lengths)), CHUNK) for lengths in ((6, 9), (5,))]
    padded = latents.pad_policy_banks(banks)
    assert [int(bank.num_rows) for bank in padded] == [9, 2]
    for bank, old in zip(padded, banks, strict=True):
        assert bank.rows.action.shape[0] == bank.rows.latent.logits.shape[0] == 9
        helpers.assert_equal(jax.tree.map(lambda x, rows=old.num_rows: x[:rows], bank.rows), old.rows)


def test_padding_of_the_classifier_bank_is_neither_success_nor_failure():
    banks = []
    for lengths in ((3, 2), (4,)):
        episodes, encoded = make_episodes(lengths)
        banks.append(latents.classifier_bank(encoded, episodes))
    padded = latents.pad_classifier_banks(banks)
    assert [bank.label.tolist()[4:] for bank in padded] == [banks[0].label.tolist()[4:], [-1]]
    assert padded[1].latent.deterministic.shape[0] == 5


@pytest.mark.parametrize(("first", "last", "steps"), [(0, 0, [0]), (0, 2, [0, 1, 2]), (1, 2, [1, 2])])
def test_starts_are_the_first_frames(first, last, steps):
    _, encoded = make_episodes()
    bank = latents.start_bank(encoded, first, last)
    found = bank.deterministic[:, :2].tolist()
    assert found == [[index, step] for index in range(len(LENGTHS)) for step in steps]
    assert bank.logits.shape == (len(found), 4, 4)


def test_an_episode_that_ends_before_the_first_start_gives_its_last_frame():
    _, encoded = make_episodes((3, 9))
    found = latents.start_bank(encoded, 4, 5).deterministic[:, :2].tolist()
    assert found == [[0, 2], [1, 4], [1, 5]]


def test_encoding_in_padded_batches_equals_encoding_alone():
    model = helpers.make_model(kl_weight=2.0)  # settings of its own: compiled here, without noise
    params = helpers.make_state(model).params
    episodes = [helpers.make_steps(i, (length,)) for i, length in enumerate((18, 5, 11))]
    with mock.patch.object(world_model, "sample_stochastic", helpers.sample_mode):
        together = latents.encode_episodes(model, params, episodes, jax.random.key(0), batch_size=2)
        alone = jax.jit(lambda steps: observe_alone(model, params, steps))
        expected = [jax.tree.map(lambda x: x[0], alone(jax.tree.map(lambda x: x[None], steps))) for steps in episodes]
    assert [len(latent.deterministic) for latent in together] == [18, 5, 11]
    for found, wanted in zip(together, expected, strict=True):
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(found))
        helpers.assert_close(found, wanted, atol=1e-5)


def observe_alone(model, params, steps):
    embedding = world_model.embed(model, params, steps.observation)
    return world_model.observe(model, params, embedding, steps.action, jax.random.key(0))


def test_imagined_episodes_are_steps_of_the_prior_under_their_own_actions_with_their_own_labels():
    model = helpers.make_model(soft_prior=True)  # no noise
    params = helpers.make_state(model).params
    lengths = (18, 5, 11)
    episodes, encoded = make_episodes(lengths)
    episodes = [steps.replace(reward=np.float32(np.arange(len(steps.action)) % 3 == 1)) for steps in episodes]
    imagined, followed = latents.imagine_episodes(model, params, encoded, episodes, jax.random.key(0), batch_size=2)
    step = jax.jit(lambda latent, action: world_model.imagine_step(model, params, latent, action, jax.random.key(1)))
    for latent, steps, found in zip(encoded, episodes, imagined, strict=True):
        assert all(isinstance(x, np.ndarray) and len(x) == len(steps.action) - 1 for x in jax.tree.leaves(found))
        state = jax.tree.map(lambda x: x[:1], latent)  # the first frame is all that is seen
        for t in range(len(steps.action) - 1):
            state = step(state, steps.action[t : t + 1])
            helpers.assert_close(latents.latent_at(found, slice(t, t + 1)), state, atol=1e-5)
    labels = latents.classifier_bank(imagined, followed).label.tolist()
    assert labels == [int(t % 3 == 1) for length in lengths for t in range(1, length)]


def test_no_episodes_give_no_latents():
    model = helpers.make_model()
    assert latents.encode_episodes(model, {}, [], jax.random.key(0)) == []
