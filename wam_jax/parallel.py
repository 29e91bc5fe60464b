"""The only pmap of the project: many updates a dispatch, data parallel over the devices of one or several processes.

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
from jax.experimental import multihost_utils

AXIS_NAME = "devices"


def pmean(tree: Any, axis_name: str | None) -> Any:
    """Averages a tree over the devices; returns it unchanged where there is one, or `axis_name` is None."""
    alone = axis_name is None or lax.axis_size(axis_name) == 1  # on a CPU, XLA would copy the tree
    return tree if alone else lax.pmean(tree, axis_name)


def step_rng(seed: jax.Array, step: jax.Array, axis_name: str | None) -> jax.Array:
    """The key of one update on one device: folded from (seed, step, device). Seeds [G] give G keys."""
    if jnp.ndim(seed):
        return jax.vmap(step_rng, in_axes=(0, None, None))(seed, step, axis_name)
    rng = jax.random.fold_in(jax.random.key(seed), step)
    return rng if axis_name is None else jax.random.fold_in(rng, lax.axis_index(axis_name))


def local_devices(num_devices: int) -> list[jax.Device]:
    """Returns the first `num_devices` devices of this host; 0 means all.

    Raises:
      ValueError: more devices are asked for than there are, or, with several processes, not all.
    """
    devices = jax.local_devices()
    if jax.process_count() > 1 and num_devices not in (0, len(devices)):
        raise ValueError(
            f"num_devices={num_devices}, but {jax.process_count()} processes train together, each with all its "
            f"{len(devices)} devices; take 0"
        )
    if not 0 <= num_devices <= len(devices):
        raise ValueError(
            f"num_devices={num_devices}, but this host has {len(devices)} ({devices[0].platform}); ask for at most "
            f"{len(devices)}, or 0 for all (virtual CPU devices: XLA_FLAGS=--xla_force_host_platform_device_count=8)"
        )
    return devices[: num_devices or len(devices)]


def device_count(num_devices: int) -> int:
    """How many devices train together: `local_devices` of this process, times the processes."""
    return len(local_devices(num_devices)) * jax.process_count()


def is_first_process() -> bool:
    """Whether this process writes what is written once: logs, configs, checkpoints' settings."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any of the processes; all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def check_batch_size(batch_size: int, num_devices: int, *, name: str = "batch_size") -> None:
    """Raises a ValueError where a batch cannot be split evenly over the devices."""
    if batch_size <= 0 or batch_size % num_devices:
        raise ValueError(
            f"{name}={batch_size} is not divisible by {num_devices} devices; the nearest that is: "
            f"{max(1, round(batch_size / num_devices)) * num_devices}"
        )


def replicate(tree: Any, devices: list[jax.Device]) -> Any:
    """Copies a tree onto every device, with a new leading axis."""
    return shard(
        jax.tree.map(lambda x: np.broadcast_to(np.asarray(x)[None], (len(devices), *np.shape(x))), tree), devices
    )


def shard(tree: Any, devices: list[jax.Device]) -> Any:
    """Puts leaves [D, ...] on the devices, a slice of the leading axis each."""
    mesh = jax.sharding.Mesh(np.asarray(devices), (AXIS_NAME,))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS_NAME)))


def unreplicate(tree: Any) -> Any:
    """Returns a copy of the first device's part of a replicated tree, without touching the other devices."""
    return _first(jax.tree.map(lambda x: x.addressable_shards[0].data, tree))


@jax.jit
def _first(tree: Any) -> Any:  # one program: a slice for each leaf would keep the host busy
    return jax.tree.map(lambda x: x[0], tree)


def compile_updates(
    update: Callable,
    devices: list[jax.Device],
    *,
    num_updates: int | None = None,
    take: Callable[[Any, Any], Any] | None = None,
) -> Callable[[Any, Any, int, int], tuple[Any, dict]]:
    """Compiles N consecutive updates into one call on all devices; the state's buffers are donated.

    Args:
      update: `update(state, batch, rng) -> (state, metrics)`, averaging its gradients over AXIS_NAME itself.
      devices: devices of this process to run on, D of them; those of all processes train together.
      num_updates: None: the batch carries one slice per update, leaves [D, N, ...]. A number: every update of the call
        gets the same `batch`, leaves [D, ...] (a bank that the update draws its rows from).
      take: makes an update's batch out of a bank that stays on the devices and the update's own slice: the batch then
        has a field `starts` [D, N, ...], of which each update gets one, and the rest is the bank.

    Returns:
      `run(state, batch, seed, first_step) -> (state, metrics)` with replicated state [D, ...] and metrics [D, N]. An
      update of G states at once gets seeds [G], and its metrics are [D, N, G].
    """

    def run(state, batch, seed, first_step):
        def body(carry, index_and_slice):
            index, batch_slice = index_and_slice
            rng = step_rng(seed, first_step + index, AXIS_NAME)
            chosen = take(batch, batch_slice) if take else batch if num_updates else batch_slice
            return update(carry, chosen, rng)

        slices = batch.starts if take else None if num_updates else batch
        length = num_updates or jax.tree.leaves(slices)[0].shape[0]
        return lax.scan(body, state, (jnp.arange(length), slices))

    chosen = devices if jax.process_count() == 1 else None  # None: all of all processes
    return jax.pmap(run, axis_name=AXIS_NAME, in_axes=(0, 0, None, None), devices=chosen, donate_argnums=(0,))
