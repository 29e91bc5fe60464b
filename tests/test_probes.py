"""Linear probes: what is there is found, in its unit, and nothing else."""

import helpers
import numpy as np
import pytest

from wam_jax import probes, specs

RNG = np.random.default_rng(0)


def test_a_probe_finds_a_linear_map_and_no_other():
    features = RNG.normal(size=(400, 12)) * np.logspace(-1, 1, 12) + 3.0
    weights, bias = RNG.normal(size=(12, 2)), np.array([1.0, -5.0])
    probe = probes.fit(features, features @ weights + bias)
    fresh = RNG.normal(size=(7, 5, 12))
    np.testing.assert_allclose(probe(fresh), fresh @ weights + bias, rtol=1e-4, atol=1e-4)
    noise = probes.fit(features, RNG.normal(size=(400, 2)))
    assert (noise.penalty >= 10).all() and np.abs(noise(features)).max() < 0.5


def test_what_a_feature_says_outright_is_decoded_beside_what_none_says():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 200))
    targets = np.stack([features[:, 7], rng.normal(size=300)], axis=-1)
    probe = probes.fit(features, targets)
    np.testing.assert_allclose(probe(features)[:, 0], targets[:, 0], atol=1e-3)
    assert probe.penalty[0] < 1e-3 and probe.penalty[1] >= 10


def test_a_probe_refuses_what_is_no_number():
    features = RNG.normal(size=(50, 3))
    with pytest.raises(ValueError, match="not finite"):
        probes.fit(features, np.full((50, 1), np.nan))


def test_errors_are_in_the_unit_of_what_is_decoded():
    observation = helpers.make_steps().observation
    observation.robot_obs[..., :3] += np.float32([0.03, 0.04, 0.0])
    observation.scene_obs[:, 4:, specs.DRAWER] = 0.1  # m
    true = probes.state_targets(observation)
    hand, drawer = probes.quantity("hand"), probes.task_quantity("open_drawer")
    assert true.shape[-1] == probes.STATE[-1].stop and drawer.name == "drawer"
    np.testing.assert_allclose(true[..., hand.start : hand.stop], 100 * observation.robot_obs[..., :3])
    np.testing.assert_allclose(true[..., drawer.start], [[0] * 4 + [10] * 4] * helpers.B)
    moved = true.copy()
    moved[..., hand.start : hand.start + 2] += [3.0, 4.0]
    np.testing.assert_allclose(probes.squared_error(moved, true, [hand])[..., 0], 25.0)
    rows = true.reshape(-1, true.shape[-1])
    middle = np.broadcast_to(rows.mean(axis=0), rows.shape)
    for decoded, expected in ((rows, 1.0), (middle, 0.0)):
        explained = probes.r2(probes.squared_error(decoded, rows, [hand, drawer]), rows, [hand, drawer])
        np.testing.assert_allclose(explained, expected, atol=1e-9)
    button = probes.quantity("button")
    assert np.isnan(probes.r2(np.zeros((len(rows), 1)), rows, [button])).all()  # it does not move
