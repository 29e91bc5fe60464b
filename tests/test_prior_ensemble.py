"""Priors fitted to a frozen world model: what they learn, what imagination makes of them, where they disagree."""

import contextlib
import dataclasses
import functools
import re
import shutil

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from experiments import launch, train_policy, train_reward, train_world_model
from wam_jax import checkpoints, json_files, latents, parallel, prior_ensemble, reward_rules, rlds, world_model
from wam_jax.networks import rssm

quick_compilation = helpers.quick_compilation
TASK = "turn_on_led"
MODEL = helpers.make_model()
SETTINGS = dict(
    num_members=3, hidden_dims=(16,), num_windows=4, window_length=4, batch_size=8, num_steps=4, updates_per_call=2,
    save_every=2,
)  # fmt: skip


def make_config(**changes):
    config = helpers.make_config()
    config.tasks = (TASK,)
    config.prior_ensemble.update(SETTINGS)
    config.update_from_flattened_dict(changes)
    return config


def make_ensemble(**changes):
    config = make_config()
    config.prior_ensemble.update(changes)
    return prior_ensemble.build(FrozenConfigDict(config.prior_ensemble), FrozenConfigDict(config.world_model))


def constant(ensemble, logits):
    """Parameters of members that say logits [K, S, V] whatever h is."""
    params = jax.tree.map(jnp.zeros_like, prior_ensemble.init(ensemble, jax.random.key(0)).params)
    params["params"]["Dense_1"]["bias"] = jnp.asarray(logits, jnp.float32).reshape(len(logits), -1)
    return params


# --- Mixture and disagreement ---


def test_the_mixture_is_the_mean_of_the_members_distributions():
    logits = np.random.default_rng(0).normal(size=(3, 5, 4, 4))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mixture = prior_ensemble.mixture(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(jax.nn.softmax(mixture), probabilities.mean(0), rtol=1e-5)
    np.testing.assert_allclose(np.exp(mixture).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("members", [2, 5])
def test_members_of_one_mind_disagree_by_nothing_and_those_of_as_many_by_log_k_a_categorical(members):
    alike = jnp.broadcast_to(jax.nn.log_softmax(jnp.arange(5.0)), (members, 7, 3, 5))
    np.testing.assert_allclose(prior_ensemble.mutual_information(alike), np.zeros(7), atol=1e-5)
    apart = jax.nn.log_softmax(50.0 * jnp.eye(5)[:members, None, None].repeat(3, axis=2))
    np.testing.assert_allclose(prior_ensemble.mutual_information(apart), [3 * np.log(members)], rtol=1e-4)


def test_it_is_the_mutual_information_of_z_and_the_member():
    p = np.random.default_rng(1).dirichlet(np.ones(4), size=(3, 6, 2))  # K, frames, S, V
    expected = (p * (np.log(p) - np.log(p.mean(0)))).sum(-1).mean(0).sum(-1)
    np.testing.assert_allclose(prior_ensemble.mutual_information(jnp.log(p)), expected, rtol=1e-4)


# --- Learning ---


def make_bank(rows=64, seed=0):
    rng = np.random.default_rng(seed)
    size = MODEL.settings
    h = rng.normal(size=(rows, size.deterministic_dim)).astype(np.float32)
    logits = 2 * h[:, : size.num_latents * size.num_classes]
    return prior_ensemble.PriorBatch(h, logits.reshape(rows, size.num_latents, size.num_classes))


def test_members_learn_a_posterior_that_follows_from_h_and_begin_apart():
    ensemble, bank = make_ensemble(learning_rate=1e-2, batch_size=32), make_bank()
    state = prior_ensemble.init(ensemble, jax.random.key(0))
    update = jax.jit(functools.partial(prior_ensemble.update_from_bank, ensemble=ensemble))
    before = prior_ensemble.log_probabilities(ensemble, state.params, bank.deterministic)
    assert all(np.abs(before[i] - before[j]).max() > 0.01 for i, j in ((0, 1), (0, 2), (1, 2)))
    losses = []
    for step in range(300):
        state, metrics = update(state, bank, jax.random.fold_in(jax.random.key(1), step))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-20:]) < 0.1 * losses[0] and int(state.step) == 300
    logits = prior_ensemble.mixture(prior_ensemble.log_probabilities(ensemble, state.params, bank.deterministic))
    np.testing.assert_allclose(jax.nn.softmax(logits), jax.nn.softmax(bank.logits), atol=0.15)


def test_each_member_learns_from_its_own_frames_alone():
    ensemble = make_ensemble()
    params = prior_ensemble.init(ensemble, jax.random.key(0)).params
    bank = make_bank(2 * 3)
    batch = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), bank)
    other = jax.tree.map(lambda x: x.copy(), batch)
    other.deterministic[0] += 1
    grads, changed = (
        jax.grad(lambda p, b=b: prior_ensemble.loss(p, b, ensemble=ensemble)[0])(params) for b in (batch, other)
    )
    for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(changed), strict=True):
        np.testing.assert_array_equal(one[1:], two[1:])
    assert any(np.abs(x[0] - y[0]).max() > 0 for x, y in zip(*map(jax.tree.leaves, (grads, changed)), strict=True))


def test_the_bank_leaves_the_first_frame_of_each_window_out():
    windows = [helpers.make_latents(seed, (2, 4), MODEL.settings) for seed in (0, 1)]
    bank = prior_ensemble.bank(windows)
    assert bank.deterministic.shape == (12, 16) and bank.logits.shape == (12, 4, 4)
    np.testing.assert_array_equal(bank.deterministic[:3], windows[0].deterministic[0, 1:])
    np.testing.assert_array_equal(bank.logits[9:], windows[1].logits[1, 1:])


# --- Imagination ---


def test_imagination_draws_z_from_the_mixture_and_filtering_does_not():
    ensemble, classes = make_ensemble(num_members=2), np.array([[0, 3, 1, 2], [1, 3, 2, 0]])
    params = helpers.make_state(MODEL).params | {"prior_ensemble": constant(ensemble, 20 * np.eye(4)[classes])}
    model = dataclasses.replace(MODEL, prior_ensemble=ensemble)
    steps = helpers.make_steps()
    embedding = world_model.embed(MODEL, params, steps.observation)
    plain, filtered = (
        jax.jit(functools.partial(world_model.observe, m))(params, embedding, steps.action, jax.random.key(0))
        for m in (MODEL, model)
    )
    helpers.assert_equal(filtered, plain)
    start = jax.tree.map(lambda x: np.repeat(x[:, 0], 64, axis=0), plain)
    action = np.repeat(steps.action, 64, axis=0)
    imagined = jax.jit(functools.partial(world_model.imagine, model))(params, start, action[:, :5], jax.random.key(1))
    step = jax.jit(functools.partial(world_model.imagine_step, model))
    one = step(world_model.imagination_params(model, params), start, action[:, 0], jax.random.key(2))
    helpers.assert_close(one.deterministic, imagined.deterministic[:, 0], atol=1e-5)  # no draw has touched it yet
    for latent in (imagined, one):
        drawn = np.asarray(latent.stochastic).argmax(-1).reshape(-1, 4)
        first, second = (drawn == member for member in classes)
        assert (first | second).all()
        for number in (0, 2, 3):  # the two members agree on the other
            assert 0.4 < first[:, number].mean() < 0.6
        assert 0.4 < (first[:, 0] == first[:, 2]).mean() < 0.6  # each categorical by itself


# --- The config ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prior_ensemble.num_members": 1, "reward.disagreement_quantile": 0.5},
            "num_members=1; take 2 or more, e.g. 5",
        ),
        (
            {"prior_ensemble.num_members": 2, "prior_ensemble.imagine": False},
            "num_members=2 would be trained for nothing",
        ),
        (
            {"prior_ensemble.num_members": 2, "reward.disagreement_quantile": 0.5, "reward.kind": "scene"}
            | {"world_model.scene_weight": 1.0},
            "disagreement_quantile=0.5 limits the classifier's reward, and config.reward.kind='scene'; take",
        ),
    ],
)
def test_an_ensemble_has_a_use_and_what_uses_it_has_one(tmp_path, changes, message):
    config = helpers.make_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        launch.prepare(config, str(tmp_path / "run"))


def test_its_windows_fit_into_play(tmp_path):
    config = make_config(**{"prior_ensemble.window_length": 500})
    with pytest.raises(ValueError, match="config.prior_ensemble.window_length=500 is longer than .*play_steps=400"):
        launch.prepare(config, str(tmp_path / "run"))
    config.prior_ensemble.num_members = 0
    launch.prepare(config, str(tmp_path / "run"))


# --- The stage, and the reward that doubts ---


@pytest.fixture
def play(tmp_path):
    """Play of two episodes: an attempt each, of nine steps, solved at its last three."""
    episodes = []
    for number in range(2):
        steps = helpers.make_steps(number, (9,))
        steps = steps.replace(task=np.full(9, 6, np.int32), reward=np.float32(np.arange(9) >= 6))
        episodes.append(rlds.Episode(steps, source="test", episode_id=str(number)))
    return str(helpers.write_dataset(tmp_path / "data", "play", {"train": episodes, "validation": episodes[:1]}))


def train(workdir, play, **changes):
    config = FrozenConfigDict(make_config(**{"dataset.play": play, **changes}))
    train_world_model.run(config, workdir)
    return config


def test_the_stage_follows_the_world_model_and_is_loaded_with_it(play, tmp_path):
    workdir = str(tmp_path / "run")
    config = train(workdir, play)
    model, params = train_world_model.load(config, workdir)
    assert model.prior_ensemble == train_world_model.build_ensemble(config)
    with contextlib.closing(checkpoints.Checkpointer(f"{workdir}/prior_ensemble")) as kept:
        assert kept.steps() == [2, 4]
    helpers.assert_equal(params["prior_ensemble"], train_world_model.load_ensemble(config, workdir)[1])
    plain = FrozenConfigDict(make_config(**{"dataset.play": play, "prior_ensemble.num_members": 0}))
    model, without = train_world_model.load(plain, workdir)
    assert model.prior_ensemble is None and "prior_ensemble" not in without
    helpers.assert_equal({name: params[name] for name in without}, without)


@pytest.fixture
def trained(monkeypatch):
    """A world model is there already."""
    monkeypatch.setattr(train_world_model, "_train", lambda *_: None)
    monkeypatch.setattr(train_world_model, "_load_trained", lambda *_: (MODEL, helpers.make_state(MODEL).params))


def test_two_updates_and_two_after_a_resume_are_four(trained, play, tmp_path):
    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    config = train(whole, play)
    train(halves, play, **{"prior_ensemble.num_steps": 2})
    train(halves, play)
    helpers.assert_equal(*(train_world_model.load_ensemble(config, w)[1] for w in (whole, halves)))


@pytest.mark.parametrize("imagine", [True, False])
def test_it_may_be_there_for_its_disagreement_alone(trained, play, tmp_path, imagine):
    config = train(str(tmp_path), play, **{"prior_ensemble.imagine": imagine, "reward.disagreement_quantile": 0.5})
    assert (train_world_model.load(config, str(tmp_path))[0].prior_ensemble is not None) == imagine


def test_an_ensemble_that_was_not_trained_is_named(trained, play, tmp_path):
    workdir = str(tmp_path / "run")
    train(workdir, play, **{"prior_ensemble.num_members": 0})
    with pytest.raises(ValueError, match="prior_ensemble is at step 0 of 4; run experiments.train_world_model"):
        train_world_model.load(FrozenConfigDict(make_config(**{"dataset.play": play})), workdir)


def test_a_frame_counts_only_where_the_members_agree():
    ensemble = make_ensemble(num_members=2)
    params = prior_ensemble.init(ensemble, jax.random.key(0)).params
    feature = np.random.default_rng(0).normal(size=(5, 3, 40)).astype(np.float32)
    found = prior_ensemble.disagreement(ensemble, params, feature[..., :16])  # h comes first
    limit = float(np.median(found))

    def exceeds(params, feature, first):
        return feature[..., 20] > params

    verdict = functools.partial(reward_rules.where_ensemble_agrees, verdict=exceeds, ensemble=ensemble)
    read = reward_rules.agreement_params(np.float32(-0.5), params, limit)
    expected = (feature[..., 20] > -0.5) & (np.asarray(found) <= limit)
    np.testing.assert_array_equal(verdict(read, feature, feature[0]), expected)
    assert 0 < expected.sum() < (feature[..., 20] > -0.5).sum()


@pytest.fixture
def rewarded(trained, play, tmp_path, monkeypatch):
    """Trains the reward with a quantile; the classifier says yes where `positive` does."""

    def run(quantile, positive=lambda feature: jnp.ones(feature.shape[:-1], bool), name="run"):
        workdir = str(tmp_path / name)
        config = train(workdir, play, **{"reward.disagreement_quantile": quantile})
        demonstrations = train_reward.encode_attempts(config, workdir, "train", [TASK])
        monkeypatch.setattr(train_policy, "encode_demonstrations", lambda *_: demonstrations)
        monkeypatch.setattr(reward_rules, "by_classifier", lambda params, feature, first, settings: positive(feature))
        train_reward.run(config, workdir)
        return config, workdir

    return run


def test_the_limit_is_the_quantile_over_the_successes_that_imagination_shows(rewarded):
    def positive(feature):  # by two probabilities of z, which comes after h
        return feature[..., 17] > feature[..., 18]

    config, workdir = rewarded(0.25, positive)
    encoded, episodes = train_reward.encode_attempts(config, workdir, "train", [TASK])[TASK]
    imagined, followed = train_reward.imagine_attempts(config, workdir, TASK, encoded, episodes)
    rows = latents.classifier_bank(imagined, followed)
    shown = (rows.label == 1) & (rows.latent.logits[:, 0, 1] > rows.latent.logits[:, 0, 2])
    assert 0 < shown.sum() < (rows.label == 1).sum() == 2 * 3
    ensemble, params = train_world_model.load_ensemble(config, workdir)
    found = np.asarray(prior_ensemble.disagreement(ensemble, params, rows.latent.deterministic))
    limit = float(np.quantile(found[shown], 0.25))
    assert train_reward.read_limits(workdir) == {TASK: pytest.approx(limit, rel=1e-5)}
    read = train_reward.load(config, workdir, TASK)
    assert read["max_disagreement"] == pytest.approx(limit, rel=1e-5)
    rule = train_reward.rule(config, train_world_model.load(config, workdir)[0])
    feature = np.asarray(rssm.feature(rows.latent, soft=True))
    expected = positive(feature) & (found <= read["max_disagreement"])
    np.testing.assert_array_equal(rule["verdict"](read, feature, feature), expected)


def test_where_imagination_shows_no_success_there_is_no_limit(rewarded, capsys):
    config, workdir = rewarded(0.5, positive=lambda feature: jnp.zeros(feature.shape[:-1], bool))
    said = f"{TASK}: imagination shows none of the successes in 2 attempts of play, .*: every frame may count"
    assert re.search(said, capsys.readouterr().out)
    assert train_reward.read_limits(workdir) == {TASK: None}
    assert train_reward.load(config, workdir, TASK)["max_disagreement"] == np.inf


def test_a_classifier_that_is_trained_anew_has_its_limit_found_anew(rewarded):
    config, workdir = rewarded(0.5)
    limits = train_reward.read_limits(workdir)
    json_files.write(f"{workdir}/reward/disagreement.json", {TASK: 0.5})
    train_reward.run(config, workdir)
    assert train_reward.read_limits(workdir) == {TASK: 0.5}  # finished work is kept
    shutil.rmtree(f"{workdir}/reward/{TASK}")
    train_reward.run(config, workdir)
    assert train_reward.read_limits(workdir) == limits


def test_a_limit_that_is_missing_is_named(rewarded):
    config, workdir = rewarded(0.5)
    json_files.write(f"{workdir}/reward/disagreement.json", {})
    with pytest.raises(ValueError, match=f"disagreement.json has no limit for {TASK}; run experiments.train_reward"):
        train_reward.load(config, workdir, TASK)


@pytest.mark.parametrize(
    "body", ["not json", "[]", '["turn_on_led"]', '{"a": "1"}', '{"a": -1.0}', '{"a": NaN}', '{"a": true}']
)
def test_damaged_limits_are_named_before_any_work(tmp_path, body):
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward/disagreement.json").write_text(body)
    with pytest.raises(ValueError, match="disagreement.json .*; delete it and run experiments.train_reward with this"):
        train_reward.run(FrozenConfigDict(make_config(**{"reward.disagreement_quantile": 0.5})), str(tmp_path))


def test_an_ensemble_that_is_missing_is_named_before_any_classifier_is_trained(trained, play, tmp_path):
    config = make_config(**{"dataset.play": play, "reward.disagreement_quantile": 0.5, "prior_ensemble.imagine": False})
    with pytest.raises(ValueError, match="prior_ensemble is at step 0 of 4"):
        train_reward.run(FrozenConfigDict(config), str(tmp_path))
    assert not (tmp_path / "reward").exists()


def test_of_several_processes_one_alone_writes_the_limits(rewarded, monkeypatch):
    config, workdir = rewarded(0.5)
    limits = train_reward.read_limits(workdir)
    json_files.write(f"{workdir}/reward/disagreement.json", {})
    for first in (False, True):
        monkeypatch.setattr(parallel, "is_first_process", lambda first=first: first)
        train_reward.run(config, workdir)
        assert train_reward.read_limits(workdir) == (limits if first else {})
