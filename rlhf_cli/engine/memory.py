"""What the C library does with memory that a tensor gave back."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # of glibc's mallopt
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks instead of returning them.

    Every large tensor would otherwise be new pages, which the kernel clears one by one: a tenth of an update's time on a CPU.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from other C libraries
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, LARGEST)
        mallopt(TOP_PAD, 1 << 26)
