"""Several ranks under DeepSpeed's launcher: started, told to stop, ended together, and explained by the first that failed."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.exits import FAILED, INTERRUPTED, STOPPED
from rlhf_cli.launch.child import bound
from rlhf_cli.launch.nodes import Others, Place
from rlhf_cli.launch.stop import Stop
from rlhf_cli.record.rundir import RunDir

POLL = 0.2  # seconds
GRACE = 5.0  # seconds that ranks get to end by themselves after one on another machine failed
# What a rank says when another one is gone: never the cause.
CONSEQUENCES = ("DistBackendError", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Gloo")


def run_ranks(rundir: RunDir, hardware: Any, place: Place, stop: Stop) -> int:
    """Run this machine's ranks to their end. Returns the exit status; raises what the first failing rank said."""
    mine = range(place.node_rank * hardware.processes, (place.node_rank + 1) * hardware.processes)
    for rank in mine:  # what an earlier try left
        rundir.error(rank).unlink(missing_ok=True)
        rundir.stacks(rank).unlink(missing_ok=True)
    rundir.silent.unlink(missing_ok=True)
    before, stale = rundir.status(), rundir.errors().items()  # what other machines will clear when they start
    with (
        (rundir.logs / f"launcher{place.suffix}.log").open("a", encoding="utf-8") as log,
        Others(rundir, place) as others,
    ):
        ranks = subprocess.Popen(
            bound(_command(rundir, hardware, place), signal.SIGKILL), env=_environment(hardware, place), stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = _wait(ranks, stop, lambda: others.failed() or bool(rundir.errors().items() - stale))
        except KeyboardInterrupt:
            _kill(ranks)
            _set_failed(rundir, place, "interrupted twice")
            return INTERRUPTED
        finally:
            _kill(ranks)
    return _explain(rundir, place, code, before, others.problem, dict(rundir.errors().items() - stale))


def _command(rundir: RunDir, hardware: Any, place: Place) -> list[str]:
    host, _, port = place.master.partition(":")
    world = {f"node-{n}": list(range(hardware.processes)) for n in range(place.nodes)}
    coded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    return [
        sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={coded}", f"--node_rank={place.node_rank}",
        f"--master_addr={host}", f"--master_port={port}", "--no_local_rank", "--log_level=critical", "--module",
        "rlhf_cli.launch.rank", str(rundir.path),
    ]  # fmt: skip


def _environment(hardware: Any, place: Place) -> dict[str, str]:
    held = (
        {"RLHF_WRITER": str(os.getpid())} if place.node_rank == 0 else {}
    )  # the launcher holds the run's lock for rank 0
    return {"DS_ACCELERATOR": hardware.device, **os.environ, **held}


def _wait(ranks: subprocess.Popen[bytes], stop: Stop, failed: Callable[[], bool]) -> int:
    """Wait for the end, passing a signal on to every rank once, and ending the ranks some seconds after any rank failed."""
    told: set[int] = set()
    doomed = 0.0
    while (code := ranks.poll()) is None:
        if stop.signal:
            told |= _tell(ranks.pid, signal.Signals[stop.signal], told)
        if not doomed and failed():
            doomed = time.monotonic() + GRACE
        if doomed and time.monotonic() > doomed:
            _kill(ranks)
        time.sleep(POLL)
    return code


def _tell(launcher: int, number: int, told: set[int]) -> set[int]:
    """Send a signal to the ranks, the children of their keepers; the launcher itself would kill them at once."""
    ranks = {pid for keeper in children(launcher) for pid in children(keeper)} - told
    for pid in ranks:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    return ranks


def _kill(ranks: subprocess.Popen[bytes]) -> None:
    """End whatever is left of the ranks and of what they started."""
    with suppress(ProcessLookupError):
        os.killpg(ranks.pid, signal.SIGKILL)
    ranks.wait()


def children(pid: int) -> list[int]:
    """Direct children of a process."""
    import psutil

    try:
        return [p.pid for p in psutil.Process(pid).children()]
    except psutil.Error:
        return []


# -- why it ended ------------------------------------------------------------------------------------------------------


def _explain(
    rundir: RunDir, place: Place, code: int, before: Mapping[str, Any], problem: str, errors: Mapping[Path, int]
) -> int:
    """The exit status, or the first failing rank's error. `before`: the status when the ranks started."""
    status = rundir.status()
    if status.get("status") == "preempted" and status != before:
        return STOPPED
    if code == 0 and not problem:
        return 0
    silent, before_it = silence(rundir, errors)
    first = first_failure(before_it)
    if first is None:
        text = silent or problem or f"the ranks ended with status {code}; see {rundir.logs}/*.log"
        return _tell_user(rundir, place, text, STOPPED if silent else FAILED)
    rank, kind, text = first
    if kind in ("ConfigError", "GateError"):
        _set_failed(rundir, place, f"{kind}: {text}")
        refused = GateError if kind == "GateError" else ConfigError
        raise refused(text if text.startswith("rank ") else f"rank {rank}: {text}")
    if kind == "Killed":
        return _tell_user(rundir, place, f"rank {rank} {text}", FAILED)
    where = f"the traceback is in {rundir.error(rank)}"
    return _tell_user(rundir, place, f"rank {rank} failed: {kind}: {text}; {where}", FAILED)


def first_failure(errors: Mapping[Path, int]) -> tuple[int, str, str] | None:
    """(rank, class, message) of the rank that failed first; one that only lost its connection to another is never the cause."""
    found = []
    for path, when in errors.items():
        lines = path.read_text(encoding="utf-8").strip().splitlines()
        frames = [i for i, x in enumerate(lines) if x.startswith("  ")]
        said = lines[frames[-1] + 1 :] if frames else lines[-1:]  # some messages have several lines
        last = " ".join(said or lines[-1:]) or "unknown: the file is empty"
        kind, _, text = last.partition(": ")
        rank = int(path.stem.removeprefix("rank-"))
        found.append((follows(last), when, rank, kind.rpartition(".")[2], text))
    return min(found)[2:] if found else None


def follows(message: str) -> bool:
    """Whether an error only says that another rank is gone."""
    return any(word in message for word in CONSEQUENCES)


def silence(rundir: RunDir, errors: Mapping[Path, int]) -> tuple[str, Mapping[Path, int]]:
    """What to say where a rank was silent, else nothing; and the errors that are not consequences of it.

    A rank that wakes up while it writes its stacks finds the others gone.
    """
    try:
        reason, since = rundir.silent.read_text(encoding="utf-8"), rundir.silent.stat().st_mtime_ns
    except FileNotFoundError:
        return "", errors
    return silenced(rundir, reason), {path: when for path, when in errors.items() if when < since}


def silenced(rundir: RunDir, reason: str) -> str:
    """A rank was silent: which one holds up the others, as far as the stacks tell, and where to look."""
    if not reason:
        return ""
    stacks = {p: p.read_text(encoding="utf-8") for p in sorted(rundir.logs.glob("rank-*.stacks"))}
    working = [p for p, text in stacks.items() if not _in_collective(text)]
    if len(working) == 1 and len(stacks) > 1:
        rank = working[0].stem.removeprefix("rank-")
        reason += f"; every rank but {rank} waits in a collective"
    return f"{reason}; stacks of every rank are in {rundir.logs}/rank-*.stacks"


def _in_collective(stacks: str) -> bool:
    """Whether the main thread, which faulthandler writes last, waits for other ranks; of several dumps the first counts."""
    dumps = [part for part in stacks.split("stacks of all threads:") if "most recent call first" in part]
    frames: list[str] = []
    for thread in dumps[0].split("\n\n") if dumps else []:
        _, *each = thread.split("(most recent call first):")
        frames = each[0].strip().splitlines() if each else frames
        if len(each) > 1:  # a keeper's dump, which has no headline, goes on without an empty line
            break
    return any("torch/distributed/" in line for line in frames[:4])


def _tell_user(rundir: RunDir, place: Place, text: str, code: int) -> int:
    _set_failed(rundir, place, text)
    print(f"rlhf: error: {' '.join(text.split())}; go on with: rlhf resume {rundir.path}", file=sys.stderr, flush=True)
    return code


def _set_failed(rundir: RunDir, place: Place, reason: str) -> None:
    """The status of a run whose ranks could not write it, or wrote a consequence."""
    if place.node_rank:
        return
    was = rundir.status()
    try:
        rundir.set_status("failed", phase=was.get("phase", ""), step=was.get("step", 0), reason=reason)
    except OSError:  # a full disk; the reason is on the terminal
        return
