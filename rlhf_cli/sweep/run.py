"""`rlhf train -m`: every point a process and a run directory of its own; finished ones are skipped, others go on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.exits import DONE, FAILED, STOPPED
from rlhf_cli.launch import queue
from rlhf_cli.record.rundir import RunDir, now
from rlhf_cli.report.compare import compare, duration, text
from rlhf_cli.report.numbers import RunFiles, shared_metric
from rlhf_cli.report.runs import state as seen
from rlhf_cli.sweep import points as expansion
from rlhf_cli.sweep.board import Board
from rlhf_cli.sweep.points import Command, Point, is_here
from rlhf_cli.sweep.pool import Running, Share, Wish, shares, spawn, work
from rlhf_cli.sweep.record import LOG, Record, reason

SEARCH = "hydra/sweeper=optuna"
# How Hydra's users write what is a key of `sweep` here.
HYDRA = {
    "hydra.sweeper.n_trials": "sweep.trials",
    "hydra.sweeper.n_jobs": "sweep.parallel",
    "hydra.sweeper.direction": "sweep.direction",
    "hydra.sweeper.study_name": "sweep.name",
    "hydra/sweeper/sampler": "sweep.sampler",
    "hydra.sweeper.sampler.seed": "sweep.seed",
}


@dataclass
class Sweep:
    """A sweep that is open: its record is locked for this process."""

    record: Record
    command: Command
    cfg: Any  # of its first point
    slots: list[Share]
    board: Board
    wish: Wish
    typed: str  # the command line, to be typed again

    told: int = 0  # wishes to stop that were said aloud

    @property
    def settings(self) -> Any:
        return self.cfg.sweep

    def argv(self, point: Point) -> list[str]:
        """The command of one point, after `rlhf`."""
        folder = ["--config-dir", self.command.config_dir] if self.command.config_dir else []
        place = [f"run.dir={quoted(str(self.record.path))}", f"run.name={quoted(point.name)}"]
        return ["train", *folder, *point.words, *place]

    def begin(self, point: Point, share: Share) -> Running:
        """Start or continue a point."""
        entry, path = self.record[point.name], self.record.path / point.name
        verb = "goes on" if entry["status"] == "interrupted" else "starts again" if entry["tries"] else "starts"
        self.record.set(point.name, status="running", tries=entry["tries"] + 1, start=now(), end="", error="")
        begun = len(self.record.names("finished", "failed", "submitted", "pruned", "running"))
        total = max(len(self.record.data["points"]), self.record.data.get("search", {}).get("trials", 0))
        self.board.say(f"  {begun}/{total}  {point.name} {verb}")
        before = self.record.rundir(point.name).status()
        return Running(point.name, spawn(start_command(self.argv(point)), path / LOG, share), before)

    def end(self, running: Running, code: int) -> str:
        """Note how a point ended. Returns its state."""
        run = self.record.rundir(running.name)
        state = ended(code, run, running.before, asked=bool(self.wish.count))
        why = ""
        if state == "failed":
            why = f"killed by {signal.Signals(-code).name}" if code < 0 else reason(run, run.path / LOG, running.before)
        took = self.record[running.name]["seconds"] + running.seconds
        self.record.set(running.name, status=state, end=now(), seconds=round(took, 3), error=why)
        self.board.say(
            f"       {running.name} {state} after {duration(running.seconds)}{f': {why}' if why else self.score(running.name)}"
        )
        return state

    def score(self, name: str) -> str:
        """`: eval/reward 0.2 -> 0.3` of a finished run."""
        run = RunFiles(self.record.path / name)
        try:
            series = run.series(metric := shared_metric([run], self.settings.metric))
        except ConfigError:
            return ""
        return f": {metric} {series[0][1]:.4g} -> {series[-1][1]:.4g}" if series else ""

    def look(self, running: Mapping[int, Running]) -> None:
        """Show the running points, and that a wish to stop was heard."""
        if self.wish.count != self.told:
            self.told = self.wish.count
            again = "write their checkpoints and end; once more kills them" if self.told == 1 else "are killed"
            self.board.say(f"rlhf: {self.wish.signal}: {', '.join(r.name for r in running.values())} {again}")
        self.board.show({r.name: (self.record.path / r.name, r.seconds) for r in running.values()})

    def close(self) -> int:
        """Say how it stands and what to type; returns the exit status."""
        self.board.close()
        record, path = self.record, self.record.path
        counts = [f"{len(names)} {s}" for s in _ORDER if (names := record.names(s))]
        print(f"\nrlhf: sweep {path}: {len(record.data['points'])} points: {', '.join(counts)}", flush=True)
        for name in record.names("failed"):
            print(f"  failed: {name}: {record[name]['error']} ({path / name / LOG})")
        if record.names("finished"):
            try:
                print(text(compare([path], metric=self.settings.metric)))
            except ConfigError as e:
                print(f"no table: {e}")
        if record.names("submitted"):
            print(f"follow them: rlhf runs {path} --watch; how they ended is read by: {self.typed}", flush=True)
        if self.wish.count:
            print(f"stopped by {self.wish.signal}; go on with: {self.typed}", flush=True)
            return STOPPED
        stopped, failed = record.names("interrupted"), record.names("failed")
        if stopped:
            print(f"stopped on the way: {', '.join(stopped)}; go on with: {self.typed}", flush=True)
        if failed:
            print(f"run the failed ones again with: {self.typed} sweep.retry=true", flush=True)
        return FAILED if failed else STOPPED if stopped else DONE


_ORDER = ("finished", "submitted", "pruned", "failed", "interrupted", "running", "waiting")


def start_command(argv: Sequence[str]) -> list[str]:
    """What starts `rlhf ARGV` in a process of its own."""
    return [sys.executable, "-m", "rlhf_cli.cli", *argv]


def quoted(value: str) -> str:
    """A value as Hydra reads it back."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def ended(code: int, run: RunDir, before: Mapping[str, Any], *, asked: bool) -> str:
    """How a point ended, from its exit status and what its run says since its status was `before`."""
    if code == 0:
        return "finished" if run.said() == "finished" else "submitted"
    if asked and run.job() and not run.said():  # stopped after it had handed the point over
        return "submitted"
    status = run.status()
    if status != before and status.get("status") == "failed":  # a hang ends with 75 too, and would hang again unasked
        return "failed"
    return "interrupted" if asked or code == STOPPED else "failed"


def ours(words: Sequence[str]) -> list[str] | None:
    """The words as this engine takes them; None where another sweeper or launcher of Hydra's is asked for."""
    found, search = [], SEARCH in words
    for word in words:
        key, _, value = word.partition("=")
        if search and key in HYDRA:
            found.append(f"{HYDRA[key]}={value}")
        elif key.lstrip("+~").startswith(("hydra/", "hydra.")) and word != SEARCH:
            if not search:
                return None
            raise ConfigError(f"{word}: not a setting of the search; settings: {', '.join(HYDRA)}, and sweep.KEY")
        else:
            found.append(word)
    return found


def sweep(words: Sequence[str], config_dir: str | None) -> int:
    """Run a sweep to its end, or until it is stopped. Returns the exit status."""
    typed = shlex.join(["rlhf", "train", "-m", *(["--config-dir", config_dir] if config_dir else []), *words])
    typed = typed.replace(" sweep.retry=true", "")
    command = expansion.read([w for w in words if w != SEARCH], config_dir)
    if SEARCH in words:
        from rlhf_cli.sweep.search import prepare, search

        examples = prepare(command)
        return run(command, examples, typed, search)
    listed = expansion.expand(command)
    return run(command, listed, typed, lambda opened: grid(opened, listed))


def run(command: Command, examples: Sequence[Point], typed: str, each: Callable[[Sweep], None]) -> int:
    """Check `examples` (of a grid: all points), open the record, let `each` work, and report."""
    checked = expansion.check(examples, command.config_dir)
    cfg = compose("train", [*examples[0].words, *command.settings], command.config_dir)
    path = Path(cfg.sweep.dir or os.path.join(cfg.run.dir, "sweeps")) / (cfg.sweep.name or command.name)
    most = max(c.hardware.processes for c in checked)
    device = "cuda" if any(_device(c) == "cuda" for c in checked) else "cpu"
    slots = shares(cfg.sweep.parallel, device, most) if is_here(cfg) else [Share()]
    lock = _lock(path)  # before the record is read, which another sweep may be writing
    try:
        record = Record.open(path, command, typed)
        return _worked(Sweep(record, command, cfg, slots, Board(), Wish(), typed), each)
    finally:
        lock.release()


def _worked(opened: Sweep, each: Callable[[Sweep], None]) -> int:
    try:
        with opened.wish.heard():
            each(opened)
        return opened.close()
    finally:
        opened.board.close()


def _device(cfg: Any) -> str:
    from rlhf_cli.hardware import resolve_hardware

    return str(resolve_hardware(cfg, here=is_here(cfg))["device"])


def _lock(path: Path) -> RunDir:
    """One process at a time runs a sweep."""
    lock = RunDir(path)
    holder = lock.writer()
    if holder:
        raise ConfigError(f"sweep {path} is being run by {holder}; stop it, or choose another sweep.name")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"sweep.dir: cannot write {path}: {e.strerror}; choose another with sweep.dir=DIR") from None
    lock.claim()
    return lock


def grid(opened: Sweep, listed: Sequence[Point]) -> None:
    """Run every point of a list that is not finished."""
    record = opened.record
    known = {frozenset(e["overrides"]): e["name"] for e in record.data["points"]}  # the same words in another order
    listed = [replace(p, name=known.get(frozenset(p.overrides), p.name)) for p in listed]
    record.add(listed, [["rlhf", *opened.argv(p)] for p in listed])
    record.settle()
    taken = _elsewhere(record)
    again = ("waiting", "interrupted", *(("failed", "submitted") if opened.settings.retry else ()))
    todo = [p for p in listed if record[p.name]["status"] in again and p.name not in taken]
    side = f"; {len(opened.slots)} at a time" if len(opened.slots) > 1 else ""
    opened.board.say(f"rlhf: sweep {record.path}: {len(listed)} points{side}")
    for p in listed:
        if p not in todo:
            state, why = record[p.name]["status"], record[p.name]["error"]
            shown = f"{state} ({why})" if state == "submitted" and why and p.name not in taken else state
            opened.board.say(f"       {p.name} is {shown}, skipped{taken.get(p.name, _how.get(state, ''))}")
    left = iter(todo)

    def begin(share: Share) -> Running | None:
        point = next(left, None)
        return None if point is None else opened.begin(point, share)

    work(begin, opened.end, opened.look, opened.slots, opened.wish)


def _elsewhere(record: Record) -> dict[str, str]:
    """The points that a queue or another process has, and what to say of each. Notes how the jobs of the others ended."""
    runs = {name: record.rundir(name) for name in record.names("submitted", "failed", "interrupted")}
    ids = {name: str(run.job().get("job", "")) for name, run in runs.items()}
    jobs = queue.known(job for job in ids.values() if job)
    found = {name: f": {who} writes it" for name, run in runs.items() if (who := run.writer())}
    for name, job in ids.items():
        if job in jobs and (jobs[job].waiting or jobs[job].active):
            found[name] = f": job {job} is {jobs[job].state.lower()}"
        elif job and name not in found and queue.present():
            _note_end(record, name, *seen(runs[name], jobs))
    return found


def _note_end(record: Record, name: str, status: str, note: str) -> None:
    """What became of the job of a point, by the word of `rlhf runs`."""
    if status == "failed":
        record.set(name, status=status, error=note)
    elif record[name]["status"] == "submitted":
        record.set(name, error=status)


_how = {
    "failed": "; sweep.retry=true runs it again",
    "submitted": "; sweep.retry=true submits it again",
    "running": ": another process writes it",
}
