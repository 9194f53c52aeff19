"""Processes side by side, each with its share of the machine, stopped together and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ConfigError
from rlhf_cli.hardware import visible_gpus
from rlhf_cli.launch.child import bound
from rlhf_cli.launch.stop import to_hear

TICK = 0.1  # seconds between looks at the processes


@dataclass(frozen=True)
class Share:
    """What one of several processes may use; empty: everything."""

    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] | None = None

    def environment(self) -> dict[str, str]:
        """This process's environment, with the share's GPUs."""
        return {**os.environ, **({} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)})}


def shares(parallel: int, device: str, processes: int) -> list[Share]:
    """Disjoint shares of this machine for `parallel` points of `processes` ranks each."""
    if parallel < 1:
        raise ConfigError(f"sweep.parallel={parallel}: wanted 1 or more")
    if parallel == 1:
        return [Share()]
    cores, gpus = sorted(os.sched_getaffinity(0)), visible_gpus()
    if device == "cuda":
        each = len(gpus) // parallel
        if each < max(1, processes):
            fit = len(gpus) // max(1, processes)
            raise ConfigError(
                f"sweep.parallel={parallel}: {len(gpus)} GPUs are visible and a point takes {max(1, processes)}; at most {fit}"
            )
        return [Share(_cut(cores, parallel, i), tuple(gpus[i * each : (i + 1) * each])) for i in range(parallel)]
    return [Share(_cut(cores, parallel, i)) for i in range(parallel)]


def _cut(cores: Sequence[int], parts: int, i: int) -> tuple[int, ...]:
    """The i-th of `parts` even runs of cores; with fewer cores than parts, some cores serve twice."""
    start, stop = i * len(cores) // parts, (i + 1) * len(cores) // parts
    return tuple(cores[start : max(stop, start + 1)])


def spawn(argv: Sequence[str], log: Path, share: Share) -> subprocess.Popen[bytes]:
    """Start a process that keeps to its share, writes to `log`, and is asked to stop when this one dies.

    Its own session keeps the terminal's Ctrl-C away from it: this process passes the wish on, once.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as f:
        return subprocess.Popen(
            bound(argv, signal.SIGTERM, share.cores), stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT,
            env=share.environment(), start_new_session=True,
        )  # fmt: skip


@dataclass
class Running:
    """A process at work on a point."""

    name: str
    process: subprocess.Popen[bytes]
    before: Mapping[str, Any]  # the status of its run when it was started
    began: float = field(default_factory=time.monotonic)
    pruned: int = 0  # the step at which a search stopped it

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def stop(self) -> None:
        """Ask it to write a checkpoint and end."""
        self.process.terminate()

    def kill(self) -> None:
        """End it and everything that it started."""
        import psutil

        family = []
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for child in family:
            with suppress(psutil.NoSuchProcess):
                child.kill()


class Wish:
    """Counts the signals that ask to stop: at the first the points write checkpoints, at the second they are killed."""

    def __init__(self) -> None:
        self.count = 0
        self.signal = ""

    def __call__(self, number: int, frame: Any) -> None:
        self.count += 1
        self.signal = signal.Signals(number).name

    @contextmanager
    def heard(self) -> Iterator[Wish]:
        """Listen to signals inside, and to nothing afterwards that was not listened to before."""
        before = {s: signal.signal(s, self) for s in to_hear()}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def work(
    begin: Callable[[Share], Running | None],
    end: Callable[[Running, int], None],
    look: Callable[[Mapping[int, Running]], None],
    slots: Sequence[Share],
    wish: Wish,
) -> None:
    """Keep every slot busy until `begin` has nothing left or a stop was asked; `look` sees the running ones at every tick."""
    running: dict[int, Running] = {}
    told = 0
    while True:
        for i, share in enumerate(slots):
            if i not in running and not wish.count and (made := begin(share)) is not None:
                running[i] = made
        if not running:
            return
        time.sleep(TICK)
        if told < min(
            wish.count, 2
        ):  # one at a time: two signals of one moment must not kill before anything was asked to save
            told += 1
            for r in running.values():
                r.stop() if told == 1 else r.kill()
        look(running)
        for i, r in list(running.items()):
            code = r.process.poll()
            if code is not None:
                del running[i]
                end(r, code)
