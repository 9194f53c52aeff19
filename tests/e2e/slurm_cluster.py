"""A real one-node SLURM of one's own: munged, slurmctld and slurmd in a temporary folder, on free ports, gone at the end."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SKIP = "slurm-wlm is not installed; apt-get install slurm-wlm munge"
# config_overrides: two ranks on a machine of one core. FirstJobId: test processes side by
# side have a cluster each, and a job's port follows from its number.
CONF = """\
ClusterName=rlhf
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={slurmd}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=120
FirstJobId={first}
MinJobAge=3600
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=100 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes={host} Default=YES MaxTime=60 GraceTime=300 PriorityTier=1 State=UP
PartitionName=urgent Nodes={host} MaxTime=60 PriorityTier=2 State=UP
"""


def absent() -> str:
    """Why no cluster can be started here, or an empty string."""
    if not all(map(program, PROGRAMS)):
        return SKIP
    return "" if os.geteuid() == 0 else "a SLURM of one's own needs root to start jobs"


def program(name: str) -> str | None:
    """Where a program lies; Debian keeps daemons where ordinary paths do not look."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@contextmanager
def cluster(place: Path) -> Iterator[dict[str, str]]:
    """Start one, and give the environment in which the SLURM commands talk to it."""
    place.chmod(0o755)
    for folder in ("state", "spool"):
        (place / folder).mkdir()
    host = socket.gethostname().split(".")[0]
    conf = place / "slurm.conf"
    first = 1 + 50 * os.getpid() % 15_000
    made = CONF.format(host=host, place=place, ctld=free_port(), slurmd=free_port(), first=first)
    conf.write_text(made, encoding="utf-8")
    key = place / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    environment = {"SLURM_CONF": str(conf)}
    munged = [program("munged"), "--foreground", "--force", f"--key-file={key}", f"--socket={place}/munge.socket"]
    munged += [f"--pid-file={place}/munged.pid", f"--log-file={place}/munged.log", f"--seed-file={place}/munged.seed"]
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(daemon(munged, environment))
        until(lambda: (place / "munge.socket").exists(), place)
        started.append(daemon([program("slurmctld"), "-D", "-f", str(conf)], environment))
        started.append(daemon([program("slurmd"), "-D", "-f", str(conf), "-N", host], environment))
        until(lambda: "idle" in tell(["sinfo", "-h", "-o", "%T"], environment), place)
        yield environment
    finally:
        tell(["scancel", "--full", "--user=root"], environment)
        end = time.monotonic() + 60
        while tell(["squeue", "-h"], environment).strip() and time.monotonic() < end:
            time.sleep(0.2)
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def daemon(command: list[str | None], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    nowhere = subprocess.DEVNULL
    words = [w for w in command if w is not None]
    return subprocess.Popen(words, env=os.environ | environment, stdout=nowhere, stderr=nowhere, stdin=nowhere)


def tell(command: list[str], environment: dict[str, str]) -> str:
    """What a SLURM command prints."""
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def until(happened: object, place: Path, limit: float = 180) -> None:
    end = time.monotonic() + limit
    while not happened():  # type: ignore[operator]
        logs = {p.name: p.read_text(errors="replace")[-1500:] for p in place.glob("*.log")}
        assert time.monotonic() < end, f"SLURM does not start: {logs}"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
