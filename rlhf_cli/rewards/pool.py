"""Worker processes that score responses while others are still drawn, and that a time-out can kill."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from torch import Tensor

from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.pulse import alive
from rlhf_cli.rewards.per_sample import Row, groups_of, scored
from rlhf_cli.rewards.worker import END, attempt
from rlhf_cli.types import Sample, Scores

START_LIMIT = 300.0  # seconds to import and build the rewards
AT_ONCE = 32  # responses sent together where a scorer looks at one at a time
TRIES = 2  # a worker may die of what another process did, so its sample gets another chance
Maker = tuple[str, dict[str, Any]]  # the dotted name of a scorer's class, its settings
Timed = tuple[float, Row]  # seconds, score


@dataclass
class Job:
    """Samples for one scorer; `whole`: they are one group, whose scores come together."""

    name: str
    samples: Sequence[Sample]
    whole: bool
    result: Future[list[Timed]] = field(default_factory=Future)


class Workers:
    """Processes that share the scoring of every pooled reward. They start at `start` or the first job, and die with this process.

    Args:
        processes: how many; 0 scores in place, without time-outs.
        timeout: seconds for one sample, after which its worker is killed and replaced.
    """

    def __init__(self, processes: int, timeout: float) -> None:
        self.processes, self.timeout = processes, timeout
        self._makers: dict[str, Maker] = {}
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._started = False

    def add(self, name: str, maker: Maker) -> None:
        """Say how a scorer is built, before the processes start."""
        assert not self._started, "workers learn what to build when they start"
        self._makers[name] = maker

    def start(self) -> None:
        """Start the processes without waiting for them."""
        if self._started:
            return
        self._started = True
        for n in range(self.processes):
            # One thread per worker for its whole life: Linux ends a worker with the thread that started it.
            worker = Worker(self._makers, self.timeout)
            threading.Thread(target=_keep, args=(worker, self._jobs), name=f"reward-{n}", daemon=True).start()
        weakref.finalize(self, _end, self._jobs, self.processes)

    def submit(self, job: Job) -> None:
        """Queue a job; its result is a future."""
        self.start()
        self._jobs.put(job)


def _end(jobs: queue.SimpleQueue[Job | None], processes: int) -> None:
    for _ in range(processes):
        jobs.put(None)


def _keep(worker: Worker, jobs: queue.SimpleQueue[Job | None]) -> None:
    """Feed one worker until a None."""
    worker.prepare()
    while (job := jobs.get()) is not None:
        try:
            job.result.set_result(list(worker.score(job)))
        except BaseException as e:  # whatever it is, it belongs to the one who waits
            worker.kill()
            job.result.set_exception(e)
    worker.kill()


class Worker:
    """One worker process, replaced when it hangs or dies."""

    def __init__(self, makers: Mapping[str, Maker], timeout: float) -> None:
        self.makers, self.timeout = dict(makers), timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._conn: Connection | None = None

    def prepare(self) -> None:
        """Start ahead of the first job. What goes wrong is told by that job."""
        try:
            self._ready()
        except (GateError, OSError):
            self.kill()

    def score(self, job: Job) -> Iterator[Timed]:
        """(seconds, row) for each sample of the job. The one that the worker hangs on or dies of is missing."""
        done = tries = 0
        while done < len(job.samples):
            lost = ""
            try:
                conn = self._ready()
                conn.send((job.name, job.samples[done:]))
                for _ in range(len(job.samples) - done):
                    limit = self.timeout * (len(job.samples) if job.whole else 1)
                    if not conn.poll(limit):
                        lost = f"it took over {limit:g} s (reward_workers.timeout={self.timeout:g})"
                        break
                    yield self._received(conn)
                    done, tries = done + 1, 0
                else:
                    if not conn.poll(self.timeout):
                        self.kill()  # it hangs after its last row, which is no row's fault
                    elif self._received(conn) != END:
                        raise GateError(f"reward {job.name!r} gave more values than the {done} samples that it got")
            except (EOFError, OSError):
                tries += 1
                code = self._code()
                lost = f"its worker process ended by itself, {code}" if tries == TRIES else ""
            if done < len(job.samples):
                self.kill()
            if lost:
                tries = 0
                failed = len(job.samples) - done if job.whole else 1
                done += failed
                yield from [(0.0, Row(None, reason=lost))] * failed

    def kill(self) -> None:
        """End the process and whatever it started."""
        process, conn, self._process, self._conn = self._process, self._conn, None, None
        if conn is not None:
            conn.close()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _ready(self) -> Connection:
        """The connection to a worker that waits for a job."""
        if self._conn is not None:
            return self._conn
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "rlhf_cli.rewards.worker", str(theirs.fileno()), str(os.getpid())]
        self._conn = Connection(ours.detach())
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=_environment(),
            )
        self._conn.send((sys.path, self.makers))
        if not self._conn.poll(START_LIMIT):
            raise GateError(f"a reward worker did not start within {START_LIMIT:g} s; look at what the reward imports")
        try:
            self._received(self._conn)
        except EOFError:
            raise GateError(f"a reward worker ended while it started, {self._code()}") from None
        return self._conn

    def _received(self, conn: Connection) -> Any:
        message = conn.recv()
        alive()
        if isinstance(message, ConfigError | GateError):
            raise message
        return message

    def _code(self) -> str:
        try:
            code = self._process.wait(5) if self._process is not None else None
        except subprocess.TimeoutExpired:
            code = None
        if code is None:
            return "or closed its connection"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _environment() -> dict[str, str]:
    """One thread each; our package is found wherever this process found it."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}


class Pooled:
    """A scorer that gives rows one by one, run by workers; what comes out is the same for any number of them.

    `begin` takes a group as soon as its responses exist; the call that scores the step finds it done or under way.
    """

    def __init__(self, name: str, scorer: Any, maker: Maker, workers: Workers) -> None:
        self.name, self.scorer, self.workers = name, scorer, workers
        self.needs_references = getattr(scorer, "needs_references", False)
        self.whole = getattr(scorer, "whole_groups", False)
        self.columns = getattr(scorer, "columns", "")  # that it brings beside its value
        self.seconds = 0.0  # that the samples of the last call took, over all workers
        self._early: dict[tuple[tuple[str, str], ...], Job] = {}
        workers.add(name, maker)

    def begin(self, samples: Sequence[Sample]) -> None:
        """Start to score one whole group; nothing to do for one without workers."""
        if self.workers.processes:
            self._early[_key(samples)] = self._job(list(samples))

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return self.submit(samples, group)()

    def submit(self, samples: Sequence[Sample], group: Tensor) -> Callable[[], Scores]:
        """Hand out what `begin` has not yet; the returned function waits for all of it."""
        jobs: list[tuple[list[int], Job]] = []
        rest: list[list[int]] = []
        for members in groups_of(group.tolist()):
            seen = [samples[i] for i in members]
            early = self._early.get(_key(seen))
            if early is not None and early.samples == seen:
                jobs.append((members, early))
            else:
                rest.append(members)
        if not self.whole:
            loose = [i for members in rest for i in members]
            rest = [loose[i : i + AT_ONCE] for i in range(0, len(loose), AT_ONCE)]
        jobs += [(members, self._job([samples[i] for i in members])) for members in rest]
        self._early = {}
        return lambda: self._collect(len(samples), jobs)

    def _collect(self, n: int, jobs: Sequence[tuple[list[int], Job]]) -> Scores:
        found: dict[int, Timed] = {}
        for members, job in jobs:
            found |= zip(members, job.result.result(), strict=True)
        self.seconds = sum(seconds for seconds, _ in found.values())
        return scored(found[i][1] for i in range(n))

    def _job(self, samples: Sequence[Sample]) -> Job:
        job = Job(self.name, samples, self.whole)
        if self.workers.processes:
            self.workers.submit(job)
        else:
            job.result.set_result(_in_place(self.scorer, samples))
        return job


def _in_place(scorer: Any, samples: Sequence[Sample]) -> list[Timed]:
    start = time.perf_counter()
    rows = list(attempt(scorer, samples))
    each = (time.perf_counter() - start) / max(1, len(rows))
    return [(each, row) for row in rows]


def _key(samples: Sequence[Sample]) -> tuple[tuple[str, str], ...]:
    return tuple((s.uid, s.response) for s in samples)
