"""Inside a SLURM job: every task that srun started is one rank, found through the environment alone.

Serves `launcher=slurm`, Hydra's `hydra/launcher=submitit_slurm`, and `srun rlhf train` inside one's own batch script.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from rlhf_cli.config import load_config
from rlhf_cli.errors import ConfigError
from rlhf_cli.exits import STOPPED
from rlhf_cli.hardware import free_port, resolve_hardware
from rlhf_cli.launch import queue
from rlhf_cli.launch.stop import Stop
from rlhf_cli.record import checkpoint
from rlhf_cli.record.files import size
from rlhf_cli.record.output import logged
from rlhf_cli.record.rundir import RunDir

FIRST_PORT, PORTS = 15_000, 15_000  # below the range that systems deal out
STEP_APART = 101  # ports between two steps of one job, which may run side by side
PATIENCE = 60.0  # seconds that the command which submitted a job gets to write that down
PAUSES = (0.0, 5.0, 15.0)  # seconds before each try to requeue
IDLE_TRIES = 2  # that came to their time limit without anything to go on from
LIMIT = "SIGUSR1"  # what SLURM sends before the time limit, as launcher=slurm asks it to


@dataclass(frozen=True)
class Step:
    """This task among all that srun started."""

    job: str  # the id that SLURM's commands take, 12 or 12_3
    number: int  # the same as a plain number
    step: int  # of srun's calls in the job
    rank: int
    local_rank: int
    world: int
    nodes: int
    nodelist: str
    threads: int  # cores of this task
    restarts: int  # how often the job was requeued

    def environment(self) -> dict[str, str]:
        """What torch reads to find the other ranks; never ssh. A lone rank takes any free port."""
        port = FIRST_PORT + (self.number + STEP_APART * self.step) % PORTS if self.world > 1 else free_port()
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank % self._visible()),
            "MASTER_ADDR": queue.hosts(self.nodelist)[0] if self.nodes > 1 else "127.0.0.1",
            "MASTER_PORT": str(port),
        }

    def _visible(self) -> int:
        """GPUs that this task sees: all of the machine's share, or only its own under --gpus-per-task."""
        return len([x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]) or self.world


def here(env: Mapping[str, str] = os.environ) -> Step | None:
    """The task that this process is, where srun started several or submitit started it; else None."""
    world = int(env.get("SLURM_STEP_NUM_TASKS", "0"))
    if world < 2 and not (world and env.get("SUBMITIT_EXECUTOR") == "slurm"):
        return None
    nodes = int(env.get("SLURM_STEP_NUM_NODES", "1"))
    array = env.get("SLURM_ARRAY_JOB_ID")
    cores = int(env.get("SLURM_CPUS_ON_NODE", "1")) * nodes // world
    return Step(
        job=f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"],
        number=int(env["SLURM_JOB_ID"]),
        step=int(env.get("SLURM_STEP_ID", "0")),
        rank=int(env["SLURM_PROCID"]),
        local_rank=int(env.get("SLURM_LOCALID", "0")),
        world=world,
        nodes=nodes,
        nodelist=env.get("SLURM_STEP_NODELIST", ""),
        threads=int(env.get("SLURM_CPUS_PER_TASK") or max(1, cores)),
        restarts=int(env.get("SLURM_RESTART_COUNT", "0")),
    )


def submitted(path: str, max_requeues: int) -> None:
    """One task of the job that `launcher=slurm` submitted, from its start to its end."""
    step = here()
    assert step is not None, "runs inside a job only"
    rundir, stop = RunDir(path), Stop()
    stop.told = lambda name: _give_up_early(rundir, step, max_requeues, name)  # until the session listens
    cfg = load_config(rundir.path)
    OmegaConf.update(cfg, "hardware", hardware(cfg, step), merge=True)
    code = run(cfg, step, lambda: _frozen(cfg, rundir), stop, max_requeues)
    if code:
        sys.exit(code)


def run(cfg: Any, step: Step, freeze: Callable[[], RunDir], stop: Stop, max_requeues: int = 100) -> int:
    """Join the other ranks, let rank 0 claim the run and freeze the configuration, and train. Returns the exit status.

    A run that a signal stopped goes back into the queue, where submitit started it; that is no failure: 0.
    """
    from rlhf_cli.launch.local import calm

    os.environ |= step.environment() | {"RLHF_JOB": step.job}
    calm(cfg.hardware.threads)
    from rlhf_cli import worker

    if step.rank == 0:
        _refuse_taken(int(os.environ["MASTER_PORT"]))
    comm = worker.join(cfg)
    claimed, wrong = _attempt(freeze, step) if step.rank == 0 else (None, "")
    path, wrong = comm.broadcast((claimed and str(claimed.path), wrong))
    if wrong:
        raise ConfigError(wrong) if step.rank == 0 else SystemExit(2)
    rundir = claimed or RunDir(path)
    code = worker.entry(rundir, stop)
    rundir.release()
    if code == STOPPED and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        return _requeued(rundir, step, max_requeues, stop.signal)
    return code


def hardware(cfg: Any, step: Step) -> dict[str, Any]:
    """The `auto` values of `hardware` for this task."""
    each = step.world // step.nodes
    if cfg.hardware.processes not in (0, each):
        raise ConfigError(
            f"hardware.processes={cfg.hardware.processes}: srun started {each} task(s) a machine, and each is a rank; "
            f"type hardware.processes={each}, or ask for as many tasks"
        )
    cfg.hardware.processes, cfg.hardware.nodes = each, step.nodes
    cfg.hardware.threads = cfg.hardware.threads or step.threads
    return resolve_hardware(cfg, here=False)


def warn_of_waiting(step: Step) -> None:
    """Say once where srun would leave the others of a killed rank alone: in a collective they may wait for it until their time is up."""
    if step.rank or step.world < 2 or queue.ends_together(f"{step.number}.{step.step}"):
        return
    print(
        "rlhf: warning: should a rank be killed, srun will let the others wait for it; type srun --kill-on-bad-exit=1",
        file=sys.stderr,
        flush=True,
    )


def _attempt(freeze: Callable[[], RunDir], step: Step) -> tuple[RunDir | None, str]:
    """The claimed run, or what was wrong: the other ranks wait for either."""
    try:
        rundir = freeze()
    except Exception as e:
        return None, str(e) or type(e).__name__
    if rundir.job().get("job") != step.job:
        rundir.set_job(step.job)
    for old in (*rundir.errors(), rundir.silent):  # of an earlier try
        old.unlink(missing_ok=True)
    return rundir, ""


def _refuse_taken(port: int) -> None:
    """The other ranks know no port but this one."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError as e:
            raise ConfigError(
                f"port {port} of {socket.gethostname()}, where the ranks of this job meet, is taken ({e.strerror}); "
                "submit again: another job has another port"
            ) from None


def _frozen(cfg: Any, rundir: RunDir) -> RunDir:
    rundir.claim(PATIENCE)
    rundir.save_config(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    return rundir


def _requeued(rundir: RunDir, step: Step, max_requeues: int, signal: str) -> int:
    """Back into the queue by rank 0; the others just end. Returns the exit status."""
    if step.rank:
        return 0
    with logged(rundir.logs / "rank-0.log", shown=True):
        why = _why_not(rundir, step, max_requeues, signal)
        if why:
            print(f"not requeued: {why}; go on with: rlhf resume {rundir.path}", flush=True)
            return STOPPED
        print(f"requeued job {step.job} ({step.restarts + 1} of at most {max_requeues} times)", flush=True)
        return 0


def _why_not(rundir: RunDir, step: Step, max_requeues: int, signal: str) -> str:
    """Put the job back into the queue. Returns why that was not done, or an empty string."""
    if rundir.job().get("cancelled"):
        return "cancelled"
    state = (queue.jobs([step.job]) or {}).get(step.job)
    if state is not None and not (state.waiting or state.state in ("RUNNING", "SIGNALING")):
        return f"the job is {state.state.lower()}"
    if step.restarts >= max_requeues:
        return f"launcher.max_requeues={max_requeues}"
    if signal == LIMIT and _idle(rundir) >= IDLE_TRIES:
        return f"{IDLE_TRIES} tries came to their time limit before their first step was done; raise launcher.time"
    return _requeue(step.job)


def _idle(rundir: RunDir) -> int:
    """How many tries in a row, this one included, came to their time limit and left nothing new to go on from."""
    job, reached = rundir.job(), [checkpoint.newest_step(rundir.checkpoints), size(rundir.prepass)]
    idle = job.get("idle", 0) + 1 if job.get("reached", [-1, 0]) == reached else 0
    rundir.write_json("job.json", job | {"reached": reached, "idle": idle})
    return idle


def _requeue(job: str) -> str:
    """Ask SLURM to requeue a job; again where it was too busy to answer, while the job still runs. Returns why it did not."""
    why = ""
    for pause in PAUSES:
        time.sleep(pause)
        why = queue.requeue(job)
        state = (queue.jobs([job]) or {}).get(job) if why else None
        if not why or (state is not None and state.waiting):  # the answer was lost, not the request
            return ""
        if state is not None and state.state != "RUNNING":
            return why
    return why


def _give_up_early(rundir: RunDir, step: Step, max_requeues: int, signal: str) -> None:
    """A signal before the session listens loses nothing: back into the queue at once."""
    if step.rank == 0:
        os._exit(_requeued(rundir, step, max_requeues, signal))


def argv() -> str:
    """The command as provenance keeps it."""
    return json.dumps(["rlhf", *sys.argv[1:]])
