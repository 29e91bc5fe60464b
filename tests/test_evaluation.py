"""Rollouts count what the oracle sees, and evaluate the policy that training saved."""

import functools
import shutil
from unittest import mock

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from experiments import config_values, evaluate, finetune_policy, train_policy, train_reward, train_world_model
from wam_jax import (
    diffusion_policy,
    evaluation,
    imagination,
    parallel,
    specs,
    success_classifier,
    training,
    world_model,
)
from wam_jax.checkpoints import Checkpointer
from wam_jax.diffusion_policy import PolicyParams

quick_compilation = helpers.quick_compilation
TASK = "open_drawer"  # solved once the drawer has moved more than 0.12 m
CONFIG = FrozenConfigDict(helpers.make_config())
RNG = jax.random.key(7)


class Script:
    """Moves each episode's drawer by given speeds, [B, steps], and notes what it is told."""

    sees = True

    def __init__(self, speeds, chunk=4):
        self.speeds, self.chunk = np.asarray(speeds, np.float32), chunk
        self.starts, self.observed, self.keys = [], [], []

    def start(self, task, state, observation, rng):
        self.starts.append((np.asarray(task), np.asarray(state), np.asarray(observation.scene_obs[:, specs.DRAWER])))
        return 0

    def act(self, carry, state, rng):
        self.keys.append([tuple(key) for key in jax.random.key_data(rng).tolist()])
        actions = np.zeros((len(self.speeds), self.chunk, specs.ACTION_DIM), np.float32)
        actions[..., 0] = self.speeds[:, carry : carry + self.chunk]
        return carry, jnp.asarray(actions)

    def observe(self, carry, action, observation, rng):
        assert observation.scene_obs.shape == (len(self.speeds), self.chunk, specs.SCENE_OBS_DIM)
        self.observed.append((np.asarray(action[..., 0]), np.asarray(observation.scene_obs[..., specs.DRAWER])))
        return carry + self.chunk


def constant(*speeds):
    return np.repeat(np.float32(speeds)[:, None], 40, axis=1)


def run(policy, *, max_steps=12, task=TASK, rng=RNG, first=0, **options):
    numbers = range(first, first + len(policy.speeds))
    return evaluation.rollout(helpers.Drawer(), policy, task, rng, numbers=numbers, max_steps=max_steps, **options)


def test_success_and_its_first_step():
    speeds = constant(1.0, 0.5, 0.35, 0.115, 0.0, -1.0)
    back = np.float32([1, 1, -1, -1] + [-1] * 36)  # solved, and then closed again
    result = run(Script(np.concatenate([speeds, back[None]])))
    assert result.success.tolist() == [True, True, True, True, False, False, True]
    assert result.steps.tolist() == [2, 3, 4, 11, 12, 12, 2]


def test_success_counts_since_the_start_of_the_episode():
    result = run(Script(constant(-1.0, -0.5, 1.0)), task="close_drawer")
    assert result.success.tolist() == [True, True, False]
    assert result.steps.tolist() == [2, 3, 12]


def test_success_after_the_limit_does_not_count():
    policy = Script(constant(0.115, 0.13, 1.0))  # after 11, 10 and 2 steps
    result = run(policy, max_steps=10)
    assert result.success.tolist() == [False, True, True]
    assert result.steps.tolist() == [10, 10, 2]
    assert len(policy.keys) == 3  # the third chunk began before the limit
    assert len({key for keys in policy.keys for key in keys}) == 3 * 3  # an own one for each episode and decision


def test_a_policy_is_told_what_it_did_and_what_came_of_it():
    policy = Script(constant(0.1, 0.2))
    result = run(policy, max_steps=12, films=1)
    (tasks, state, first), *others = policy.starts
    assert not others
    assert tasks.tolist() == [specs.task_index(TASK)] * 2
    np.testing.assert_array_equal(state, first)
    assert len(policy.observed) == 2  # after the last chunk nothing is decided
    for index, (action, drawer) in enumerate(policy.observed):
        steps = 0.1 * (np.arange(4) + 1 + 4 * index)
        np.testing.assert_allclose(action, policy.speeds[:, :4])
        np.testing.assert_allclose(drawer, first[:, None] + np.outer([0.1, 0.2], steps), rtol=1e-5)
    film = np.concatenate([first[:1], *(drawer[0] for _, drawer in policy.observed)])
    np.testing.assert_allclose(result.video.scene_obs[0, :9, specs.DRAWER], film, rtol=1e-6)
    assert result.video.rgb_static.shape == (1, 13, 64, 64, 3)
    np.testing.assert_allclose(result.actions[0, :, 0], [0.1] * 12)


def test_only_what_is_looked_at_is_drawn():
    """By the policy, until the last decision, while the episode is unsolved; or in a film."""
    fast, slow, still = constant(1.0), constant(0.25), constant(0.0)
    table = helpers.Drawer()
    policy = Script(np.concatenate([fast, slow, still]))  # solved after 2, after 5 steps, never
    evaluation.rollout(table, policy, TASK, RNG, numbers=range(3), max_steps=12)
    assert [row.tolist() for row in table.drawn] == [[True] * 3, [True] * 3, [False, True, True], [False] * 3]
    table.drawn.clear()
    policy.sees = False
    result = evaluation.rollout(table, policy, TASK, RNG, numbers=range(3), max_steps=12, films=2)
    assert [row.tolist() for row in table.drawn] == [[True, True, False]] * 4
    assert result.video.rgb_static.shape == (2, 13, 64, 64, 3)


def test_a_rollout_ends_when_all_is_solved():
    policy = Script(constant(1.0, 0.5))
    result = run(policy)
    assert (len(policy.keys), result.steps.tolist(), result.actions.shape) == (1, [2, 3], (0, 4, 7))


def test_batches_meet_the_starts_of_the_whole():
    whole, part = Script(constant(0.0, 0.0, 0.0)), Script(constant(0.0, 0.0))
    run(whole)
    run(part, first=1)
    np.testing.assert_array_equal(whole.starts[0][1][1:], part.starts[0][1])
    assert [keys[1:] for keys in whole.keys] == part.keys  # and the same noise


def test_the_end_of_each_episode_is_told_as_it_comes():
    told = []
    speeds = constant(0.35, 1.0, 0.0)

    class Watched(Script):
        def act(self, carry, state, rng):
            told.append("decision")
            return super().act(carry, state, rng)

    run(Watched(speeds), first=4, max_steps=8, ended=lambda *outcome: told.append(outcome))
    assert told == ["decision", (5, True, 2), (4, True, 4), "decision", (6, False, 8)]


def test_every_policy_meets_the_same_starts():
    slow, fast = Script(constant(0.0, 0.0)), Script(constant(1.0, 1.0), chunk=2)
    run(slow)
    run(fast, max_steps=6)
    np.testing.assert_array_equal(slow.starts[0][1], fast.starts[0][1])
    other = Script(constant(0.0, 0.0))
    run(other, rng=jax.random.key(8))
    assert (other.starts[0][1] != slow.starts[0][1]).all()


def test_a_scripted_expert_sees_the_state_before_each_action():
    policy = evaluation.ScriptedPolicy(helpers.Drawer())
    result = evaluation.rollout(helpers.Drawer(), policy, TASK, RNG, numbers=range(3), max_steps=6, films=1)
    assert result.success.all()
    assert result.steps.tolist() == [3] * 3  # 0.05 m a step
    # In an open loop it would push on; it stops where it wanted to be.
    np.testing.assert_allclose(result.actions[0, :, 0], [0.5, 0.5, 0.4, 0, 0, 0], atol=1e-5)


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="unknown task 'open_door'; expected one of open_drawer"):
        run(Script(constant(0.0)), task="open_door")


# --- The diffusion policy on filtered latents ---


@functools.cache
def trained_world_model():
    model = world_model.build(CONFIG.world_model)
    return model, helpers.make_state(model)


@functools.cache
def policy_params(seed):
    init = functools.partial(diffusion_policy.init, settings=train_policy.policy_settings(CONFIG))
    dim = world_model.feature_dim(CONFIG.world_model)
    return jax.jit(init, static_argnums=1)(jax.random.key(seed), dim).params


def latent_policy(params):
    model, state = trained_world_model()
    return evaluation.LatentPolicy(model, state.params, params, train_policy.policy_settings(CONFIG))


def test_a_latent_policy_filters_as_the_world_model_observes():
    model = helpers.make_model(kl_weight=2.5)  # settings of its own: compiled here, without noise
    params = helpers.make_state(model).params
    steps = helpers.make_steps(shape=(2, 9))
    policy_pair = PolicyParams(policy_params(0), policy_params(0))
    policy = evaluation.LatentPolicy(model, params, policy_pair, train_policy.policy_settings(CONFIG))

    def observations(index):
        return jax.tree.map(lambda x: x[:, index], steps.observation)

    with mock.patch.object(world_model, "sample_stochastic", helpers.sample_mode):
        rngs = jax.random.split(RNG)
        latents = [policy.start(None, None, observations(0), rngs)]
        for first in (0, 4):  # two chunks; action t leads to frame t + 1
            chunk, seen = steps.action[:, first : first + 4], observations(slice(first + 1, first + 5))
            latents.append(policy.observe(latents[-1], chunk, seen, rngs))
        embedding = jax.jit(functools.partial(world_model.embed, model))(params, steps.observation)
        whole = jax.jit(functools.partial(world_model.observe, model))(params, embedding, steps.action, RNG)
    for latent, t in zip(latents, (0, 4, 8), strict=True):
        helpers.assert_close(latent, jax.tree.map(lambda x, t=t: x[:, t], whole), atol=1e-5)


def test_a_latent_policy_acts_within_range_and_closes_or_opens_the_gripper():
    policy = latent_policy(PolicyParams(policy_params(0), policy_params(0)))
    latent = helpers.make_latents(0, (64,), CONFIG.world_model)
    carry, chunk = policy.act(latent, None, jax.random.split(RNG, 64))
    assert carry is latent
    assert chunk.shape == (64, 4, 7)
    assert np.abs(chunk).max() <= 1
    assert set(np.unique(chunk[..., 6])) == {-1.0, 1.0}
    assert len(np.unique(chunk[:, 0, 0])) > 32


def test_what_a_latent_policy_does_in_an_episode_does_not_depend_on_the_others():
    policy = latent_policy(PolicyParams(policy_params(0), policy_params(0)))
    steps, rngs = helpers.make_steps(shape=(4, 4)), jax.random.split(RNG, 4)

    def play(rows):
        chosen = jax.tree.map(lambda x: x[rows], (steps.observation, steps.action))
        observation, action = chosen
        carry = policy.start(None, None, jax.tree.map(lambda x: x[:, 0], observation), rngs[rows])
        carry = policy.observe(carry, action, observation, rngs[rows])
        return carry, policy.act(carry, None, rngs[rows])[1]

    rows = np.array([2, 0])
    whole, some = play(np.arange(4)), play(rows)
    helpers.assert_close(jax.tree.map(lambda x: x[rows], whole), some, atol=1e-5)
    assert (whole[1][0] != whole[1][1]).any()


def test_start_latents_are_those_of_the_rollout():
    policy = latent_policy(PolicyParams(policy_params(0), policy_params(0)))
    with mock.patch.object(policy, "start", wraps=policy.start) as start:
        evaluation.rollout(helpers.Drawer(), policy, TASK, RNG, numbers=range(3), max_steps=4)
        latents = evaluation.start_latents(helpers.Drawer(), policy, TASK, RNG, numbers=range(3))
    (*in_rollout, first_keys), (*alone, second_keys) = (call.args for call in start.call_args_list)
    helpers.assert_equal(in_rollout, alone)
    assert (first_keys == second_keys).all()
    assert latents.deterministic.shape == (3, CONFIG.world_model.deterministic_dim)


# --- What the evaluator loads is what training saved ---


def save(workdir, stage, state, settings):
    checkpointer = Checkpointer(f"{workdir}/{stage}")
    checkpointer.save(settings.num_steps, state, settings.to_dict())
    checkpointer.close()


def fit(workdir, stage, update, state, bank, settings):
    devices = parallel.local_devices(1)
    return training.fit(
        parallel.compile_updates(update, devices, num_updates=2), state,
        training.repeat(parallel.replicate(bank, devices)), stage=stage, workdir=str(workdir),
        settings=settings.to_dict(), seed=0, num_steps=4, updates_per_call=2, save_every=2, devices=devices,
    )  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with every stage, and the states that training returned."""
    path = tmp_path_factory.mktemp("run")
    _, model_state = trained_world_model()
    save(path, train_world_model.STAGE, model_state, CONFIG.world_model)
    settings = train_policy.policy_settings(CONFIG)
    rows = diffusion_policy.PolicyBatch(
        helpers.make_latents(0, (20,), CONFIG.world_model),
        np.random.default_rng(0).uniform(-1, 1, (20, settings.chunk, 7)).astype(np.float32),
    )
    bank = diffusion_policy.PolicyBank(rows, np.int32(20))
    update = functools.partial(diffusion_policy.update_from_bank, settings=settings, axis_name=parallel.AXIS_NAME)
    policy = fit(path, f"policy/{TASK}", update, train_policy.initial_state(CONFIG, TASK), bank, settings)

    def move(state, batch, rng):
        del batch, rng
        actor = jax.tree.map(lambda x: x + 0.01, state.params.actor)
        average = jax.tree.map(lambda x: x - 0.01, state.ema_actor)
        return state.replace(params=state.params.replace(actor=actor), ema_actor=average), {"moved": jnp.zeros(())}

    start = finetune_policy.initial_state(CONFIG, TASK, policy.ema_params)
    ppo = fit(path, f"ppo/{TASK}", move, start, np.zeros(1), finetune_policy.ppo_settings(CONFIG))
    classifier = train_reward.initial_state(CONFIG, TASK)
    save(path, f"reward/{TASK}", classifier, train_reward.reward_settings(CONFIG))
    return str(path), {"policy": policy, "ppo": ppo, "reward": classifier, "world_model": model_state}


def act(policy):
    latent = helpers.make_latents(1, (5,), CONFIG.world_model)
    return np.asarray(latent_policy(policy).act(latent, None, jax.random.split(RNG, len(latent.logits)))[1])


def test_the_cloned_policy_is_the_average_that_training_saved(workdir):
    path, states = workdir
    trained = states["policy"]
    loaded = train_policy.load(CONFIG, path, TASK)
    helpers.assert_equal(loaded, trained.ema_params)
    actions = act(evaluate.load_policy(CONFIG, path, "bc", TASK))
    np.testing.assert_array_equal(actions, act(PolicyParams(trained.ema_params, trained.ema_params)))
    assert (actions != act(PolicyParams(trained.params, trained.params))).any()


def test_the_fine_tuned_policy_is_the_cloned_one_and_the_average_that_training_saved(workdir):
    path, states = workdir
    base, actor = states["policy"].ema_params, states["ppo"].ema_actor
    loaded = evaluate.load_policy(CONFIG, path, "ppo", TASK)
    helpers.assert_equal((loaded.base, loaded.finetuned), (base, actor))
    actions = act(loaded)
    np.testing.assert_array_equal(actions, act(PolicyParams(base, actor)))
    for other in (base, states["ppo"].params.actor):
        assert (actions != act(PolicyParams(base, other))).any()


def test_world_model_and_classifier_are_those_that_training_saved(workdir):
    path, states = workdir
    model, params = train_world_model.load(CONFIG, path)
    helpers.assert_equal(params, states["world_model"].params)
    assert model.settings == CONFIG.world_model
    reward_params = train_reward.load(CONFIG, path, TASK)
    helpers.assert_equal(reward_params, jax.device_get(states["reward"].params))
    feature = np.zeros((1, world_model.feature_dim(CONFIG.world_model)), np.float32)
    assert 0 < success_classifier.success_probability(reward_params, feature, settings=CONFIG.reward)[0] < 1


@pytest.mark.parametrize("stage", ["bc", "ppo"])
def test_a_loaded_policy_acts_in_the_environment_as_the_trained_one(workdir, stage):
    path, states = workdir
    base = states["policy"].ema_params
    trained = latent_policy(PolicyParams(base, states["ppo"].ema_actor if stage == "ppo" else base))
    loaded = evaluate.latent_policy(CONFIG, path, stage, TASK)
    results = [
        evaluation.rollout(helpers.Drawer(), policy, TASK, RNG, numbers=range(3), max_steps=8)
        for policy in (trained, loaded)
    ]
    helpers.assert_equal(*results)


def test_success_is_imagined_for_as_long_as_an_episode_outside_whatever_ppo_has(workdir):
    path, _ = workdir
    starts, trained = helpers.make_latents(2, (2,), CONFIG.world_model), evaluate.load(CONFIG, path, "bc", TASK)
    for config in (CONFIG, config_values.changed(CONFIG, "ppo", max_steps=4)):
        with mock.patch.object(imagination, "success_rate", return_value=0.5) as success_rate:
            evaluate.imagined_success(config, trained, starts)
        assert len(success_rate.call_args.args[0].terminated) == CONFIG.evaluation.max_steps // CONFIG.policy.chunk == 3


@pytest.mark.parametrize("missing", ["reward", "policy"])
def test_what_an_evaluation_lacks_is_named_before_an_episode_is_played(workdir, tmp_path, monkeypatch, missing):
    shutil.copytree(workdir[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / missing)
    monkeypatch.setattr(evaluation, "rollout", mock.Mock(side_effect=AssertionError("an episode was played")))
    config = helpers.freeze(CONFIG, tasks=(TASK,))
    with pytest.raises(ValueError, match=f"run/{missing}/{TASK} is at step 0"):
        evaluate.run(config, str(tmp_path / "run"), "bc")


def test_a_missing_stage_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/policy/{TASK} is at step 0 of 4; run experiments.train_policy"):
        train_policy.load(CONFIG, str(tmp_path), TASK)
