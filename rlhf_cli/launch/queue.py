"""What SLURM is asked and told, through its own commands; no accounting database is needed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.errors import ConfigError

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
TOGETHER = re.compile(r"-\w*K1?|--kill[\w-]*(=1)?")  # how srun is told to end all tasks when one is killed
ACTIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING")


@dataclass(frozen=True)
class Job:
    """A job as the queue shows it: SLURM's state, and its reason or its nodes."""

    state: str
    reason: str = ""

    @property
    def waiting(self) -> bool:
        """Has not started, or will start again."""
        return self.state in WAITING

    @property
    def active(self) -> bool:
        """Has processes."""
        return self.state in ACTIVE


def present() -> bool:
    """Whether this machine can talk to a SLURM."""
    return shutil.which("squeue") is not None


def jobs(ids: Iterable[str]) -> dict[str, Job] | None:
    """The jobs that SLURM still knows, ended ones for some minutes too. None where nobody can be asked."""
    wanted = set(ids)
    if not wanted:
        return {}
    asked = f"--jobs={','.join(sorted(wanted))}"
    done = _run("squeue", asked, "--states=all", "--noheader", "--array", "--format=%i|%A|%T|%r")
    if done is None or (done.returncode and "Invalid job id" not in done.stderr):  # forgotten by now
        return None
    found: dict[str, Job] = {}
    for line in done.stdout.splitlines():
        shown, raw, state, reason = (*line.split("|", 3), "", "", "")[:4]
        for name in {shown, raw} & wanted:
            found[name] = Job(state, "" if reason == "None" else reason)
    return found


def known(ids: Iterable[str]) -> dict[str, Job]:
    """`jobs`, and none where there is no SLURM. Raises ConfigError where there is one and it does not say."""
    wanted = set(ids)
    found = jobs(wanted)
    if found is None and present():
        raise ConfigError(
            f"SLURM does not say whether job {', '.join(sorted(wanted))} is still queued; try again in a minute"
        )
    return found or {}


def pending(ids: Iterable[str]) -> dict[str, Job]:
    """Those of the jobs that wait or have processes; raises as `known` does."""
    return {name: job for name, job in known(ids).items() if job.waiting or job.active}


def printing_into(folder: Path) -> str:
    """This user's job, waiting or at work, whose output lies in `folder`; empty where there is none."""
    for line in _tell("squeue", f"--user={os.getuid()}", "--noheader", "--Format=JobID:32,StdOut:4096").splitlines():
        job, _, output = line.partition(" ")
        if Path(output.strip()).parent == folder:
            return job
    return ""


def cancel(job: str) -> None:
    """End a job: its ranks get SIGTERM and checkpoint; after the cluster's KillWait they are killed."""
    _tell("scancel", job)


def requeue(job: str) -> str:
    """Put a running job back into the queue. Returns why that was refused, or an empty string."""
    done = _run("scontrol", "requeue", job)
    if done is None:
        return "scontrol is not here or does not answer"
    return "" if done.returncode == 0 else " ".join((done.stderr or done.stdout).split())


def hosts(nodelist: str) -> list[str]:
    """The machines of a list such as `gpu[1-3,7]`."""
    return _tell("scontrol", "show", "hostnames", nodelist).split()


def ends_together(step: str) -> bool:
    """Whether a step (12.0) ends as a whole when one task is killed, as far as the environment, srun's command or SLURM's settings tell."""
    if os.environ.get("SLURM_KILL_BAD_EXIT", "0") != "0":
        return True
    srun = re.search(r"SrunHost:Pid=([^\s.:]+)\S*:(\d+)", _said("scontrol", "show", "step", step))
    if srun and srun[1] == socket.gethostname().partition(".")[0]:
        with suppress(OSError):
            words = Path(f"/proc/{srun[2]}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
            if any(TOGETHER.fullmatch(word) for word in words):
                return True
    return re.search(r"^KillOnBadExit\s*= 1", _said("scontrol", "show", "config"), re.M) is not None


def _said(*command: str) -> str:
    done = _run(*command)
    return done.stdout if done else ""


def _tell(*command: str) -> str:
    done = _run(*command)
    if done is None:
        raise ConfigError(f"{command[0]} is not here or does not answer; type this where SLURM's commands work")
    if done.returncode:
        raise ConfigError(f"{' '.join(command)}: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout


def _run(*command: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
