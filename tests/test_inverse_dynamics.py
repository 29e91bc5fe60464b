"""Inverse dynamics: which frames predict which action, and that it learns."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wam_jax import inverse_dynamics, specs

quick_compilation = helpers.quick_compilation
B, T, E = 8, 6, 10
HEAD = inverse_dynamics.build((64, 64), jnp.float32)


def make_batch(rng, shift=0):
    """Embeddings whose first entries move by the actions; `shift` 1 hands each action to the pair behind its own."""
    action_rng, noise_rng = jax.random.split(rng)
    action = jax.random.uniform(action_rng, (B, T, specs.ACTION_DIM), minval=-1)
    position = jnp.cumsum(action, axis=1) - action  # before the action
    rest = 0.1 * jax.random.normal(noise_rng, (B, T, E - specs.ACTION_DIM))
    return jnp.concatenate([position, rest], axis=-1), jnp.roll(action, shift, axis=1)


class Difference:
    """In place of the head: the difference of the two embeddings it is given."""

    def apply(self, variables, pairs):
        del variables
        before, after = jnp.split(pairs, 2, axis=-1)
        return (after - before)[..., : specs.ACTION_DIM]


def test_an_action_belongs_to_the_frames_before_and_after_it():
    embedding, action = make_batch(jax.random.key(0))
    error, metrics = inverse_dynamics.loss({}, (embedding, action), None, head=Difference())
    np.testing.assert_allclose(error, 0, atol=1e-5)
    np.testing.assert_allclose(metrics["inverse_dynamics_position_error"], 0, atol=1e-5)
    for shift in (-1, 1):
        assert inverse_dynamics.loss({}, make_batch(jax.random.key(0), shift), None, head=Difference())[0] > 0.3


def test_the_error_is_a_mean_over_batch_time_and_entries():
    embedding, action = make_batch(jax.random.key(0))
    offset = jnp.arange(specs.ACTION_DIM, dtype=jnp.float32)
    error, metrics = inverse_dynamics.loss({}, (embedding, action + offset), None, head=Difference())
    np.testing.assert_allclose(error, 3.0, rtol=1e-4)  # mean of 0 ... 6
    np.testing.assert_allclose(metrics["inverse_dynamics_position_error"], 1.0, rtol=1e-4)  # of 0, 1, 2


class FirstEntries:
    """In place of the head: what the first of two frames holds, less `far` for each step beyond one between them."""

    def __init__(self, far):
        self.far = far

    def apply(self, variables, pairs):
        del variables
        before, after, distance = jnp.split(pairs, [E, 2 * E], axis=-1)
        steps = jnp.argmax(distance, axis=-1, keepdims=True) + 1
        np.testing.assert_array_equal(steps, (after - before)[..., -1:])  # the last entry counts the frames
        np.testing.assert_array_equal(distance.sum(-1), 1)
        return before[..., : specs.ACTION_DIM] - self.far * (steps - 1)


def test_several_steps_predict_the_first_action_between_two_frames_told_how_far_apart_they_are():
    _, action = make_batch(jax.random.key(0))
    count = jnp.broadcast_to(jnp.arange(float(T))[:, None], (B, T, 1))
    frames = jnp.concatenate([action, jnp.zeros((B, T, E - specs.ACTION_DIM - 1)), count], axis=-1)
    exact, _ = inverse_dynamics.loss({}, (frames, action), None, head=FirstEntries(far=0), max_steps=3)
    assert exact == 0
    error, metrics = inverse_dynamics.loss({}, (frames, action), None, head=FirstEntries(far=1), max_steps=3)
    np.testing.assert_allclose(error, (0 * 5 + 1 * 4 + 2 * 3) / (5 + 4 + 3), rtol=1e-6)  # over all pairs of 6 frames
    assert metrics["inverse_dynamics_position_error"] == 0  # of frames in a row, for any number of steps


class FirstOfTwo:
    """In place of the head: what the first of two frames holds."""

    def apply(self, variables, pairs):
        del variables
        return pairs[..., : specs.ACTION_DIM]


class Nothing:
    """In place of the head: zeros."""

    def apply(self, variables, pairs):
        del variables
        return jnp.zeros((*pairs.shape[:-1], specs.ACTION_DIM))


def test_shuffled_targets_are_the_same_actions_in_an_order_of_the_key():
    embedding, action = make_batch(jax.random.key(0))
    action = action.at[:, -1].set(100.0)  # leads nowhere, so it must not become a target

    def error(head, shuffled, seed=0):
        return float(
            inverse_dynamics.loss({}, (embedding, action), jax.random.key(seed), head=head, shuffled=shuffled)[0]
        )

    np.testing.assert_allclose(error(Nothing(), shuffled=True), error(Nothing(), shuffled=False), rtol=1e-5)
    assert error(Nothing(), shuffled=True) < 1
    found = [error(Difference(), shuffled=True, seed=seed) for seed in range(2)]
    assert min(found) > 0.5
    assert found[0] != found[1]


@pytest.mark.parametrize("axis", [0, 1])
def test_targets_are_shuffled_over_batch_and_time(axis):
    """Within a window, or within a moment of all windows, the mean action would still be there to learn."""
    action = jax.lax.broadcasted_iota(
        jnp.float32, (B, T, specs.ACTION_DIM), axis
    )  # one for each window, or for each moment
    loss = functools.partial(inverse_dynamics.loss, {}, (action, action), head=FirstOfTwo())
    assert loss(None)[0] == 0
    assert loss(jax.random.key(0), shuffled=True)[0] > 1


@functools.cache
def held_out_error(shift=0, shuffled=False):
    """Error on a fresh batch, before and after 300 updates on fresh batches."""
    optimizer = optax.adam(3e-3)
    params = HEAD.init(jax.random.key(0), jnp.zeros((1, 2 * E)))["params"]
    loss = functools.partial(inverse_dynamics.loss, head=HEAD, shuffled=shuffled)

    @jax.jit
    def train(params):
        def update(carry, rng):
            params, optimizer_state = carry
            gradients, _ = jax.grad(loss, has_aux=True)(params, make_batch(rng, shift), rng)
            updates, optimizer_state = optimizer.update(gradients, optimizer_state)
            return (optax.apply_updates(params, updates), optimizer_state), None

        (params, _), _ = jax.lax.scan(
            update, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), 300)
        )
        return params

    held_out = make_batch(jax.random.key(2), shift)
    return tuple(loss(x, held_out, jax.random.key(3))[0] for x in (params, train(params)))


def test_it_learns_the_action_between_two_frames():
    before, after = held_out_error(shift=0)
    assert after < 0.25 * before


@pytest.mark.parametrize("options", [{"shift": -1}, {"shift": 1}, {"shuffled": True}])
def test_it_cannot_learn_the_action_before_or_after_or_of_another_frame(options):
    _, after = held_out_error(**options)
    assert after > 0.35  # the mean of |a| is 0.5
