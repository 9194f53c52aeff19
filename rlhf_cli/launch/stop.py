"""Signals that end a process calmly, and processes that end with their parent. Imports nothing heavy: it is in force before torch loads."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rlhf_cli.launch.child import die_with

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


def to_hear() -> tuple[signal.Signals, ...]:
    """Those of the signals that a process listens to: under nohup it goes on when its terminal is closed."""
    return tuple(s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN)


class Stop:
    """Remembers that a signal asked this process to stop at the next step boundary; a second Ctrl-C interrupts at once.

    `told` is called once, from the signal handler, with the signal's name.
    """

    def __init__(self) -> None:
        self.signal = ""
        self.told: Callable[[str], None] = lambda name: None
        for s in to_hear():
            signal.signal(s, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal = signal.Signals(number).name
            self.told(self.signal)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however that happens (Linux only)."""
    die_with(os.getppid(), signal.SIGKILL)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let signals wait until the end of the block, for this process and for what it starts inside; then they act as they would have.

    Children inherit the mask, so that a terminal's Ctrl-C does not end them either. Handlers are put off as well, because what the
    main thread blocks may reach another thread.
    """
    came: list[int] = []
    handlers = {s: signal.signal(s, lambda number, frame: came.append(number)) for s in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # those that were blocked are noted now
        for s, handler in handlers.items():
            signal.signal(s, signal.SIG_DFL if handler is None else handler)
        for s in dict.fromkeys(came):
            signal.raise_signal(s)
