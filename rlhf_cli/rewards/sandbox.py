"""Code of a policy in child processes that can compute and nothing else; killed as a group when their time is up.

What holds them is the kernel: an allow-list of system calls (seccomp, Linux on x86_64 and aarch64) without sockets, without new
processes, without files opened for writing, without signals to others; resource limits; no capabilities; where there is Landlock, a
domain of their own, so that no other process's memory can be read; an empty environment, an empty folder, and a session of their
own. On other systems the reward refuses to start.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards import sandboxed

LONGEST = 200_000  # characters of code; a longer one fails
SCRIPT = str(Path(sandboxed.__file__).resolve())


@dataclass(frozen=True)
class Box:
    """Limits of the code that judges one response."""

    seconds: float  # wall clock, all tests together
    memory: int  # bytes of address space

    def first(self, **more: Any) -> dict[str, Any]:
        """The first message of a child."""
        return {"memory": self.memory, "seconds": int(self.seconds) + 1, **more}


@dataclass
class Child:
    """A process and our ends of its pipes: into it, out of it."""

    process: subprocess.Popen[bytes]
    ours: list[int]

    def tell(self, message: Any) -> None:
        """Send; a child that is gone is noticed when it does not answer."""
        _tell(self.ours[0], message)

    def hear(self, until: float) -> Any | None:
        """The next message, or None where the child is gone or the time is up."""
        left = until - time.monotonic()
        if left <= 0 or not select.select([self.ours[1]], [], [], left)[0]:
            return None
        try:
            message = sandboxed.receive(self.ours[1])
        except (EOFError, ValueError):
            return None
        if "unsafe" in message:
            raise ConfigError(
                f"reward.code_tests: this machine cannot hold untrusted code: {message['unsafe']}; use Linux on x86_64 or aarch64"
            )
        return message


def passed(code: str, tests: Sequence[str], setup: str, box: Box, until: float) -> list[bool]:
    """Which tests end without an exception, `until` a moment of the monotonic clock.

    Those after the one in which time runs out, or the code dies, do not.
    """
    found = [False] * len(tests)
    if len(code) > LONGEST:
        return found
    token = secrets.token_hex(16)
    with _children() as start:
        calls, answers = os.pipe(), os.pipe()  # from the grader to the code, and back
        start("call", give=[calls[0], answers[1]], talks=False)
        _tell(calls[1], box.first(code=code))  # the same pipe brings the code, then belongs to the grader alone
        grader = start("grade", give=[answers[0], calls[1]], talks=True)
        grader.tell(box.first(tests=list(tests), setup=setup, token=token))
        while (message := grader.hear(until)) is not None and message.get("token") == token and "end" not in message:
            found[message["test"]] = message["passed"] is True
    return found


def printed(code: str, text: str, box: Box, until: float) -> str | None:
    """What a program prints for an input; None where it fails or its time is up."""
    if len(code) > LONGEST or time.monotonic() > until:
        return None
    with _children() as start:
        child = start("script", give=[], talks=True)
        child.tell(box.first(code=code, input=text))
        answer = child.hear(until)
    return answer.get("printed") if answer else None


def _tell(fd: int, message: Any) -> None:
    with contextlib.suppress(BrokenPipeError, ValueError):
        sandboxed.send(fd, message)


@contextlib.contextmanager
def _children() -> Iterator[Any]:
    """A function that starts children, which end with the block, and so do their folder and pipes."""
    made: list[Child] = []
    with tempfile.TemporaryDirectory(prefix="rlhf-code-") as folder:

        def start(role: str, give: list[int], talks: bool) -> Child:
            theirs, own = list(give), []
            if talks:
                (its_in, into), (out, its_out) = os.pipe(), os.pipe()
                theirs, own = [its_in, its_out, *give], [into, out]
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", SCRIPT, role, *map(str, theirs)], pass_fds=theirs, cwd=folder, env={},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            for fd in theirs:
                os.close(fd)
            made.append(Child(process, own))
            return made[-1]

        try:
            yield start
        finally:
            for child in made:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()
                for fd in child.ours:
                    os.close(fd)
