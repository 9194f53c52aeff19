"""A hang becomes an exit that names the rank, the phase and the line: nobody waits for a silent process."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from rlhf_cli import pulse
from rlhf_cli.exits import STOPPED
from rlhf_cli.record.files import write_json_atomic
from rlhf_cli.record.rundir import RunDir, born, now

WRITE_EVERY = 10.0  # seconds between files while the phase stays; a change of phase is written within POLL
POLL = 1.0
DUMP_TIME = 0.5  # seconds that a process gets to write its stacks
STACKS = signal.SIGQUIT  # writes the stacks, then ends the process: clusters warn of a time limit by SIGUSR1 or 2


class Heartbeat:
    """Watches one rank from a daemon thread: silence longer than `timeout` dumps every rank's Python stacks, then exits with 75.

    The silent rank writes logs/silent; the threads of the others see it, dump their own stacks and exit too. A rank whose interpreter lock is
    stuck dumps on SIGQUIT, which another rank of its machine sends, or its keeper; where neither is, a C-level timer ends it at twice the
    limit (exit 1). Silence is no `beat` and no `pulse`, so a phase may take longer than the limit while it gets on.

    Args:
        path: the run's folder; logs/heartbeat-rank-N.json and logs/rank-N.stacks go below it.
        rank: this process.
        timeout: seconds of silence allowed; 0 turns the watch off.
        on_silence: called with the reason before the exit, for at most 5 s.
        ranks: processes of the run.
    """

    def __init__(
        self,
        path: Path,
        rank: int,
        timeout: float,
        on_silence: Callable[[str], None] | None = None,
        *,
        ranks: int = 1,
    ) -> None:
        self.enabled = timeout > 0
        self.rank, self.ranks = rank, ranks
        self.timeout = timeout
        self.on_silence = on_silence
        self.file = beat_file(path / "logs", rank)
        self.stacks = RunDir(path).stacks(rank)
        self.silent = RunDir(path).silent
        self._alive, self._phase = time.monotonic(), "start"
        self._stop = threading.Event()
        self._ending = threading.Event()
        self._written = (0.0, "")
        self._thread: threading.Thread | None = None

    def start(self) -> Heartbeat:
        """Begin to watch."""
        if self.enabled and self._thread is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                self.silent.unlink(missing_ok=True)  # of an earlier try
            stacks = self.stacks.open("w", encoding="utf-8")
            faulthandler.register(STACKS, file=stacks, all_threads=True, chain=True)
            self.beat("start")
            pulse.listen(self.beat)
            self._thread = threading.Thread(target=self._watch, args=(stacks,), name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def beat(self, phase: str | None = None) -> None:
        """Say that this rank is alive, in `phase` (None: the one it was in). Costs under a microsecond."""
        if phase is not None:
            self._phase = phase
        self._alive = time.monotonic()

    def give_way(self) -> None:
        """Before an error is told: where the watch ends this process for silence, the error follows from that, and nothing more is told."""
        if self._ending.is_set():
            time.sleep(60)  # the watch exits before

    def stop(self) -> None:
        """End the watch."""
        self._stop.set()
        pulse.listen(None)
        if self._thread is not None:
            self._thread.join(timeout=2 * POLL)
            self._thread = None

    def _watch(self, stacks: TextIO) -> None:
        interval = min(POLL, self.timeout / 4)
        polled = time.monotonic()
        while not self._stop.wait(interval):
            faulthandler.dump_traceback_later(2 * self.timeout + 10, exit=True, file=stacks)
            last = polled
            polled = time.monotonic()
            if polled - last > 5 + 5 * interval:  # the whole process was suspended: that is not silence
                self.beat()
            beat, phase = self._alive, self._phase
            if polled - beat > self.timeout:
                self._give_up(f"rank {self.rank} silent for {polled - beat:.0f} s in phase {phase}", stacks)
            if self.ranks > 1 and self.silent.exists():
                self._follow(polled - beat, phase, stacks)
            self._write(polled, beat, phase)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(STACKS)
        stacks.close()
        if self.stacks.stat().st_size == 0:
            self.stacks.unlink()

    def _write(self, polled: float, beat: float, phase: str) -> None:
        at, before = self._written
        if phase == before and polled - at < WRITE_EVERY:
            return
        self._written = (polled, phase)
        who = {"rank": self.rank, "pid": os.getpid(), "born": born(os.getpid()), "host": socket.gethostname()}
        try:
            write_json_atomic(self.file, who | {"phase": phase, "silent_s": round(polled - beat, 1), "time": now()})
        except OSError:  # a full or absent disk must not stop the watch
            return

    def _give_up(self, reason: str, stacks: TextIO) -> None:
        self._ending.set()
        self._dump(reason, stacks)
        with suppress(OSError):
            self.silent.write_text(reason, encoding="utf-8")
        self._tell(reason)
        self._dump(reason, sys.__stderr__)
        self._end()

    def _follow(self, silent: float, phase: str, stacks: TextIO) -> None:
        """Another rank is silent: dump this one's stacks too, and end with it."""
        self._ending.set()
        self._dump(f"rank {self.rank} in phase {phase} for {silent:.0f} s", stacks)
        with suppress(OSError):
            self._tell(self.silent.read_text(encoding="utf-8"))
        self._end()

    def _tell(self, reason: str) -> None:
        if self.on_silence is not None:
            told = threading.Thread(target=self.on_silence, args=(reason,), daemon=True)
            told.start()
            told.join(timeout=5)

    def _end(self) -> None:
        """Leave, when every rank of this machine has written its stacks; the first exit ends the others."""
        if self.ranks > 1:
            time.sleep(3 * POLL)  # they must have seen the file before
            with suppress(Exception):  # the exit matters more
                wake(self.file.parent, self.rank, self.ranks)
        os._exit(STOPPED)

    def _dump(self, reason: str, out: TextIO | None) -> None:
        try:
            print(f"{reason} (hardware.timeout={self.timeout:g}); stacks of all threads:", file=out, flush=True)
            faulthandler.dump_traceback(file=out, all_threads=True)  # type: ignore[arg-type]
        except (OSError, ValueError, AttributeError):  # no file behind the stream; the exit matters more
            return


def wake(logs: Path, rank: int, ranks: int) -> list[int]:
    """Have the ranks of this machine that wrote no stacks write them and end; of those that did the first sends (Linux only).

    Returns the ranks that were told.
    """
    seen = [json.loads(p.read_text(encoding="utf-8")) for i in range(ranks) if (p := beat_file(logs, i)).exists()]
    here = [b for b in seen if b["host"] == socket.gethostname() and b.get("born") == born(b["pid"]) >= 0]
    stacks = {b["rank"]: logs / f"rank-{b['rank']}.stacks" for b in here}
    wrote = [r for r, path in stacks.items() if path.exists() and path.stat().st_size > 0]
    if rank != min(wrote, default=rank):
        return []
    mute = {b["pid"]: b for b in here if b["rank"] not in (*wrote, rank)}
    for number in (
        STACKS,
        signal.SIGKILL,
    ):  # what a script starts with `&` is deaf to SIGQUIT: it writes its stacks, and goes on
        for pid in [pid for pid, b in mute.items() if born(pid) == b["born"]]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(DUMP_TIME if mute else 0)
    return [b["rank"] for b in mute.values()]


def beat_file(logs: Path, rank: int) -> Path:
    """Where a rank says that it lives."""
    return logs / f"heartbeat-rank-{rank}.json"
