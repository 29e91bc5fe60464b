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
    error, metrics = inverse_dynamics.loss({}, (embedding, action), head=Difference())
    np.testing.assert_allclose(error, 0, atol=1e-5)
    np.testing.assert_allclose(metrics["inverse_dynamics_position_error"], 0, atol=1e-5)
    for shift in (-1, 1):
        assert inverse_dynamics.loss({}, make_batch(jax.random.key(0), shift), head=Difference())[0] > 0.3


def test_the_error_is_a_mean_over_batch_time_and_entries():
    embedding, action = make_batch(jax.random.key(0))
    offset = jnp.arange(specs.ACTION_DIM, dtype=jnp.float32)
    error, metrics = inverse_dynamics.loss({}, (embedding, action + offset), head=Difference())
    np.testing.assert_allclose(error, 3.0, rtol=1e-4)  # mean of 0 ... 6
    np.testing.assert_allclose(metrics["inverse_dynamics_position_error"], 1.0, rtol=1e-4)  # of 0, 1, 2


@functools.cache
def held_out_error(shift):
    """Error on a fresh batch, before and after 300 updates on fresh batches."""
    optimizer = optax.adam(3e-3)
    params = HEAD.init(jax.random.key(0), jnp.zeros((1, 2 * E)))["params"]
    loss = functools.partial(inverse_dynamics.loss, head=HEAD)

    @jax.jit
    def train(params):
        def update(carry, rng):
            params, optimizer_state = carry
            gradients, _ = jax.grad(loss, has_aux=True)(params, make_batch(rng, shift))
            updates, optimizer_state = optimizer.update(gradients, optimizer_state)
            return (optax.apply_updates(params, updates), optimizer_state), None

        (params, _), _ = jax.lax.scan(
            update, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), 300)
        )
        return params

    held_out = make_batch(jax.random.key(2), shift)
    return loss(params, held_out)[0], loss(train(params), held_out)[0]


def test_it_learns_the_action_between_two_frames():
    before, after = held_out_error(shift=0)
    assert after < 0.25 * before


@pytest.mark.parametrize("shift", [-1, 1])
def test_it_cannot_learn_the_action_before_or_after(shift):
    _, after = held_out_error(shift)
    assert after > 0.35  # the mean of |a| is 0.5
