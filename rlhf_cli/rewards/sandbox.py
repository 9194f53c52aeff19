"""Code of a policy in child processes that can compute and nothing else; killed as a group when their time is up.

What holds them is the kernel: an allow-list of system calls (seccomp, Linux on x86_64 and aarch64) without sockets, without new
processes, without files opened for writing, without signals to others; resource limits; no capabilities; where there is Landlock, a
domain of their own, so that no other process's memory and no file but those of Python can be read; an empty environment, an empty
folder, and a session of their own. On other systems the reward refuses to start.
"""

from __future__ import annotations

import contextlib
import os
import secrets
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

LONGEST = 200_000  # characters of code, which always fit into a message; a longer one fails
STARTING = 60.0  # seconds in which a child must have locked itself, which says nothing about the code
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
class Clock:
    """The seconds that a response has left; they pass while its code runs, not while a child starts."""

    left: float

    @contextlib.contextmanager
    def running(self) -> Iterator[float]:
        """Its end, a moment of the monotonic clock."""
        start = time.monotonic()
        try:
            yield start + self.left
        finally:
            self.left -= time.monotonic() - start


class NotStarted(RuntimeError):
    """A child ended, or was too slow, before it got any code."""


@dataclass
class Child:
    """A process and our ends of its pipes: into it, out of it."""

    process: subprocess.Popen[bytes]
    ours: list[int]

    def tell(self, message: Any) -> None:
        """Send; a child that is gone is noticed when it does not answer. Raises TooLong."""
        with contextlib.suppress(BrokenPipeError):
            sandboxed.send(self.ours[0], message)

    def hear(self, until: float) -> dict[str, Any] | None:
        """The next message, or None where the child is gone, sends what none of ours is, or its time is up."""
        try:
            message = sandboxed.receive(self.ours[1], until=until)
        except (EOFError, ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) else None

    def begin(self, first: dict[str, Any]) -> None:
        """Have it lock itself. Raises NotStarted, and ConfigError where the machine cannot hold it."""
        self.tell(first)
        answer = self.hear(time.monotonic() + STARTING)
        if answer is None:
            raise NotStarted(f"the sandbox did not start within {STARTING:g} s, or was killed")
        if "unsafe" in answer:
            raise ConfigError(
                f"reward.code_tests: this machine cannot hold untrusted code: {answer['unsafe']}; use Linux on x86_64 or aarch64"
            )


def passed(code: str, tests: Sequence[str], setup: str, entry: str, box: Box, clock: Clock) -> list[bool | None]:
    """Which tests end without an exception; those after the one in which time runs out, or the code dies, do not.

    `entry`: the only function that tests can call; empty for any. None: the test gives a function more than a message holds.
    Raises TooLong where tests and setup are more than that, and NotStarted.
    """
    found: list[bool | None] = [False] * len(tests)
    if len(code) > LONGEST:
        return found
    token = secrets.token_hex(16)
    with _children() as start:
        calls, answers = os.pipe(), os.pipe()  # from the grader to the code, and back
        sandboxed.send(calls[1], box.first())  # the pipe belongs to the grader alone then
        start("call", give=[calls[0], answers[1]], talks=False)
        grader = start("grade", give=[answers[0], calls[1]], talks=True)
        grader.begin(box.first(tests=list(tests), setup=setup, entry=entry, token=token))
        grader.tell({"code": code})
        with clock.running() as until:
            while (
                (message := grader.hear(until)) is not None and message.get("token") == token and "end" not in message
            ):
                found[message["test"]] = message["passed"]
    return found


def printed(code: str, text: str, box: Box, clock: Clock) -> str | None:
    """What a program prints for an input; None where it fails or its time is up. Raises TooLong for the input, and NotStarted."""
    if len(code) > LONGEST or clock.left <= 0:
        return None
    with _children() as start:
        child = start("script", give=[], talks=True)
        child.begin(box.first())
        child.tell({"code": code})
        child.tell({"input": text})
        with clock.running() as until:
            said = (child.hear(until) or {}).get("printed")
    return said if isinstance(said, str) else None


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
