"""From a composed configuration to processes on this machine. Imports no torch: ranks do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlhf_cli.config import load_config
from rlhf_cli.errors import ConfigError
from rlhf_cli.hardware import resolve_hardware
from rlhf_cli.launch import queue, step
from rlhf_cli.launch.choose import launcher_of
from rlhf_cli.launch.nodes import Place, await_config, place_of
from rlhf_cli.launch.ranks import run_ranks
from rlhf_cli.launch.stop import Stop
from rlhf_cli.plan import validate
from rlhf_cli.record import checkpoint
from rlhf_cli.record.files import full_disk, write_text_atomic
from rlhf_cli.record.rundir import RunDir, base_name, busy, name_run
from rlhf_cli.report.planned import describe

FREE = (
    "run",
    "resume",
    "tracker",
    "launcher",
    "sweep",
    "names",
    "input",
    "output",
    "checkpoint",
    "steps",
)  # may differ on resume
MAY_CHANGE = ("hardware", "gates", "detectors", "eval")  # may differ, said aloud
JUDGE = ("url", "key_env", "concurrency", "timeout", "retries", "cache", "device")  # how the same judge is reached
HERE = ("hardware.node_rank", "hardware.master", "hardware.hostfile")  # where a machine stands; not worth a word


def launch(cfg: Any) -> int:
    """Hand a configuration to the launcher that it names, which freezes it in a run directory and runs it."""
    validate(cfg)
    launcher = launcher_of(cfg)
    OmegaConf.update(cfg, "hardware", launcher.hardware(cfg), merge=True)
    return launcher(cfg, lambda: prepare(cfg))


def follow(rundir: RunDir, cfg: Any, place: Place) -> int:
    """Run this machine's ranks of a run that machine 0 froze."""
    await_config(rundir, OmegaConf.to_container(cfg, resolve=True), differences)
    return start(rundir, cfg.hardware, place)


def resume(path: Path, overrides: list[str]) -> int:
    """Go on with a run from its newest valid checkpoint; `overrides` change its configuration, said aloud."""
    rundir = RunDir(path)
    if not (path / "config.yaml").exists():
        raise ConfigError(f"resume: {path} is no run directory (no config.yaml in it); rlhf resume runs/NAME")
    cfg = load_config(path)
    # A run that began from another's checkpoint and has none of its own begins there again.
    if checkpoint.newest_step(rundir.checkpoints) >= 0:
        cfg.resume = "auto"
    cfg.run.dir, cfg.run.name = str(path.parent), path.name  # it may have been moved
    before = OmegaConf.to_container(cfg, resolve=True)
    if overrides:
        from rlhf_cli.override import override

        cfg = override(cfg, overrides)
        validate(cfg)
    launcher = launcher_of(cfg)
    OmegaConf.update(cfg, "hardware", launcher.hardware(cfg), merge=True)
    status = rundir.status()
    if status.get("status") == "finished" and cfg.steps <= int(status.get("step", -1)) and cfg.resume == "auto":
        print(f"rlhf: {path} is finished ({cfg.steps} steps); for more, type rlhf resume {path} steps=N", flush=True)
        return 0
    return launcher(cfg, lambda: _reopen(rundir, cfg, before))


def repeated(cfg: Any, task: step.Step) -> str:
    """`resume` of a command that a requeued job types again: what the run says, since what was asked for may be done."""
    rundir = RunDir(Path(cfg.run.dir) / cfg.run.name)
    begun = task.restarts and rundir.job().get("job") == task.job
    return load_config(rundir.path).resume if begun else cfg.resume


@contextmanager
def _released(rundir: RunDir) -> Iterator[None]:
    """Let go of a claimed run at the end; a full disk is said in one line."""
    try:
        yield
    except OSError as e:
        raise full_disk(e, rundir.path) or e from None
    finally:
        rundir.release()


def _reopen(rundir: RunDir, cfg: Any, before: Any) -> RunDir:
    """Claim a run and freeze its changed configuration; `before`: as it was."""
    after: Any = OmegaConf.to_container(cfg, resolve=True)
    with _claimed(rundir):
        for key, (old, new) in differences(before, after).items():
            if key not in HERE:
                print(f"rlhf: resume changes {key}: {old} -> {new}", flush=True)
        _freeze(rundir, after)
    return rundir


def prepare(cfg: Any) -> RunDir:
    """The run directory, claimed, new or one that may be continued; never another experiment's."""
    named = bool(cfg.run.name)
    if not named:
        cfg.run.name = name_run(cfg.run.dir, cfg.names)
    path = Path(cfg.run.dir) / cfg.run.name
    rundir = RunDir(path).create()
    with _claimed(rundir):
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
        if named and _has_work(path):
            _refuse_other(path, plain, cfg.resume)
        _freeze(rundir, plain)
        write_text_atomic(path / "plan.txt", describe(cfg) + "\n")
    return rundir


@contextmanager
def _claimed(rundir: RunDir) -> Iterator[None]:
    """Become the one writer, also after this; an error inside lets go again.

    Two writers would mix their files; the second, at work or in a queue, must not even touch the configuration.
    """
    before = rundir.job()
    _refuse_queued(rundir)
    rundir.claim()
    try:
        if rundir.job() != before:  # submitted by another command in between
            _refuse_queued(rundir)
        yield
    except BaseException as e:
        rundir.release()
        raise full_disk(e, rundir.path) or e from None


def _refuse_queued(rundir: RunDir) -> None:
    """Refuse a run whose cluster job is still to come or at work, unless that is this one."""
    job, task = str(rundir.job().get("job", "")), step.here()
    if not job or (task is not None and task.job == job):
        return
    found = queue.pending([job]).get(job)
    if found is not None:
        raise busy(rundir, f"job {job} ({found.state.lower()})")


def _freeze(rundir: RunDir, plain: dict[str, Any]) -> None:
    """Write the configuration, without where this machine stands: another start may be made from elsewhere."""
    rundir.save_config(plain | {"hardware": plain["hardware"] | {"node_rank": None, "master": "", "hostfile": ""}})


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
    hard = _hard(found)
    if hard:
        was, now = found[hard[0]]
        raise ConfigError(
            f"run {path} exists with another configuration: {hard[0]} was {was}, now {now}; choose another run.name, "
            f"or change it on purpose with rlhf resume {path} {hard[0]}={now}"
        )
    for key in (k for k in found if k.split(".")[0] in MAY_CHANGE and k not in HERE):
        print(f"rlhf: continuing {path} with {key}: {found[key][0]} -> {found[key][1]}", flush=True)


def _hard(found: Mapping[str, Any]) -> list[str]:
    """The keys among those found different that make another experiment."""
    reached = {f"judge.{k}" for k in JUDGE}
    return [k for k in found if k.split(".")[0] not in (*FREE, *MAY_CHANGE) and k not in reached]


def differences(a: Any, b: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for k in {**a, **b}:
            found |= differences(a.get(k), b.get(k), f"{key}.{k}".lstrip("."))
        return found
    return {} if a == b else {key: (a, b)}


SPIN = {True: "30000", False: "3000"}  # by whether a process is alone: about 1 ms, and a tenth of that


def calm(threads: int, *, alone: bool = False) -> None:
    """Settings that torch reads when it is imported; `alone`: no other rank computes on this machine's cores.

    Threads that wait by spinning make ranks that share cores crawl, ten times slower; those that sleep at once lose 60 % of a rollout's
    speed on a quiet machine. A tenth of a millisecond of spinning avoids both, and a lone rank gains a fifth of its rollout by more.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN[alone])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def start(rundir: RunDir, hardware: Any, place: Place) -> int:
    """Run the ranks of this machine: a lone one in place, several under DeepSpeed's launcher."""
    calm(hardware.threads, alone=hardware.processes == 1)
    os.environ.setdefault("RLHF_ARGV", step.argv())
    stop = Stop()
    if hardware.processes * place.nodes > 1:
        return run_ranks(rundir, hardware, place, stop)
    from rlhf_cli.worker import main

    return main(rundir, stop)


def run_verb(verb: str, cfg: Any) -> int:
    """eval, generate, score: one process, in place."""
    OmegaConf.update(cfg, "hardware", resolve_hardware(cfg), merge=True)
    calm(cfg.hardware.threads, alone=True)
    from rlhf_cli import verbs

    runner: dict[str, Any] = {"eval": verbs.evaluate, "generate": verbs.generate, "score": verbs.score}
    return runner[verb](cfg)


# ---- where the ranks start ----


class Local:
    """This machine, or each of `hardware.nodes`. Where srun started several of this process, each of them is a rank."""

    def hardware(self, cfg: Any, *, here: bool = True) -> dict[str, Any]:
        """What this machine has."""
        task = step.here()
        return step.hardware(cfg, task) if task and task.world > 1 else resolve_hardware(cfg, here=here)

    def __call__(self, cfg: Any, freeze: Callable[[], RunDir]) -> int:
        """Run to the end."""
        task = step.here()
        if task is not None and (task.world > 1 or cfg.hardware.processes == 1):
            if "SUBMITIT_EXECUTOR" not in os.environ:  # whose own command would be noted otherwise
                os.environ.setdefault("RLHF_ARGV", step.argv())
            step.warn_of_waiting(task)
            cfg.run.name = cfg.run.name or base_name(cfg.names, f"job{task.job}")  # a requeued job finds it again
            cfg.resume = repeated(cfg, task)
            return step.run(cfg, task, freeze, Stop())
        place = place_of(cfg)
        if place.node_rank:
            return follow(RunDir(Path(cfg.run.dir) / cfg.run.name), cfg, place)
        rundir = freeze()
        with _released(rundir):
            (rundir.path / "job.json").unlink(missing_ok=True)  # no job writes this run from here on
            return start(rundir, cfg.hardware, place)

    def script(self, cfg: Any) -> str:
        """Nothing waits in a queue."""
        return ""
