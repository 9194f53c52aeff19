"""The few collectives of the effect ring, the same for one process and many."""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_cli.hardware import free_port


class Comm:
    """This process among all; every method is a no-op for one process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1

    def sum(self, x: Tensor) -> Tensor:
        """Sum of `x` over ranks. Adding zeros is exact, so it also gathers tensors that ranks fill in turn."""
        if self.world == 1:
            return x
        moved = x.to(self.device)
        dist.all_reduce(moved)
        return moved.to(x.device)

    def gather(self, x: Any) -> list[Any]:
        """Every rank's `x`, in rank order, on every rank."""
        if self.world == 1:
            return [x]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, x)
        return out

    def broadcast(self, x: Any) -> Any:
        """Rank 0's `x` on every rank."""
        if self.world == 1:
            return x
        box = [x]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether any rank says True."""
        return any(self.gather(flag))

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def _quiet_compilers() -> Iterator[None]:
    """DeepSpeed's import tries to link optional libraries, and the linker's complaints would look like errors of the run."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def seed_all(seed: int) -> None:
    """Seed every global generator: a user's reward may draw from any of them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def start(device: torch.device, timeout: float = 1800) -> Comm:
    """Join the process group that the launcher's environment describes; a lone process makes its own.

    A collective waits a minute longer than the `timeout` seconds of the heartbeat, which says more than a collective that gave up.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    with _quiet_compilers():
        import deepspeed

        # It asks once what can be compiled, and keeps a copy of stderr's descriptor, which must not be that of the run's log.
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            compatible = deepspeed.ops.__compatible_ops__
    # DeepSpeed's own calls, which no user can change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Its shared-memory all-reduce for CPUs is compiled at first use, which takes half a minute and a C++ compiler; gloo needs neither.
    compatible["deepspeed_shm_comm"] = False
    lone = not {"RANK", "MASTER_PORT"} <= os.environ.keys()
    if lone:
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout + 60), verbose=False)
    if lone:
        os.environ.pop("MASTER_PORT")  # taken: a child that inherited it could not be a lone process of its own
    return Comm(device)
