"""Memory that XLA frees on a CPU is used again, without a page fault."""

import platform

import helpers
import pytest

SCRIPT = """
import resource, sys
from wam_jax import host_memory
host_memory.keep()
import jax, jax.numpy as jnp
jax.config.update("jax_cpu_enable_async_dispatch", False)
compute = jax.jit(lambda x: x.T + 1)
x = jnp.ones((4096, 4096))
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    compute(x).block_until_ready()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose allocator is told what to keep")
def test_a_call_finds_the_memory_of_the_one_before():
    done = helpers.run_python("-c", SCRIPT, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) < 4096  # 64 MB are 16,384 pages
