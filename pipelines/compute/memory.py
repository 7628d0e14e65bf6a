"""Memory: what the C library does with what is freed."""

import ctypes
import os
import sys

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# By these a user decides it.
VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for what is allocated next, instead of giving it back to the kernel.

    Batches of images free and fetch hundreds of MB each, and fetched pages are cleared first: a third of the time that
    encoding takes at 256 pixels. Memory stays at its peak, which fragments raise, until the process ends. Forked
    processes inherit it.

    Returns:
        Whether it was done; not with other C libraries, nor where the environment has settings of its own.
    """
    if sys.platform != "linux" or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    libc = ctypes.CDLL(None)
    if any(name in os.environ for name in VARIABLES) or not hasattr(libc, "gnu_get_libc_version"):
        return False
    # Large blocks too come from the heap, and the end of the heap is never given back.
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))
