"""The record of a run as the loop sees it: one call per phase and per step, on every rank.

Everything stands on one axis, the number of steps done: the first step's row is 1, an evaluation before it is at 0.
Rows hold only numbers that a repeated run repeats bit for bit, except those under `time/`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from rlhf_cli.record.describe import describe, mean, rows_of
from rlhf_cli.record.heartbeat import Heartbeat
from rlhf_cli.record.metrics import Metrics
from rlhf_cli.record.progress import BETWEEN, Progress
from rlhf_cli.record.redact import redact_text
from rlhf_cli.record.rundir import RunDir, Status, now
from rlhf_cli.record.trackers import Mirror, Tracker

if TYPE_CHECKING:
    from rlhf_cli.types import Experience

RESERVED = (
    "score",
    "select",
    "shaping",
    "credit",
    "component",
    "hack",
    "response",
    "count",
    "advantage",
    "time",
    "eval",
)  # no learner may have these names
STATUS_EVERY = 5.0  # seconds between writes of status.json


def make_recorder(
    rundir: RunDir,
    trackers: Mapping[str, Tracker],
    progress: Progress | None,
    heartbeat: Heartbeat,
    rank: int,
    samples_per_step: int,
) -> Recorder | Quiet:
    """The writing recorder on rank 0, a silent one elsewhere. Starts the heartbeat."""
    heartbeat.start()
    if rank != 0:
        return Quiet(heartbeat)
    assert progress is not None
    return Recorder(rundir, trackers, progress, heartbeat, samples_per_step)


class Quiet:
    """Writes nothing; tells the heartbeat which phase its rank is in."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Beat on entry and exit."""
        self.heartbeat.beat(name)
        yield
        self.heartbeat.beat(f"after {name}")

    def start(self, config: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        """Nothing."""

    def count(self, numbers: Mapping[str, float], stage: str = "select") -> None:
        """Nothing."""

    def step(self, step: int, exp: Experience, stats: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
        """Beat."""
        self.heartbeat.beat("between steps")

    def evaluation(self, step: int, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def finish(self, status: Status, reason: str = "") -> None:
        """End the watch."""
        self.heartbeat.stop()


class Recorder:
    """Writes metrics.jsonl, samples.jsonl, evaluations.jsonl, status.json and logs/notes.log; mirrors and shows them.

    Args:
        rundir: a claimed run.
        trackers: mirrors by name.
        progress: what the terminal shows.
        heartbeat: this rank's watch.
        samples_per_step: rows of each step, from its first, that are written with their texts.
    """

    def __init__(
        self,
        rundir: RunDir,
        trackers: Mapping[str, Tracker],
        progress: Progress,
        heartbeat: Heartbeat,
        samples_per_step: int,
    ) -> None:
        self.rundir = rundir
        self.progress = progress
        self.heartbeat = heartbeat
        self.samples_per_step = samples_per_step
        self.metrics = Metrics(rundir.path / "metrics.jsonl")
        self.samples = Metrics(rundir.path / "samples.jsonl", unique=False)
        self.evaluations = Metrics(rundir.path / "evaluations.jsonl", unique=False)
        self.mirror = Mirror(trackers, self.note)
        self.clock = PhaseClock()
        self._at = 0
        self._evaluated = -1
        self._tokens = 0
        self._counted: dict[str, float] = {}
        self._phase = ""
        self._status_time = -math.inf
        heartbeat.on_silence = self._silent

    def start(self, config: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        """Begin at the beginning (None) or where a checkpoint was; rows after it are moved aside, and it says so."""
        state = state or {"step": 0, "evaluated": -1, "tokens": 0, "trackers": {}}
        self._at, self._evaluated, self._tokens = state["step"], state["evaluated"], state["tokens"]
        moved = self.metrics.truncate_after(self._at)
        self.samples.truncate_after(self._at)
        self.evaluations.truncate_after(self._evaluated)
        self.progress.resume(self._at)
        if moved:
            self.note(
                f"{moved} rows after step {self._at} moved to {self.metrics.discarded.name}; these steps run again"
            )
        self._status("running")
        self.mirror.start(self.rundir.path, config, self._at, state["trackers"])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase, show it, and tell the heartbeat. Inside another phase it stops that one's time."""
        outer = self._phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def count(self, numbers: Mapping[str, float], stage: str = "select") -> None:
        """Numbers of this step that a stage counted; they stand under `select/` (or another stage's name) in its row."""
        self._counted |= {f"{stage}/{k}": v for k, v in numbers.items()}

    def step(self, step: int, exp: Experience, stats: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
        """Write, mirror and show the row of the step with this index; learners' numbers are means over their passes."""
        clash = [k for k in stats if k in RESERVED]
        assert not clash, f"a learner may not be named {clash[0]}"
        done = step + 1
        row = {"step": done} | describe(exp)
        self._tokens += row["count/tokens"]
        row["count/tokens_seen"] = self._tokens
        row |= self._counted
        for learner, passes in stats.items():  # a pass that forwarded no row knows less
            keys = dict.fromkeys(k for v in passes for k in v)
            row |= {f"{learner}/{k}": mean([v[k] for v in passes if k in v]) for k in keys}
        self._counted = {}
        row |= self.clock.row(rows=row["count/rows"], tokens=row["count/response_tokens"])
        self.metrics.append(row)
        for sample in rows_of(exp, self.samples_per_step):
            self.samples.append({"step": done} | sample)
        self._at = done
        self.progress.step(done, row)
        self.mirror.log(done, row)
        self.heartbeat.beat("between steps")
        if time.monotonic() - self._status_time > STATUS_EVERY:
            self._status("running")

    def evaluation(self, step: int, row: Mapping[str, Any]) -> None:
        """Write, mirror and show the results of an evaluation; keys get the prefix `eval/`."""
        named = {k if k.startswith("eval/") else f"eval/{k}": v for k, v in row.items() if k != "step"}
        self.evaluations.append({"step": step} | named)
        self._evaluated = step
        self.progress.evaluation(step, named)
        self.mirror.log(step, named)

    def note(self, text: str) -> None:
        """A line for the terminal and logs/notes.log, without secrets."""
        text = redact_text(text)
        self.progress.note(text)
        with (self.rundir.logs / "notes.log").open("a", encoding="utf-8", errors="backslashreplace") as f:
            f.write(f"{now()} step {self._at}: {text}\n")

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs; everything written so far is on the disk when this returns."""
        for file in (self.metrics, self.samples, self.evaluations):
            file.sync()
        return {"step": self._at, "evaluated": self._evaluated, "tokens": self._tokens, "trackers": self.mirror.state()}

    def finish(self, status: Status, reason: str = "") -> None:
        """Close everything and write how the run ended. A failure is told as far as the disk allows."""
        ends: list[Callable[[], object]] = [self.metrics.close, self.samples.close, self.evaluations.close]
        ends += [lambda: self._status(status, reason), lambda: self.mirror.finish(status)]
        for end in (*ends, self.progress.close, self.heartbeat.stop):
            with suppress(OSError) if status == "failed" else nullcontext():
                end()

    def _enter(self, name: str) -> None:
        self._phase = name
        self.clock.enter(name)
        self.heartbeat.beat(name or "between phases")
        self.progress.phase(name)

    def _silent(self, reason: str) -> None:
        self._status("failed", reason)
        self.progress.note(f"{reason}; the stacks are in {self.rundir.logs}/rank-*.stacks")
        self.progress.close()  # gives the cursor back

    def _status(self, status: Status, reason: str = "") -> None:
        self._status_time = time.monotonic()
        self.rundir.set_status(status, phase=self._phase, step=self._at, reason=redact_text(reason))


class PhaseClock:
    """Wall-clock seconds per phase since the last row; the clock starts with the first phase."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.current = ""
        self.since: float | None = None

    def enter(self, name: str) -> None:
        """Charge the time so far to the current phase and go on with another; empty: none."""
        moment = time.perf_counter()
        if self.since is not None:
            self.spent[self.current] = self.spent.get(self.current, 0.0) + moment - self.since
        self.current, self.since = name, moment

    def row(self, *, rows: int, tokens: int) -> dict[str, float]:
        """The seconds as `time/...`, and begin anew. Phases in BETWEEN make `time/between`, the others `time/step`."""
        self.enter(self.current)
        spent, self.spent = self.spent, {}
        step = math.fsum(v for k, v in spent.items() if k not in BETWEEN)
        named = {f"time/{k or 'other'}": v for k, v in spent.items()}
        speed = {"time/rows_per_s": rows / step, "time/tokens_per_s": tokens / step} if step > 0 else {}
        return named | {"time/step": step, "time/between": math.fsum(spent[k] for k in BETWEEN if k in spent)} | speed
