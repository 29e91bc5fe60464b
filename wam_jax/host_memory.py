"""Memory of the host that is freed stays with the process, in huge pages: XLA's temporaries on a CPU.

A CPU program allocates its temporaries anew at each call, and glibc asks the system for all that is large. At the
paper's sizes an update of 10 x 50 frames then touches 4 GB of new pages: a million page faults, a quarter of its time.
"""

import ctypes
import importlib.util
import os
import platform
from importlib import metadata

import jax

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of mallopt, from malloc.h
_HUGE_PAGES = 14  # MADV_HUGEPAGE


def keep() -> None:
    """Makes one growing heap serve all of the process, where JAX will compute on a CPU and the C library is glibc.

    To be called before JAX looks for devices: threads keep the heap that they began with. The process then holds the
    most memory that it ever needed. Elsewhere nothing happens.
    """
    if platform.libc_ver()[0] != "glibc" or not _computes_on_cpu():
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
        libc.mallopt(option, value)
    # The heap grows by half the machine's memory, untouched and so for free, and shrinks no more: huge pages from here.
    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_PHYS_PAGES") // 2 * page
    address = libc.malloc(size)
    if address:
        libc.madvise(-(-address // page) * page, size - page, _HUGE_PAGES)
        libc.free(address)


def _computes_on_cpu() -> bool:
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    plugins = [name for name in ("jax_plugins", "libtpu") if importlib.util.find_spec(name)]
    return not plugins and not metadata.entry_points(group="jax_plugins")
