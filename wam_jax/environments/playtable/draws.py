"""Random numbers of Playtable: one call draws all uniform numbers that a function needs, under names.

Each call of a generator costs a fraction of a second of compilation, so functions that need many kinds of draws share
one call.
"""

import math

import jax
import jax.numpy as jnp

from wam_jax.types import Array


def uniform(rng: Array, **shapes: tuple[int, ...]) -> dict[str, Array]:
    """Draws named arrays of the given shapes, uniform in [0, 1), from one key."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    flat = jax.random.uniform(rng, (sum(sizes),))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    pieces = jnp.split(flat, ends[:-1])
    return {name: x.reshape(shape) for (name, shape), x in zip(shapes.items(), pieces, strict=True)}


def between(low, high, share: Array) -> Array:
    """Maps shares in [0, 1) to low .. high."""
    return low + (high - low) * share


def integer(low: int, high: int, share: Array) -> Array:
    """Maps shares in [0, 1) to the integers low .. high - 1: int32."""
    return jnp.floor(between(low, high, share)).astype(jnp.int32)


def choice(cumulative, share: Array) -> Array:
    """Maps shares in [0, 1) to indices whose cumulative probabilities (the last one, 1, left out) are given: int32."""
    return jnp.sum(share[..., None] >= jnp.asarray(cumulative, jnp.float32), axis=-1).astype(jnp.int32)
