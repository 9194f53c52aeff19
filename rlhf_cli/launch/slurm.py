"""Submitting one run to SLURM through submitit: freeze it here, hand it to the queue, come back at once."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ConfigError
from rlhf_cli.launch import queue, step
from rlhf_cli.launch.stop import undisturbed
from rlhf_cli.record.rundir import RunDir

LIMIT = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d\d?))?(?::(?P<c>\d\d?))?")
OWN = ("nodes", "ntasks-per-node", "gpus-per-node", "time", "output", "error", "array", "signal", "job-name")


@dataclass
class Slurm:
    """A SLURM cluster. Empty settings are the cluster's defaults; a GPU per rank is asked for, unless hardware=cpu.

    Args:
        partition: queue to wait in (sinfo lists them).
        account: project that pays.
        qos: quality of service.
        time: limit, as minutes, HH:MM:SS or D-HH:MM:SS; in a file in quotes.
        nodes: machines.
        gpus: GPUs on each machine; empty: one per rank.
        cpus_per_task: cores of each rank.
        memory: memory of each machine, e.g. 64G.
        constraint: features that a machine must have, e.g. a100.
        setup: shell lines before the ranks start, e.g. ['module load cuda'].
        sbatch: more #SBATCH lines by their long names: launcher.sbatch.reservation=NAME.
        signal_before: seconds before the time limit at which a checkpoint is asked for; longer than a step and its saving.
        max_requeues: how often a preempted run goes back into the queue by itself.
    """

    partition: str | None
    account: str | None
    qos: str | None
    time: str | None
    nodes: int
    gpus: int | None
    cpus_per_task: int | None
    memory: str | None
    constraint: str | None
    setup: list[str]
    sbatch: dict[str, Any]
    signal_before: int
    max_requeues: int

    def hardware(self, cfg: Any, *, here: bool = True) -> dict[str, Any]:
        """What can be decided without a look at the machine that will compute; the job's first start decides the rest."""
        device = cfg.hardware.device
        if device == "auto":
            device = "cpu" if self.gpus == 0 else "cuda"
        processes = cfg.hardware.processes or (self.gpus if device == "cuda" and self.gpus else 1)
        if device == "cuda" and self.gpus is not None and self.gpus < processes:
            raise ConfigError(
                f"launcher.gpus={self.gpus}: {processes} rank(s) a machine need as many GPUs; type launcher.gpus={processes}, "
                "or hardware=cpu"
            )
        if cfg.hardware.nodes not in (1, self.nodes):
            raise ConfigError(
                f"launcher.nodes={self.nodes} and hardware.nodes={cfg.hardware.nodes} disagree; give both the same"
            )
        known = {"device": device, "processes": processes, "nodes": self.nodes}
        return known | ({"threads": cfg.hardware.threads or self.cpus_per_task} if self.cpus_per_task else {})

    def __call__(self, cfg: Any, freeze: Callable[[], RunDir]) -> int:
        """Freeze the run, submit it, and return.

        The run stays locked and signals wait until its job is written down: two commands submit once, and no job is lost. What no
        process can put off, SIGKILL, leaves a job behind that the next command finds in the queue.
        """
        _check_here()
        self._executor(cfg, Path("unnamed"))  # settings are refused before anything is written
        os.environ.setdefault("RLHF_ARGV", step.argv())
        rundir = freeze()
        try:
            with undisturbed():
                said = self._submit(cfg, rundir)
                print(f"rlhf: {said}; the run is {rundir.path}; follow it: rlhf logs {rundir.path} -f", flush=True)
        finally:
            rundir.release()  # the job claims it
        return 0

    def _submit(self, cfg: Any, rundir: RunDir) -> str:
        """Hand a frozen run to the queue and note its job, which waits for the lock. Returns what was done."""
        for old in rundir.errors():  # of an earlier try
            old.unlink()
        path = rundir.path.resolve()
        executor = self._executor(cfg, path)
        job = queue.printing_into(executor.folder) if executor.folder.exists() else ""
        said = f"job {job} waits or works for this run already, submitted by a command that was killed"
        if job:
            _hand_over(executor, job, str(path), self.max_requeues)
        else:
            try:
                with redirect_stderr(StringIO()):  # submitit prints what its exception says again
                    job = executor.submit(step.submitted, str(path), self.max_requeues).job_id
            except Exception as e:  # sbatch's own words, behind submitit's
                raise ConfigError(f"SLURM refused the job: {_words(e)}") from e
            said = f"submitted job {job}"
        rundir.set_job(job)
        return said

    def script(self, cfg: Any) -> str:
        """The batch script, as it would be submitted; an unnamed run is called NAME."""
        path = Path(cfg.run.dir).resolve() / (cfg.run.name or "NAME")
        executor = self._executor(cfg, path)
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def _executor(self, cfg: Any, path: Path) -> Any:
        executor = _executor_class()(path / "logs" / "slurm")
        executor.update_parameters(**self._parameters(cfg, path.name))
        return executor

    def _parameters(self, cfg: Any, name: str) -> dict[str, Any]:
        hw = self.hardware(cfg)
        more = {k.replace("_", "-"): v for k, v in self.sbatch.items()}
        taken = sorted(set(more) & set(OWN))
        if taken:
            raise ConfigError(f"launcher.sbatch.{taken[0]}: is set by launcher.* and hardware.* settings")
        limit = minutes(self.time) if self.time is not None else None
        if limit is not None and limit * 60 <= self.signal_before:
            raise ConfigError(
                f"launcher.time={self.time}: is over before the checkpoint is asked for; type launcher.signal_before=N, "
                f"N under {limit * 60} seconds"
            )
        asked = {
            "job_name": name,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "time": limit,
            "nodes": hw["nodes"],
            "ntasks_per_node": hw["processes"],
            "gpus_per_node": (self.gpus or hw["processes"]) if hw["device"] == "cuda" else self.gpus or None,
            "cpus_per_task": self.cpus_per_task,
            "setup": [str(line) for line in self.setup] or None,
            "wckey": None,
            "stderr_to_stdout": True,
            # srun does not take it over from the job since SLURM 22.05
            "srun_args": [
                "--kill-on-bad-exit=1",
                *([f"--cpus-per-task={self.cpus_per_task}"] if self.cpus_per_task else []),
            ],
        }
        plain = {"signal": f"USR1@{self.signal_before}", "requeue": True} | (
            {"mem": self.memory} if self.memory else {}
        )
        return asked | {"additional_parameters": plain | more}


def minutes(text: str) -> int:
    """A time limit in SLURM's notation, rounded up to minutes."""
    found = LIMIT.fullmatch(text.strip())
    if not found:
        raise ConfigError(f"launcher.time={text}: type minutes, HH:MM:SS or D-HH:MM:SS, e.g. launcher.time=4:00:00")
    days, parts = int(found["d"] or 0), [int(x) for x in (found["a"], found["b"], found["c"]) if x is not None]
    if found["d"] is not None:  # D-HH[:MM[:SS]]
        hours, mins, secs = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, mins, secs = parts
    else:  # MM[:SS]
        hours, (mins, secs) = 0, (*parts, 0)[:2]
    total = math.ceil(((days * 24 + hours) * 60 + mins) + secs / 60)
    if total < 1:
        raise ConfigError(f"launcher.time={text}: must be at least a minute")
    return total


def _executor_class() -> Any:
    try:
        import submitit
    except ImportError:
        raise ConfigError("launcher=slurm needs submitit; type pip install 'rlhf-cli[slurm]'") from None

    class Executor(submitit.SlurmExecutor):
        """Writes scripts on machines without SLURM too."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    return Executor


def _hand_over(executor: Any, job: str, *arguments: Any) -> None:
    """What a job does, which submitit writes after it has submitted: a command that was killed may not have come to that."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    file = JobPaths(executor.folder, job_id=job).submitted_pickle
    if not file.exists():
        DelayedSubmission(step.submitted, *arguments).dump(file)


def _check_here() -> None:
    if not shutil.which("sbatch") or not shutil.which("srun"):
        raise ConfigError(
            "launcher=slurm: no sbatch on this machine; log in to the cluster first, or look at the script: --print-sbatch"
        )


def _words(e: Exception) -> str:
    """What sbatch said, without submitit's frame."""
    lines = [line.strip() for line in str(e).splitlines() if "error:" in line and "sbatch" in line]
    said = "; ".join(dict.fromkeys(line.split("error:", 1)[1].strip() for line in lines)) or str(e)
    asked = "partition" not in said and re.search(r"gres|gpu", said, re.I)  # a partition may be called gpu
    hint = " (without GPUs: hardware=cpu)" if asked else ""
    return f"{said}{hint}"
