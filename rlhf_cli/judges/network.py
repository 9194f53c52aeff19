"""Requests from one background thread: bounded in number, each with its time limit, tried again where that may help.

One asyncio loop per process. Callers stay synchronous: they hand in coroutines and wait for futures, or do other work.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from rlhf_cli.pulse import alive

T = TypeVar("T")
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before a second attempt, doubled for each further one
LONGEST_ASKED = 120.0  # seconds that an endpoint may ask us to wait


class Again(Exception):
    """An attempt failed in a way that may pass. `after`: seconds that the endpoint asks to wait."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


class Refused(Exception):
    """The endpoint understood, and will not answer."""


@dataclass(frozen=True)
class Limits:
    """Of the requests to one endpoint."""

    concurrency: int  # requests at a time
    timeout: float  # seconds per attempt
    retries: int  # further attempts
    named: str = "judge.timeout"  # the setting of the time limit, for messages


class Network:
    """The thread, and the semaphore that every request passes.

    Args:
        limits: of its requests.
        pause: waits so many seconds; tests pass another.
    """

    def __init__(self, limits: Limits, pause: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self.limits, self._pause = limits, pause
        self._jitter = random.Random()  # its own: the global generator belongs to the run
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slots: asyncio.Semaphore | None = None

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the thread."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._slots = asyncio.Semaphore(self.limits.concurrency)
                threading.Thread(target=self._loop.run_forever, name="judge", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def attempt(self, call: Callable[[], Awaitable[T]]) -> tuple[T, int, float]:
        """(result, retries, seconds) of a call. Raises Refused, or Again after the last attempt."""
        assert self._slots is not None
        began = time.perf_counter()
        for n in range(self.limits.retries + 1):
            try:
                async with self._slots:
                    found = await asyncio.wait_for(call(), self.limits.timeout)
                alive()
                return found, n, time.perf_counter() - began
            except TimeoutError:
                failed = Again(f"no answer within {self.limits.timeout:g} s ({self.limits.named})")
            except Again as e:
                failed = e
            if n < self.limits.retries:
                await self._pause(self.wait(n, failed.after))
        alive()  # no answer is one too
        tries = self.limits.retries + 1
        raise Again(f"{failed}; tried {tries} times" if tries > 1 else str(failed))

    def wait(self, n: int, asked: float | None) -> float:
        """Seconds before the attempt after number n: what the endpoint asks for, or exponential backoff with jitter."""
        own = min(LONGEST_PAUSE, FIRST_PAUSE * 2**n) * self._jitter.uniform(0.5, 1.0)
        return own if asked is None else min(LONGEST_ASKED, max(asked, 0.0)) + 0.1 * own


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
