"""What the C library does with memory that a tensor gave back, and what to say when there is no more."""

from __future__ import annotations

import ctypes
import sys

import torch

from rlhf_cli.errors import ConfigError

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # of glibc's mallopt
LARGEST = 2**31 - 1
NO_MORE = "DefaultCPUAllocator: "  # torch raises a plain RuntimeError for the memory of a CPU


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


def out_of_memory(e: BaseException) -> ConfigError | None:
    """What to type when the memory of a device or of the machine did not suffice; None for another error."""
    if isinstance(e, torch.OutOfMemoryError | MemoryError) or (isinstance(e, RuntimeError) and NO_MORE in str(e)):
        return ConfigError(
            "out of memory; halve hardware.micro_batch_tokens, set rollout.rows=16, or type model.checkpointing=true"
        )
    return None
