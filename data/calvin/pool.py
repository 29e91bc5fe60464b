"""A function applied to many jobs in processes of their own, which end when this one does."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import jax

Job = TypeVar("Job")
Result = TypeVar("Result")


def run(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Result]]:
    """Yields each job with its result as it is done; the first error ends all.

    Args:
      function: of a module, so that it can be named to another process.
      jobs: picklable.
      workers: processes; 1, or a single job, stays in this one.

    Raises:
      ValueError: a process was killed, for example for want of memory.
    """
    if min(workers, len(jobs)) <= 1:
        yield from ((job, function(job)) for job in jobs)
        return
    # Spawned, not forked: JAX and TFDS hold threads, which a fork does not copy.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker) as pool:
        futures = {pool.submit(function, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():  # they would finish their jobs first
                process.terminate()
            raise
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process was killed; where memory ran out, take fewer --workers. Finished work is kept, the "
                "same command goes on from there"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def use_cpu() -> None:
    """Keeps what JAX computes here (rotation matrices, for the statistics) off the accelerator."""
    jax.config.update("jax_platforms", "cpu")


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the workers
    use_cpu()
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Ends a worker whose parent was killed; it would otherwise wait for its next job for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
