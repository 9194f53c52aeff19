"""A run is a directory: its layout, its one writer, its status, its frozen configuration and its name."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import sys
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TextIO

from rlhf_cli.errors import ConfigError
from rlhf_cli.record.files import write_json_atomic, write_text_atomic
from rlhf_cli.record.redact import redact

Status = Literal["running", "finished", "failed", "preempted"]
NAMED = ("experiment", "algo", "reward", "model")  # groups whose choices make a run's name
PREPASS = "prepass.jsonl"
MOMENT = 0.3  # seconds for which `writer()` elsewhere may hold a lock
_OPEN: weakref.WeakSet[RunDir] = weakref.WeakSet()


class RunDir:
    """The files of one run under `path`. Nothing is created before `create()`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock: TextIO | None = None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def prepass(self) -> Path:
        """The responses of the initial policy, where the run draws some before its first step."""
        return self.path / PREPASS

    @property
    def silent(self) -> Path:
        """A file that any rank writes when it is silent, so that all ranks write their stacks."""
        return self.logs / "silent"

    @property
    def claimed(self) -> bool:
        """Whether this object is the one writer."""
        return self._lock is not None

    def error(self, rank: int) -> Path:
        """Where a rank writes why it failed; the last line says it."""
        return self.logs / f"rank-{rank}.error"

    def errors(self) -> dict[Path, int]:
        """The error file of every rank that failed, with its time in nanoseconds."""
        found = {}
        for path in self.logs.glob("rank-*.error"):
            with suppress(FileNotFoundError):
                found[path] = path.stat().st_mtime_ns
        return found

    def stacks(self, rank: int) -> Path:
        """Where a rank writes its Python stacks when any rank is silent."""
        return self.logs / f"rank-{rank}.stacks"

    def create(self) -> RunDir:
        """Make the folders; existing ones stay."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
        except OSError as e:
            raise _cannot_write(self.path, e) from None
        return self

    def write_json(self, name: str, obj: Any) -> None:
        """Write `name` inside the run, whole or not at all."""
        write_json_atomic(self.path / name, obj)

    def save_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml, without secrets. `config` is a plain container, resolved."""
        import yaml

        text = yaml.safe_dump(redact(config), sort_keys=False, allow_unicode=True, width=120)
        write_text_atomic(self.path / "config.yaml", text)

    def set_status(self, status: Status, *, phase: str = "", step: int = 0, reason: str = "") -> None:
        """Write status.json: where the run is, and for an ended one why."""
        where = {"status": status, "phase": phase, "step": step, "reason": reason}
        self.write_json("status.json", where | {"time": now(), **_whoami()})

    def status(self) -> dict[str, Any]:
        """What status.json says; empty for a run that never started."""
        path = self.path / "status.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def job(self) -> dict[str, Any]:
        """What job.json says of the cluster job that writes this run; empty for a run of this machine, and for a copy of one."""
        path = self.path / "job.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        noted, here = found.get("folder"), self._folder() if found else {}
        # a run that was moved keeps its inode, and where another machine sees other inodes it keeps its path
        return {} if noted and all(noted.get(k) != here[k] for k in here) else found

    def set_job(self, job: str) -> None:
        """Note the cluster job that writes this run from here on."""
        self.write_json("job.json", {"job": job, "time": now(), "folder": self._folder()})

    def _folder(self) -> dict[str, Any]:
        """What tells this folder from a copy of it."""
        return {"path": str(self.path.resolve()), "inode": self.path.stat().st_ino}

    def said(self) -> str:
        """How the run stands by its own word; empty before it speaks, as while a job waits that follows the one that wrote the status."""
        status, job = self.status(), self.job()
        return str(status.get("status", "")) if not job or status.get("job") == job.get("job") else ""

    def claim(self, wait: float = MOMENT) -> str | None:
        """Become the one writer until `release()` or the end of this process, however it ends.

        `wait`: seconds that another writer gets to let go. Where the file system has no locks it says so, and returns that. Raises
        ConfigError naming the writer that stays.
        """
        import fcntl

        assert self._lock is None, "claimed twice"
        try:
            lock = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as e:
            raise _cannot_write(self.path, e) from None
        problem = _flock(lock, fcntl.LOCK_EX, wait)
        if problem == errno.EWOULDBLOCK:
            holder = _holder(lock)
            lock.close()
            raise busy(self, holder)
        lock.truncate(0)
        lock.write(json.dumps(_whoami() | {"born": born(os.getpid()), "time": now()}))
        lock.flush()
        self._lock = lock
        _OPEN.add(self)
        if not problem:
            return None
        note = f"{self.path}: this file system has no locks; do not start it twice"
        print(f"rlhf: warning: {note}", file=sys.stderr, flush=True)
        return note

    def release(self) -> None:
        """Let another process write this run."""
        if self._lock is not None:
            # Whoever comes next must not be taken for this process before it has written its name.
            with suppress(OSError):  # a full disk
                self._lock.truncate(0)
            self._forget()

    def _forget(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def writer(self) -> str | None:
        """Who writes this run now ("pid 7 on host a"), or None."""
        import fcntl

        path = self.path / ".lock"
        if not path.exists():
            return None
        with path.open("r", encoding="utf-8") as lock:
            return _holder(lock) if _flock(lock, fcntl.LOCK_SH) == errno.EWOULDBLOCK else None


def busy(run: RunDir, holder: str) -> ConfigError:
    """What to say when another writer has the run."""
    return ConfigError(
        f"run {run.name} is being written by {holder}; stop it (rlhf cancel {run.path}), or choose another run.name"
    )


def name_run(parent: Path | str, names: Mapping[str, str], when: float | None = None) -> str:
    """A unique name such as `grpo-bleu-smollm2_135m-20261123-143000`, reserved by creating its folder in `parent`."""
    base = base_name(names, time.strftime("%Y%m%d-%H%M%S", time.localtime(when)))
    for i in range(1, 10_000):
        name = base if i == 1 else f"{base}-{i}"
        try:
            (Path(parent) / name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as e:
            raise _cannot_write(parent, e) from None
        return name
    raise ConfigError(f"run.dir: {parent} holds 9999 runs named {base}; set run.name=NAME")


def base_name(names: Mapping[str, str], stamp: str) -> str:
    """The choices that name a run, and what tells it from others."""
    chosen = [_slug(names[g]) for g in NAMED if names.get(g)]
    return "-".join([*[c for c in chosen if c], stamp])


def born(pid: int) -> int:
    """When a process began, in ticks since the machine did, which tells it from a later one of the same number; -1: unknown or over."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return -1
    state, *fields = text.rpartition(")")[2].split()
    return -1 if state == "Z" else int(fields[18])


def now() -> str:
    """The local time with its offset, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _cannot_write(path: Path | str, e: OSError) -> ConfigError:
    return ConfigError(f"run.dir: cannot write {path}: {e.strerror}; choose another folder with run.dir=DIR")


def _slug(choice: str) -> str:
    """`[bleu, length]` becomes `bleu+length`; what file systems dislike becomes `_`."""
    text = re.sub(r"\s*,\s*", "+", choice.strip("[] "))
    return re.sub(r"[^A-Za-z0-9+._]+", "_", text).strip("._")[:40]


def _whoami() -> dict[str, Any]:
    job = os.environ.get("RLHF_JOB")  # the cluster job that this process belongs to
    return {"pid": os.getpid(), "host": socket.gethostname()} | ({"job": job} if job else {})


def _flock(lock: TextIO, kind: int, wait: float = MOMENT) -> int:
    """Try to lock, for `wait` seconds. Returns 0 or the errno."""
    import fcntl

    for _ in range(round(10 * wait) + 1):
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            return 0
        except BlockingIOError:
            time.sleep(0.1)
        except OSError as e:
            return e.errno
    return errno.EWOULDBLOCK


def _holder(lock: TextIO) -> str:
    lock.seek(0)
    try:
        who = json.loads(lock.read())
        return f"pid {who['pid']} on host {who['host']}"
    except (ValueError, KeyError):
        return "another process"


def _forget_locks() -> None:
    """A forked child must not keep its parent's run locked after the parent died."""
    for run in list(_OPEN):
        run._forget()


os.register_at_fork(after_in_child=_forget_locks)
