"""`rlhf runs`: every run below a folder, what it is doing, and what to type where that is nothing. Imports no torch."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ConfigError
from rlhf_cli.launch import queue
from rlhf_cli.launch.rank import obituary
from rlhf_cli.launch.ranks import first_failure, follows, silence
from rlhf_cli.record.metrics import tail
from rlhf_cli.record.progress import Pace, duration, number
from rlhf_cli.record.rundir import RunDir

ENDED = ("finished", "failed", "cancelled", "preempted", "dead", "lost", "not started")
NEVER = {  # reasons for which a job waits that no time will remove
    "PartitionTimeLimit": "its partition allows less time: sinfo; rlhf cancel {0}, then rlhf resume {0} launcher.time=TIME",
    "PartitionNodeLimit": "its partition allows other numbers of machines: sinfo; rlhf cancel {0}, then rlhf resume {0} launcher.nodes=N",
    "PartitionConfig": "its partition has no such machine: sinfo; rlhf cancel {0}, then rlhf resume {0} launcher.partition=NAME",
    "BadConstraints": "no machine is such: rlhf cancel {0}, then rlhf resume {0} launcher.constraint=null",
    "JobHeldUser": "held: scontrol release {1}",
    "JobHeldAdmin": "held by an administrator",
}
FRESH = 60.0  # seconds: a rank's heartbeat is written every 10
RAISED = re.compile(r"rlhf: error: |[\w.]+(?:Error|Exception): ")
STARTED = re.compile(r"submitit INFO .* Starting with JobEnvironment")
TASK_ENDED = re.compile(r"srun: error: \S+: tasks? (?P<rank>\d+)[\d,-]*: (?P<how>.+)")
EVERY = 5.0  # seconds between two looks at the queue: it is shared by everyone
SPARE = ("left", "age", "job", "reward", "step")  # columns that a narrow terminal does without, first to go first


@dataclass(frozen=True)
class Seen:
    """A run as it stands."""

    path: Path
    status: str
    note: str = ""  # why, or what to type
    step: int = 0
    steps: int = 0
    reward: float | None = None
    job: str = ""
    created: float = 0.0  # seconds since 1970
    left: float | None = None  # seconds


def find(folder: Path) -> Iterator[Path]:
    """The run directories at or below a folder, points of sweeps too."""
    if (folder / "config.yaml").exists() and (folder / "logs").is_dir():
        yield folder
        return
    with os.scandir(folder) as entries:
        inner = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith("."))
    for name in inner:
        yield from find(folder / name)


def look(folder: Path) -> list[Seen]:
    """Every run below `folder`, newest first."""
    if not folder.is_dir():
        raise ConfigError(f"runs: no folder {folder} here; type rlhf runs DIR, or rlhf train to make one")
    paths = list(find(folder))
    jobs = queue.jobs(job for p in paths if (job := RunDir(p).job().get("job")))
    return sorted((see(p, jobs) for p in paths), key=lambda s: s.created, reverse=True)


def see(path: Path, jobs: Mapping[str, queue.Job] | None) -> Seen:
    """One run; `jobs`: what the queue shows, None where it cannot be asked."""
    rundir = RunDir(path)
    status, note = state(rundir, jobs)
    rows = tail(path / "metrics.jsonl")
    steps = re.search(r"^steps: (\d+)", (path / "config.yaml").read_text(encoding="utf-8"), re.M)
    pace = Pace(int(steps[1]) if steps else 0)
    for row in rows:
        pace.add(row["step"], row)
    scored = [r["score/mean"] for r in rows if r.get("score/mean") is not None]
    scored = scored or [r["eval/reward"] for r in tail(path / "evaluations.jsonl") if r.get("eval/reward") is not None]
    first = next((p for p in (path / "plan.txt", path / "config.yaml") if p.exists()), path)
    return Seen(
        path,
        status,
        note,
        pace.step,
        pace.steps,
        scored[-1] if scored else None,
        str(rundir.job().get("job", "")),
        first.stat().st_mtime,
        pace.left() if status == "running" else None,
    )


# ---- what a run is doing ----


def state(rundir: RunDir, jobs: Mapping[str, queue.Job] | None) -> tuple[str, str]:
    """(status, why or what to type). `jobs` as in `see`."""
    status, job = rundir.status(), rundir.job()
    said, why = str(status.get("status", "")), str(status.get("reason", ""))
    again = f"rlhf resume {rundir.path}"
    if job:
        return _of_job(rundir, job, rundir.said(), jobs, again)
    if said == "running" or not said:
        alive = _alive(rundir, status)
        if alive:
            return said or "starting", ""
        return ("dead", again) if said else ("not started", "")
    return said, {"failed": why, "preempted": f"{why}; {again}"}.get(said, "")


def _of_job(
    rundir: RunDir, job: Mapping[str, Any], said: str, jobs: Mapping[str, queue.Job] | None, again: str
) -> tuple[str, str]:
    if jobs is None:
        return (
            (said, "") if said in ("finished", "failed") else (said or "submitted", "SLURM cannot be asked from here")
        )
    found = jobs.get(str(job["job"]))
    if found and found.waiting:
        what = NEVER.get(found.reason, "").format(rundir.path, job["job"])
        return ("requeued" if said else "queued"), found.reason + (what and f"; {what}")
    if said in ("finished", "failed"):  # the job may need a while to end
        return said, "" if said == "finished" else first_error(rundir) or str(rundir.status().get("reason", ""))
    if found and found.active and not job.get("cancelled"):
        ending = said == "running" or found.state == "COMPLETING"
        return (("stopping" if said == "preempted" else said or "starting") if ending else "starting"), ""
    if job.get("cancelled") or (found and found.state == "CANCELLED"):
        return ("cancelling", "") if found and found.active else ("cancelled", again)
    return _gone(rundir, said, found, again)


def _gone(rundir: RunDir, said: str, found: queue.Job | None, again: str) -> tuple[str, str]:
    """A job that left the queue, and its run did not say why."""
    wrong = first_error(rundir)
    if wrong or (found and found.state == "FAILED" and not said):
        return "failed", wrong or _last_word(rundir) or f"the job failed; rlhf logs {rundir.path}"
    if said == "preempted":
        return "preempted", again
    ended = f"its job ended as {found.state.lower()}; " if found else "its job is gone; "
    return "lost", ended + again


def first_error(rundir: RunDir) -> str:
    """What ended the rank that failed first, in one line; the others' errors follow from it."""
    silent, errors = silence(rundir, rundir.errors())
    first = first_failure(errors)
    if first is None and silent:  # whoever was killed after it was killed for it
        return silent
    if first is None or follows(f"{first[1]}: {first[2]}"):  # a rank that was killed could not write down why
        died = _died(rundir)
        if died:
            return died
    return "rank {}: {}: {}".format(*first) if first else ""


def _died(rundir: RunDir) -> str:
    """The rank of a job's last try that ended first, if a signal that SLURM did not send ended it, by srun's word."""
    lines = _lines(batch(rundir))
    lines = lines[max((i for i, line in enumerate(lines) if STARTED.match(line)), default=0) :]
    first = next((m for line in lines if (m := TASK_ENDED.match(line))), None)
    if first is None or first["how"].startswith("Exited") or any(" DUE TO " in line for line in lines):
        return ""
    known = {"Killed": obituary(signal.SIGKILL), "Out Of Memory": "was killed: out of memory; raise launcher.memory"}
    return f"rank {first['rank']} {known.get(first['how'], 'was killed ({how})'.format(**first.groupdict()))}"


def _last_word(rundir: RunDir) -> str:
    """Why a job ended before its ranks could say so: the last error in its output, else the last line that is not srun's."""
    lines = batch_lines(rundir)
    for fits in (RAISED.match, lambda line: not line.startswith(("srun: ", "slurmstepd")), lambda line: True):
        found = [line for line in lines if fits(line)]
        if found:
            return found[-1].removeprefix("rlhf: error: ").removeprefix("rlhf_cli.errors.")
    return ""


def batch_lines(rundir: RunDir) -> list[str]:
    """What the batch script and srun themselves printed, without submitit's notes and what rank 0 also logged."""
    known = set(_lines(rundir.logs / "rank-0.log"))
    lines = _lines(batch(rundir)) if rundir.job() else []
    return [line for line in lines if line.strip() and not line.startswith("submitit ") and line not in known]


def batch(rundir: RunDir) -> Path:
    """What the batch script and srun printed."""
    return rundir.logs / "slurm" / f"{rundir.job().get('job')}_0_log.out"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _alive(rundir: RunDir, status: Mapping[str, Any]) -> bool:
    """Whether somebody writes this run: the lock tells on this machine, the heartbeat on another."""
    if rundir.writer():
        return True
    if status.get("host") in (None, socket.gethostname()):
        return False
    beat = rundir.logs / "heartbeat-rank-0.json"
    return beat.exists() and time.time() - beat.stat().st_mtime < FRESH


# ---- the table ----


def table(seen: Sequence[Seen], folder: Path, width: int, now: float) -> list[str]:
    """Lines of at most `width` columns: the runs, then why some of them stand still."""
    if not seen:
        return [f"no runs in {folder}; rlhf train makes one"]
    rows = [_cells(s, folder, now) for s in seen]
    names = [c for c in rows[0] if any(r[c] for r in rows) or c in ("run", "status")]
    for spare in SPARE:
        if _total(rows, names, 16) > width and spare in names:
            names.remove(spare)
    sizes = {c: max(len(c), *(len(r[c]) for r in rows)) for c in names}
    sizes["run"] = max(8, min(sizes["run"], width - sum(sizes.values()) + sizes["run"] - 2 * (len(names) - 1)))
    lines = [_line({c: c for c in names}, sizes), *(_line(r, sizes) for r in rows)]
    notes = [f"{s.path}: {s.status}: {s.note}" for s in seen if s.note and s.status not in ("queued", "requeued")]
    notes += [f"{s.path}: {s.status} ({s.note})" for s in seen if s.note and s.status in ("queued", "requeued")]
    return [_clip(line, width) for line in [*lines, *([""] if notes else []), *notes]]


def _cells(s: Seen, folder: Path, now: float) -> dict[str, str]:
    inside = s.path.relative_to(folder) if s.path != folder and s.path.is_relative_to(folder) else s.path
    return {
        "run": str(inside),
        "status": s.status,
        "step": f"{s.step}/{s.steps}",
        "reward": "" if s.reward is None else number(s.reward),
        "job": s.job,
        "age": duration(max(0.0, now - s.created)),
        "left": "" if s.left is None else duration(s.left),
    }


def _total(rows: Iterable[Mapping[str, str]], names: Sequence[str], most: int) -> int:
    """Columns that the table needs when names of runs are cut to `most`."""
    size = {c: max(len(c), *(len(r[c]) for r in rows)) for c in names}
    return sum(min(size[c], most) if c == "run" else size[c] for c in names) + 2 * (len(names) - 1)


def _line(row: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    return "  ".join(_clip(row[c], size).ljust(size) for c, size in sizes.items()).rstrip()


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def show(folder: Path, watch: bool) -> None:
    """Print the table; with `watch`, again and again until Ctrl-C, in place where the output is a terminal."""
    while watch:
        if sys.stdout.isatty():
            _watch(folder)
            break
        _print(folder)
        print(flush=True)
        time.sleep(EVERY)
    _print(folder)


def _print(folder: Path) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    print("\n".join(table(look(folder), folder, width, time.time())), flush=True)


def _watch(folder: Path) -> None:
    """Until Ctrl-C, on the terminal's second screen, so that what was on the first one comes back."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    with Live(Text(""), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                size = console.size
                lines = [f"{folder}  {time.strftime('%H:%M:%S')}  (Ctrl-C ends)", ""]
                lines += table(look(folder), folder, size.width, time.time())
                shown = lines if len(lines) <= size.height else [*lines[: size.height - 1], "…"]
                text = "\n".join(_clip(line, size.width) for line in shown)
                live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
                time.sleep(EVERY)
        except KeyboardInterrupt:
            return
