"""Two ends of a pipe: the script asks, a measuring process answers, one JSON object per line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Answers:
    """The end of the measuring process. Libraries print; their output goes to stderr, so that stdout carries answers only."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def wait(self) -> str:
        """The next request; `quit` when the other end is gone."""
        return sys.stdin.readline().strip() or "quit"

    def send(self, answer: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(answer) + "\n")


class Child:
    """The end of the script: a measuring process of its own, so that its memory is its own."""

    def __init__(self, script: str, argument: str, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.name, self.log = script, log
        self._log = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def ask(self, request: str = "") -> dict[str, Any]:
        """Send a request, if any, and wait for one answer."""
        assert self._process.stdin and self._process.stdout
        if request:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            tail = "\n".join(self.log.read_text(encoding="utf-8").splitlines()[-15:])
            raise RuntimeError(f"{self.name} ended with status {code}:\n{tail}")
        return json.loads(line)

    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def quit(self) -> None:
        """Ask it to end, and make sure of it."""
        try:
            self._process.communicate("quit\n", timeout=30)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.quit()


def measured(script: str, argument: str, log: Path, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The one answer of a process that needs no requests."""
    with Child(script, argument, log, environment) as child:
        return child.ask()
