"""`rlhf cancel`: end a run in order, wherever it is; it saves a checkpoint after the step that it is in."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from typing import Any

from rlhf_cli.errors import ConfigError
from rlhf_cli.launch import queue
from rlhf_cli.launch.stop import undisturbed
from rlhf_cli.record.rundir import RunDir, born, now

MOMENT = 0.2  # seconds after which a writer that was seen has written who it is, or is gone


def cancel(rundir: RunDir) -> str:
    """Take a run's job out of SLURM, or ask the process of a run on this machine to stop. Returns what was done."""
    job = str(rundir.job().get("job", ""))
    jobs = queue.jobs([job] if job else [])
    if jobs is None:
        raise ConfigError(f"cancel: job {job} of {rundir.path}: SLURM does not answer here; type this on the cluster")
    found = jobs.get(job)
    if found and (found.waiting or found.active):
        with undisturbed():  # the mark without the cancelling would keep a job that goes on from its requeue
            _cancel(rundir, job)
        return f"cancelled job {job}; to go on later: rlhf resume {rundir.path}"
    if not rundir.writer():
        raise ConfigError(f"cancel: nobody works on {rundir.path}; rlhf runs shows what it is")
    return _ask(rundir)


def _cancel(rundir: RunDir, job: str) -> None:
    before = rundir.job()
    rundir.write_json("job.json", before | {"cancelled": now()})  # read by its ranks: do not requeue
    try:
        queue.cancel(job)
    except ConfigError:
        rundir.write_json("job.json", before)
        raise


def _ask(rundir: RunDir) -> str:
    """Ask the process that was seen to write a run to stop. Returns what was done."""
    writer = _writer(rundir)
    if writer is None:
        return f"{rundir.path} has just ended; rlhf runs shows how"
    if writer["host"] != socket.gethostname():
        raise ConfigError(f"cancel: {rundir.path} runs on {writer['host']}; type rlhf cancel {rundir.path} there")
    try:
        os.kill(writer["pid"], signal.SIGTERM)
    except ProcessLookupError:
        return f"{rundir.path} has just ended; rlhf runs shows how"
    except PermissionError:
        raise ConfigError(f"cancel: process {writer['pid']} of {rundir.path} belongs to another user") from None
    return f"asked process {writer['pid']} to stop after its step; to go on later: rlhf resume {rundir.path}"


def _writer(rundir: RunDir) -> dict[str, Any] | None:
    """Who writes a run, by its own word, which follows a moment after it took the lock; None when it has let go meanwhile."""
    for wait in (0.0, MOMENT):
        time.sleep(wait)
        try:
            who = json.loads((rundir.path / ".lock").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if who["host"] != socket.gethostname() or "born" not in who or born(who["pid"]) == who["born"]:
            return who  # else the one before, which was killed
    if rundir.writer():
        raise ConfigError(f"cancel: {rundir.path} is just starting; type it again")
    return None
