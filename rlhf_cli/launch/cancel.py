"""`rlhf cancel`: end a run in order, wherever it is; it saves a checkpoint after the step that it is in."""

from __future__ import annotations

import json
import os
import signal
import socket

from rlhf_cli.errors import ConfigError
from rlhf_cli.launch import queue
from rlhf_cli.record.rundir import RunDir, now


def cancel(rundir: RunDir) -> str:
    """Take a run's job out of SLURM, or ask the process of a run on this machine to stop. Returns what was done."""
    job = str(rundir.job().get("job", ""))
    jobs = queue.jobs([job] if job else [])
    if jobs is None:
        raise ConfigError(f"cancel: job {job} of {rundir.path}: SLURM does not answer here; type this on the cluster")
    found = jobs.get(job)
    if found and (found.waiting or found.active):
        before = rundir.job()
        rundir.write_json("job.json", before | {"cancelled": now()})  # read by its ranks: do not requeue
        try:
            queue.cancel(job)
        except ConfigError:
            rundir.write_json("job.json", before)
            raise
        return f"cancelled job {job}; to go on later: rlhf resume {rundir.path}"
    if not rundir.writer():
        raise ConfigError(f"cancel: nobody works on {rundir.path}; rlhf runs shows what it is")
    writer = json.loads((rundir.path / ".lock").read_text(encoding="utf-8"))
    if writer["host"] != socket.gethostname():
        raise ConfigError(f"cancel: {rundir.path} runs on {writer['host']}; type rlhf cancel {rundir.path} there")
    os.kill(writer["pid"], signal.SIGTERM)
    return f"asked process {writer['pid']} to stop after its step; to go on later: rlhf resume {rundir.path}"
