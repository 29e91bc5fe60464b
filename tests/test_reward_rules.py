"""The reward rule of imagination: by the classifier, and by the oracle on decoded scene states."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from experiments import finetune_policy, train_policy, train_reward, train_world_model
from wam_jax import diffusion_policy, imagination, reward_rules, specs
from wam_jax.environments.playtable import geometry
from wam_jax.types import LatentState

quick_compilation = helpers.quick_compilation


class Readable:
    """In place of the decoder: the scaled state is what the features begin with."""

    def apply(self, variables, feature):
        assert variables == {"params": {}}
        return feature[..., : specs.NUM_MECHANISMS]


def scene_rule(consecutive):
    verdict = functools.partial(reward_rules.by_scene, decoder=Readable())
    return functools.partial(reward_rules.in_a_row, verdict=verdict, consecutive=consecutive)


def make_scenes(seed, shape):
    """Scene states in which mechanisms stand anywhere and lights are on or off."""
    rng = np.random.default_rng(seed)
    scene_obs = rng.uniform(0, 1, (*shape, specs.SCENE_OBS_DIM)).astype(np.float32)
    scene_obs[..., :4] *= geometry.JOINT_LIMITS
    scene_obs[..., specs.LIGHTBULB : specs.LED + 1] = scene_obs[..., specs.LIGHTBULB : specs.LED + 1] > 0.5
    return scene_obs


def test_mechanisms_are_scaled_to_their_ranges_and_back():
    ends = np.zeros((2, specs.SCENE_OBS_DIM), np.float32)
    ends[1, :6] = [*geometry.JOINT_LIMITS, 1, 1]
    np.testing.assert_allclose(specs.scaled_mechanisms(ends), [[-1] * 6, [1] * 6], rtol=1e-6)
    scenes = make_scenes(0, (5, 3))
    np.testing.assert_allclose(specs.unscaled_mechanisms(specs.scaled_mechanisms(scenes)), scenes[..., :6], atol=1e-6)


@pytest.mark.parametrize("task", specs.TASKS)
def test_the_rule_fires_where_the_oracle_does_on_decoded_states(task):
    frames, episodes = 40, 6
    scenes = make_scenes(specs.task_index(task), (frames, episodes))
    params = reward_rules.scene_params({"scene_decoder": {}}, task)
    solved = specs.task_success(params["task"], scenes[0], scenes[1:])
    assert 0.05 < solved.mean() < 0.95
    features, count, fired = specs.scaled_mechanisms(scenes), jnp.zeros(episodes, jnp.int32), []
    for first in range(1, frames, 13):  # the count goes on from chunk to chunk
        chunk, count = scene_rule(2)(params, features[first : first + 13], features[0], count)
        fired.append(chunk)
    twice = solved & np.concatenate([np.zeros((1, episodes), bool), solved[:-1]])
    np.testing.assert_array_equal(np.concatenate(fired), twice)


def test_several_frames_in_a_row_must_be_positive():
    frames = np.array([1, 1, 0, 1, 1, 1, 1, 0], bool)[:, None]

    def fire(consecutive):
        rule = functools.partial(
            reward_rules.in_a_row, verdict=lambda params, feature, first: feature[..., 0], consecutive=consecutive
        )
        count, fired = jnp.zeros(1, jnp.int32), []
        for chunk in (frames[:3], frames[3:]):
            success, count = rule({}, chunk[..., None], None, count)
            fired += success[:, 0].tolist()
        return fired

    assert fire(3) == [False, False, False, False, False, True, True, False]
    assert fire(1) == frames[:, 0].tolist()


def test_an_imagined_episode_ends_where_the_drawer_has_moved_from_where_it_was():
    """In a world whose h is the scaled state, and where every action opens the drawer by 2.8 cm."""
    config = helpers.make_config()
    policy_settings, rollouts = train_policy.policy_settings(config), 12
    settings = FrozenConfigDict({"num_rollouts": rollouts, "horizon": 3, "resample_latent": True})
    scenes = np.zeros((rollouts, specs.SCENE_OBS_DIM), np.float32)
    scenes[:, specs.DRAWER] = np.linspace(0, 0.2, rollouts)
    one_class = jnp.ones((rollouts, 1, 1))
    start = LatentState(specs.scaled_mechanisms(scenes), 0 * one_class, one_class)
    limit = 0.22

    def imagine_step(params, latent, action, rng):
        del params, action, rng
        drawer = specs.unscaled_mechanisms(latent.deterministic)[:, specs.DRAWER]
        opened = jnp.zeros((rollouts, specs.SCENE_OBS_DIM)).at[:, specs.DRAWER].set(jnp.minimum(drawer + 0.028, limit))
        return latent.replace(deterministic=specs.scaled_mechanisms(opened))

    policy = diffusion_policy.init(jax.random.key(0), specs.NUM_MECHANISMS + 1, policy_settings).params
    params = reward_rules.scene_params({"scene_decoder": {}}, "open_drawer")
    inputs = imagination.ImaginationInputs(start, jnp.int32(rollouts), {}, params, policy)
    episodes = imagination.rollout(
        diffusion_policy.PolicyParams(policy, policy), inputs, jax.random.key(0), explore=False, settings=settings,
        imagine_step=imagine_step, reward_rule=scene_rule(1), policy_settings=policy_settings,
    )  # fmt: skip
    drawer = specs.unscaled_mechanisms(episodes.feature[0, :, : specs.NUM_MECHANISMS])[:, specs.DRAWER]
    # 2.8 cm a step: more than 12 cm after 5 steps, in the second chunk of four; never where the end stop is too near.
    np.testing.assert_array_equal(episodes.terminated[1], drawer < limit - 0.12)
    assert not episodes.terminated[0].any() and not episodes.terminated[2].any()
    assert 0 < episodes.terminated[1].sum() < rollouts


def test_the_scene_rule_reads_the_world_model_and_has_nothing_to_train(monkeypatch, capsys, tmp_path):
    config = helpers.make_config(scene_weight=1.0)
    config.reward.kind = "scene"
    config = helpers.freeze(config)
    model = helpers.make_model(scene_weight=1.0)
    params = helpers.make_state(model).params
    monkeypatch.setattr(train_world_model, "load", lambda config, workdir: (model, params))
    train_reward.run(config, str(tmp_path))
    printed = capsys.readouterr().out
    assert "there is nothing to train" in printed and len(printed.splitlines()) == 1 and not list(tmp_path.iterdir())
    read = train_reward.load(config, str(tmp_path), "close_drawer")
    helpers.assert_equal(read, {"scene_decoder": params["scene_decoder"], "task": 1})
    rule = finetune_policy.imagination_functions(config, model)["reward_rule"]
    features = np.random.default_rng(0).normal(size=(5, 3, 32)).astype(np.float32)
    decoded = model.scene_decoder.apply({"params": params["scene_decoder"]}, features)
    expected = specs.task_success(1, *(specs.unscaled_mechanisms(x) for x in (decoded[0], decoded[1:])))
    fired, _ = rule(read, features[1:], features[0], jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(fired, expected)
