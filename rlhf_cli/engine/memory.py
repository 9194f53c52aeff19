"""What the C library does with memory that a tensor gave back, and what to say when there is no more."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from rlhf_cli.errors import ConfigError

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8  # of glibc's mallopt
MADV_HUGEPAGE = 14
NO_MORE = "DefaultCPUAllocator: "  # torch raises a plain RuntimeError for the memory of a CPU


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks instead of returning them, and keep them in huge pages.

    Every large tensor would otherwise be new pages, which the kernel clears one by one: a tenth of an update's time on a CPU. Weights in
    pages of 4 KiB are read at half the speed of those in huge ones: a tenth of a rollout's.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # absent from other C libraries
        return
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)
    libc.mallopt(TOP_PAD, 1 << 26)
    libc.mallopt(ARENA_MAX, 1)  # threads too: transformers loads weights in some
    _reserve_huge(libc)


def _reserve_huge(libc: ctypes.CDLL) -> None:
    """Grow the heap to the machine's memory, none of which is in use until it is written, and ask for huge pages in all of it.

    Pages that the heap grew by later would be small ones. Not where addresses are limited or promises are kept: others would miss them.
    """
    import resource  # not on every system

    limited = any(
        resource.getrlimit(r)[0] != resource.RLIM_INFINITY for r in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    )
    promise = Path("/proc/sys/vm/overcommit_memory")
    if limited or (promise.exists() and promise.read_text().strip() == "2"):
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4)
    if not block:
        return
    libc.free(block)
    heap = next(
        (line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]")), None
    )
    if heap is not None:
        begin, end = (int(x, 16) for x in heap.split("-"))
        libc.madvise(begin, end - begin, MADV_HUGEPAGE)


def out_of_memory(e: BaseException) -> ConfigError | None:
    """What to type when the memory of a device or of the machine did not suffice; None for another error."""
    if isinstance(e, torch.OutOfMemoryError | MemoryError) or (isinstance(e, RuntimeError) and NO_MORE in str(e)):
        return ConfigError(
            "out of memory; halve hardware.micro_batch_tokens, set rollout.rows=16, or type model.checkpointing=true"
        )
    return None
