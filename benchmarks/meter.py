"""Seconds and peak memory per phase of a step, inside the process that is measured."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """A stopwatch with one running phase; an inner phase stops the outer one.

    Memory is the process's resident set on a CPU and the allocator's on a GPU, in GB (1e9 bytes), its highest value
    while the phase ran.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.begin()

    def begin(self, phase: str = "other") -> None:
        """Forget everything; what follows belongs to `phase` where no other is named."""
        self._sync()
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, float] = {}
        self._phase = phase
        self._reset_peak()
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer = self._phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def end(self) -> dict[str, Any]:
        """What was measured since `begin`."""
        self._switch(self._phase)
        return {
            "seconds": dict(self.seconds),
            "peak_gb": dict(self.peak),
            "step_seconds": sum(self.seconds.values()),
            "step_peak_gb": max(self.peak.values()),
        }

    def _switch(self, name: str) -> None:
        self._sync()
        now = time.perf_counter()
        was = self._phase
        self.seconds[was] = self.seconds.get(was, 0.0) + now - self._since
        self.peak[was] = max(self.peak.get(was, 0.0), self._read_peak())
        self._reset_peak()
        self._phase, self._since = name, time.perf_counter()

    def _sync(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def _reset_peak(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif CLEAR.exists():
            CLEAR.write_text("5")  # the high-water mark starts again from the present size; see proc(5)

    def _read_peak(self) -> float:
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated() / 1e9
        if STATUS.exists():
            line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
            return int(line.split()[1]) * 1024 / 1e9
        # Elsewhere only the peak of the whole life is known: bytes on macOS, KiB on other systems.
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size / 1e9 if sys.platform == "darwin" else size * 1024 / 1e9
