"""Where a rank's output goes: everything into its log, and of rank 0 what Python prints also to the terminal."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


class Both(io.TextIOBase):
    """Text for the log and, line by line, for `show`: the terminal, or the display that owns it."""

    def __init__(self, log: TextIO, terminal: TextIO) -> None:
        self.log, self.terminal = log, terminal
        self.show: Callable[[str], None] = lambda line: print(line, file=terminal, flush=True)
        self._begun = ""

    def write(self, text: str) -> int:
        """A full disk or a closed terminal must not stop a run that only wants to say something."""
        with suppress(OSError):
            self.log.write(text)
        *lines, self._begun = (self._begun + text).split("\n")
        with suppress(OSError):
            for line in lines:
                self.show(line)
        return len(text)

    def flush(self) -> None:
        """Show a line that is not ended: a question waits for its answer."""
        begun, self._begun = self._begun, ""
        with suppress(OSError):
            self.log.flush()
            self.terminal.write(begun)
            self.terminal.flush()

    def fileno(self) -> int:
        """Of the log: what other programs write is no part of the display."""
        return self.log.fileno()

    def isatty(self) -> bool:
        return self.terminal.isatty()

    @property
    def encoding(self) -> str:
        return self.terminal.encoding


@contextmanager
def logged(path: Path, *, shown: bool) -> Iterator[Both | None]:
    """Send the output of this process to the file `path`, below Python too; with `shown`, what Python prints goes to the terminal as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = sys.stdout, sys.stderr
    for stream in before:
        stream.flush()
    kept = os.dup(1), os.dup(2)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    terminal = os.fdopen(os.dup(1), "w", buffering=1, encoding=encoding, errors="backslashreplace")
    log = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    both = Both(log, terminal) if shown else None
    sys.stdout, sys.stderr = both or log, log  # type: ignore[assignment]
    try:
        yield both
    finally:
        sys.stdout, sys.stderr = before
        for saved, number in zip(kept, (1, 2), strict=True):
            os.dup2(saved, number)
            os.close(saved)
        for stream in (log, terminal):
            with suppress(OSError):
                stream.close()
