"""Several processes that train together: how they find each other. docs/several_devices.md says how to start them."""

from typing import Any

import jax
from absl import flags

_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes: SLURM, GKE and TPU pods are found")
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where nothing says so")
flags.DEFINE_integer("num_processes", None, "With --coordinator_address", lower_bound=1)
flags.DEFINE_integer("process_id", None, "With --coordinator_address: 0 to num_processes - 1", lower_bound=0)


def connect(trains: bool) -> None:
    """Joins the other processes, where the command line says that there are some; before JAX looks for devices.

    Raises:
      ValueError: the flags contradict each other, nothing says how to find the others, or this is for one process.
    """
    names = "coordinator_address", "num_processes", "process_id"
    given: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(names) and not _DISTRIBUTED.value:
        return
    if not trains:
        raise ValueError("this binary runs in one process; only those that train run in several")
    if 0 < len(missing) < len(names):
        raise ValueError(f"{', '.join(missing)} missing: --{', --'.join(names)} go together")
    if not missing and given["process_id"] >= given["num_processes"]:
        raise ValueError(f"--process_id={given['process_id']}; expected less than --num_processes")
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: {' '.join(str(error).split())}; where no SLURM, GKE or TPU pod is found, give --"
            + ", --".join(names)
        ) from error
