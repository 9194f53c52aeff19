"""`rlhf logs`: what the ranks of a run print, as it is written or afterwards."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from rlhf_cli.errors import ConfigError
from rlhf_cli.launch import queue
from rlhf_cli.record.rundir import RunDir
from rlhf_cli.report.runs import ENDED, batch, batch_lines, state

POLL = 0.5  # seconds between looks at the file
ASK = 5.0  # seconds between looks at the run's state


def run_at(verb: str, path: Path) -> RunDir:
    """The run at `path`, which must be one."""
    if not (path / "config.yaml").exists():
        raise ConfigError(f"{verb}: {path} is no run directory (no config.yaml in it); rlhf runs lists them")
    return RunDir(path)


def show(rundir: RunDir, rank: int, follow: bool) -> None:
    """Print a rank's log; with `follow`, until the run ends."""
    at = _pour(_log(rundir, rank), 0)
    status, note = now(rundir)
    if follow:
        status, note = _follow(rundir, rank, at)
    if status in ("failed", "lost"):
        for line in batch_lines(rundir) if _log(rundir, rank) != batch(rundir) else []:
            print(line, flush=True)
    if status != "running" or not at:
        print(f"rlhf: {rundir.path}: {status}{f': {note}' if note else ''}", file=sys.stderr, flush=True)


def now(rundir: RunDir) -> tuple[str, str]:
    """A run's status and the note about it."""
    job = rundir.job().get("job")
    return state(rundir, queue.jobs([str(job)] if job else []))


def _follow(rundir: RunDir, rank: int, at: int) -> tuple[str, str]:
    """Print what comes until the run has ended and everything is printed. Says how it ended."""
    asked, told = 0.0, ""
    path = _log(rundir, rank)
    while True:
        status, note = ("", "")
        if time.monotonic() - asked > ASK:
            asked = time.monotonic()
            status, note = now(rundir)
            if status in ("queued", "requeued") and told != status:
                print(f"rlhf: {status}{f' ({note})' if note else ''}; waiting", file=sys.stderr, flush=True)
            told = status
        if path != _log(rundir, rank):  # the rank has begun
            path, at = _log(rundir, rank), 0
        at = _pour(path, at)
        if status in ENDED:
            time.sleep(4 * POLL)  # the summary is printed after the status is written
            at = _pour(path, at)
            status, note = now(rundir)  # what the others wrote meanwhile, and srun
            if status in ENDED:
                return status, note
        time.sleep(POLL)


def _log(rundir: RunDir, rank: int) -> Path:
    """A rank's own log; before it there is one, what the batch script printed; for a run in a terminal, the notes."""
    own = rundir.logs / f"rank-{rank}.log"
    if own.exists() or rank:
        return own
    return batch(rundir) if rundir.job() else rundir.logs / "notes.log"


def _pour(path: Path, at: int) -> int:
    """Print a file from byte `at`; returns where it ended."""
    if not path.exists():
        return 0
    with path.open("rb") as f:
        f.seek(at if at <= os.fstat(f.fileno()).st_size else 0)
        data = f.read()
        lines = data.decode("utf-8", errors="replace").splitlines(keepends=True)
        sys.stdout.write("".join(line for line in lines if not line.startswith("submitit ")))
        sys.stdout.flush()
        return f.tell()
