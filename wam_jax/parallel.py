"""The only pmap of the project: many updates a dispatch, data parallel over devices.

An update is a pure function `update(state, batch, rng) -> (state, metrics)` that knows one thing of parallelism: the
axis name to average its gradients over. Here it is wrapped to run on all devices, N updates a call, with a random key
that depends on (seed, step, device) only, so that a resumed run repeats the stream.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

AXIS_NAME = "devices"


def pmean(tree: Any, axis_name: str | None) -> Any:
    """Averages a tree over the devices; returns it unchanged where `axis_name` is None (no parallelism)."""
    return tree if axis_name is None else lax.pmean(tree, axis_name)


def step_rng(seed: jax.Array, step: jax.Array, axis_name: str | None) -> jax.Array:
    """The key of one update on one device: folded from (seed, step, device). Seeds [G] give G keys."""
    if jnp.ndim(seed):
        return jax.vmap(step_rng, in_axes=(0, None, None))(seed, step, axis_name)
    rng = jax.random.fold_in(jax.random.key(seed), step)
    return rng if axis_name is None else jax.random.fold_in(rng, lax.axis_index(axis_name))


def local_devices(num_devices: int) -> list[jax.Device]:
    """Returns the first `num_devices` devices of this host; 0 means all.

    Raises:
      ValueError: more devices are asked for than there are.
    """
    devices = jax.local_devices()
    if not 0 <= num_devices <= len(devices):
        raise ValueError(
            f"num_devices={num_devices}, but this host has {len(devices)} ({devices[0].platform}); ask for at most "
            f"{len(devices)}, or 0 for all (virtual CPU devices: XLA_FLAGS=--xla_force_host_platform_device_count=8)"
        )
    return devices[: num_devices or len(devices)]


def check_batch_size(batch_size: int, num_devices: int, *, name: str = "batch_size") -> None:
    """Raises a ValueError where a batch cannot be split evenly over the devices."""
    if batch_size <= 0 or batch_size % num_devices:
        raise ValueError(
            f"{name}={batch_size} is not divisible by {num_devices} devices; the nearest that is: "
            f"{max(1, round(batch_size / num_devices)) * num_devices}"
        )


def replicate(tree: Any, devices: list[jax.Device]) -> Any:
    """Copies a tree onto every device, with a new leading axis."""
    mesh = jax.sharding.Mesh(np.asarray(devices), (AXIS_NAME,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS_NAME))
    return jax.tree.map(
        lambda x: jax.device_put(np.broadcast_to(np.asarray(x)[None], (len(devices), *np.shape(x))), sharding), tree
    )


def unreplicate(tree: Any) -> Any:
    """Returns the first device's copy of a replicated tree, without touching the other devices."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)


def compile_updates(
    update: Callable, devices: list[jax.Device], *, num_updates: int | None = None
) -> Callable[[Any, Any, int, int], tuple[Any, dict]]:
    """Compiles N consecutive updates into one call on all devices; the state's buffers are donated.

    Args:
      update: `update(state, batch, rng) -> (state, metrics)`, averaging its gradients over AXIS_NAME itself.
      devices: devices to run on, D of them.
      num_updates: None: the batch carries one slice per update, leaves [D, N, ...]. A number: every update of the call
        gets the same `batch`, leaves [D, ...] (a bank that the update draws its rows from).

    Returns:
      `run(state, batch, seed, first_step) -> (state, metrics)` with replicated state [D, ...] and metrics [D, N]. An
      update of G states at once gets seeds [G], and its metrics are [D, N, G].
    """

    def run(state, batch, seed, first_step):
        def body(carry, index_and_slice):
            index, batch_slice = index_and_slice
            rng = step_rng(seed, first_step + index, AXIS_NAME)
            return update(carry, batch if num_updates else batch_slice, rng)

        length = num_updates or jax.tree.leaves(batch)[0].shape[0]
        slices = None if num_updates else batch
        return lax.scan(body, state, (jnp.arange(length), slices))

    return jax.pmap(run, axis_name=AXIS_NAME, in_axes=(0, 0, None, None), devices=devices, donate_argnums=(0,))
