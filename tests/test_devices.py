"""Devices by number, batches that divide by them, and updates without any parallelism."""

import jax
import jax.numpy as jnp
import pytest

from wam_jax import parallel


@pytest.mark.parametrize("number", [9999, -1])
def test_more_devices_than_there_are(number):
    available = len(jax.local_devices())
    with pytest.raises(ValueError, match=f"num_devices={number}, but this host has {available}.*or 0 for all"):
        parallel.local_devices(number)


def test_devices_by_number():
    assert parallel.local_devices(0) == jax.local_devices()
    assert parallel.local_devices(1) == jax.local_devices()[:1]


@pytest.mark.parametrize(("size", "devices", "nearest"), [(10, 4, 8), (3, 8, 8), (0, 2, 2), (-4, 2, 2)])
def test_a_batch_that_does_not_divide(size, devices, nearest):
    with pytest.raises(ValueError, match=f"batch_size={size} is not divisible by {devices} devices.*: {nearest}$"):
        parallel.check_batch_size(size, devices)
    parallel.check_batch_size(nearest, devices)


def test_without_an_axis_name_nothing_is_averaged():
    tree = {"x": jnp.arange(3.0)}
    assert parallel.pmean(tree, None) is tree
    rng = parallel.step_rng(0, 3, None)
    assert rng == jax.random.fold_in(jax.random.key(0), 3)
