"""From a composed configuration to processes on this machine. Imports no torch: ranks do."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlhf_cli.config import load_config
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.hardware import free_port, resolve_hardware
from rlhf_cli.launch import queue, step
from rlhf_cli.launch.choose import launcher_of
from rlhf_cli.plan import validate
from rlhf_cli.record.rundir import RunDir, base_name, name_run
from rlhf_cli.report.planned import describe

FREE = (
    "run",
    "resume",
    "tracker",
    "launcher",
    "names",
    "input",
    "output",
    "checkpoint",
    "steps",
)  # may differ on resume
MAY_CHANGE = ("hardware", "gates", "eval")  # may differ, said aloud


def launch(cfg: Any) -> int:
    """Freeze the configuration into the run directory and hand it to the launcher of `cfg`."""
    validate(cfg)
    launcher = launcher_of(cfg)
    OmegaConf.update(cfg, "hardware", launcher.hardware(cfg), merge=True)
    return launcher(cfg)


def resume(path: Path, overrides: list[str]) -> int:
    """Go on with a run from its newest valid checkpoint; `overrides` change its configuration, said aloud."""
    if not (path / "config.yaml").exists():
        raise ConfigError(f"resume: {path} is no run directory (no config.yaml in it); rlhf resume runs/NAME")
    _refuse_busy(RunDir(path))
    cfg = load_config(path)
    cfg.resume = "auto"
    before = OmegaConf.to_container(cfg, resolve=True)
    if overrides:
        from rlhf_cli.override import override

        cfg = override(cfg, overrides)
        validate(cfg)
        OmegaConf.update(cfg, "hardware", launcher_of(cfg).hardware(cfg), merge=True)
        for key, (old, new) in differences(before, OmegaConf.to_container(cfg, resolve=True)).items():
            print(f"rlhf: resume changes {key}: {old} -> {new}", flush=True)
    status = RunDir(path).status()
    if status.get("status") == "finished" and cfg.steps <= int(status.get("step", -1)) and cfg.resume == "auto":
        print(f"rlhf: {path} is finished ({cfg.steps} steps); for more, type rlhf resume {path} steps=N", flush=True)
        return 0
    rundir = RunDir(path)
    rundir.save_config(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    return launcher_of(cfg).again(rundir, cfg)


def prepare(cfg: Any) -> RunDir:
    """The run directory, new or one that may be continued; never another experiment's."""
    named = bool(cfg.run.name)
    if not named:
        cfg.run.name = name_run(cfg.run.dir, cfg.names)
    path = Path(cfg.run.dir) / cfg.run.name
    rundir = RunDir(path)
    _refuse_busy(rundir)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    if named and _has_work(path):
        _refuse_other(path, plain, cfg.resume)
    rundir.create()
    rundir.save_config(plain)
    (path / "plan.txt").write_text(describe(cfg) + "\n", encoding="utf-8")
    return rundir


def _refuse_busy(rundir: RunDir) -> None:
    """Two writers would mix their files; the second must not even touch the configuration."""
    holder = rundir.writer() or _queued(rundir)
    if holder:
        raise ConfigError(
            f"run {rundir.name} is being written by {holder}; stop it (rlhf cancel {rundir.path}), or choose another run.name"
        )


def _queued(rundir: RunDir) -> str | None:
    """The cluster job of a run that is still to come or at work, unless that is this one."""
    job, task = str(rundir.job().get("job", "")), step.here()
    if not job or (task is not None and task.job == job):
        return None
    found = (queue.jobs([job]) or {}).get(job)
    return f"job {job} ({found.state.lower()})" if found and (found.waiting or found.active) else None


def _has_work(path: Path) -> bool:
    """Whether a run has something to lose: one that ended before its first step does not stand in the way of another try."""
    metrics = path / "metrics.jsonl"
    return any((path / "checkpoints").glob("*step-*")) or (metrics.exists() and metrics.stat().st_size > 0)


def _refuse_other(path: Path, plain: Mapping[str, Any], resume_mode: str) -> None:
    """An existing run is continued only by the same experiment, and only when that was not forbidden."""
    if resume_mode == "never":
        raise ConfigError(f"run {path} exists and resume=never; choose another run.name, or resume=auto to continue it")
    old: Any = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"), resolve=True)
    found = differences(old, plain)
    hard = [k for k in found if k.split(".")[0] not in (*FREE, *MAY_CHANGE)]
    if hard:
        was, now = found[hard[0]]
        raise ConfigError(
            f"run {path} exists with another configuration: {hard[0]} was {was}, now {now}; choose another run.name, "
            f"or change it on purpose with rlhf resume {path} {hard[0]}={now}"
        )
    for key in (k for k in found if k.split(".")[0] in MAY_CHANGE):
        print(f"rlhf: continuing {path} with {key}: {found[key][0]} -> {found[key][1]}", flush=True)


def differences(a: Any, b: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for k in {**a, **b}:
            found |= differences(a.get(k), b.get(k), f"{key}.{k}".lstrip("."))
        return found
    return {} if a == b else {key: (a, b)}


def calm(threads: int) -> None:
    """Settings that torch reads when it is imported.

    Threads that wait by spinning make a shared machine crawl, ten times slower; those that sleep at once lose 60 % of a rollout's
    speed on a quiet one. A tenth of a millisecond of spinning avoids both.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def start(rundir: RunDir, processes: int, threads: int) -> int:
    """Run the ranks: one in place, several under DeepSpeed's launcher."""
    calm(threads)
    os.environ.setdefault("RLHF_ARGV", json.dumps(["rlhf", *sys.argv[1:]]))
    if processes == 1:
        from rlhf_cli.worker import main

        return main(rundir.path)
    return run_ranks(rundir, processes)


def run_ranks(rundir: RunDir, processes: int) -> int:
    """DeepSpeed's per-node launcher: starts the ranks with their environment, and stops all when one fails."""
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(processes))}).encode()).decode()
    command = [
        sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--node_rank=0", "--master_addr=127.0.0.1",
        f"--master_port={free_port()}", "--no_local_rank", "--log_level=critical", "--module", "rlhf_cli.worker", str(rundir.path),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu" if not _cuda(rundir) else "cuda"),
    }
    before = rundir.status()
    for old in rundir.logs.glob("rank-*.error"):  # of an earlier try
        old.unlink()
    log = (rundir.logs / "launcher.log").open("a", encoding="utf-8")
    ranks = subprocess.Popen(command, env=environment, stderr=log, start_new_session=True)
    for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(s, lambda number, _: _forward(ranks, number))
    code = ranks.wait()
    log.close()
    return _explain(rundir, code, before)


def _forward(launcher: subprocess.Popen[bytes], number: int) -> None:
    """Pass a signal to the ranks, which checkpoint and end; the launcher itself would kill them at once."""
    for child in children(launcher.pid):
        try:
            os.kill(child, number)
        except ProcessLookupError:
            continue


def children(pid: int) -> list[int]:
    """Direct children of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(p) for p in task.read_text().split()]
    return found


def _explain(rundir: RunDir, code: int, before: Mapping[str, Any]) -> int:
    """Show the first failing rank's error. `before`: the status when the ranks started."""
    status = rundir.status()
    if status.get("status") == "preempted" and status != before:
        return 75
    if code == 0:
        return 0
    errors = sorted(rundir.logs.glob("rank-*.error"), key=lambda p: p.stat().st_mtime)
    if errors:
        last = errors[0].read_text(encoding="utf-8").strip().splitlines()[-1]
        kind, _, text = last.partition(": ")
        rank = errors[0].stem.removeprefix("rank-")
        if kind.rpartition(".")[2] in ("ConfigError", "GateError"):
            refused = GateError if kind.endswith("GateError") else ConfigError
            raise refused(text if text.startswith(f"rank {rank}") else f"rank {rank}: {text}")
        raise ConfigError(f"rank {rank} failed: {last}; the traceback is in {errors[0]}")
    raise ConfigError(f"the ranks ended with status {code}; see {rundir.logs}/launcher.log and rank-*.log")


def _cuda(rundir: RunDir) -> bool:
    return OmegaConf.load(rundir.path / "config.yaml").hardware.device == "cuda"


def run_verb(verb: str, cfg: Any) -> int:
    """eval, generate, score: one process, in place."""
    OmegaConf.update(cfg, "hardware", resolve_hardware(cfg), merge=True)
    calm(cfg.hardware.threads)
    from rlhf_cli import verbs

    runner: dict[str, Any] = {"eval": verbs.evaluate, "generate": verbs.generate, "score": verbs.score}
    return runner[verb](cfg)


# ---- where the ranks start ----


class Local:
    """This machine. Where srun started several of this process, each of them is a rank."""

    def hardware(self, cfg: Any, *, here: bool = True) -> dict[str, Any]:
        """What this machine has."""
        task = step.here()
        return step.hardware(cfg, task) if task and task.world > 1 else resolve_hardware(cfg, here=here)

    def __call__(self, cfg: Any) -> int:
        """Run to the end."""
        task = step.here()
        if task is None or (task.world == 1 and cfg.hardware.processes > 1):
            return self._start(prepare(cfg), cfg)
        if "SUBMITIT_EXECUTOR" not in os.environ:  # whose own command would be noted otherwise
            os.environ.setdefault("RLHF_ARGV", step.argv())
        cfg.run.name = cfg.run.name or base_name(cfg.names, f"job{task.job}")  # a requeued job finds it again
        return step.run(cfg, task, lambda: prepare(cfg))

    def again(self, rundir: RunDir, cfg: Any) -> int:
        """Go on to the end."""
        task = step.here()
        if task is None or task.world == 1:
            return self._start(rundir, cfg)
        OmegaConf.update(cfg, "hardware", step.hardware(cfg, task), merge=True)
        return step.run(cfg, task, lambda: rundir)

    def _start(self, rundir: RunDir, cfg: Any) -> int:
        (rundir.path / "job.json").unlink(missing_ok=True)  # no job writes this run from here on
        return start(rundir, cfg.hardware.processes, cfg.hardware.threads)

    def script(self, cfg: Any) -> str:
        """Nothing waits in a queue."""
        return ""
