"""Mirrors of the local record. A tracker may fail at any time without harm: it warns once and the run goes on."""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import socket
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from rlhf_cli.record.files import strict
from rlhf_cli.record.metrics import read
from rlhf_cli.record.redact import redact


@dataclass(frozen=True)
class Start:
    """What a tracker needs to begin: folder, config, the step the run resumes from (0: none), its own saved state."""

    path: Path
    config: Mapping[str, Any]
    step: int
    state: Mapping[str, Any]
    note: Callable[[str], None]


class Tracker(Protocol):
    """Receives every row once, steps in order. `state` goes into checkpoints and comes back in `Start.state`."""

    def start(self, run: Start) -> None: ...
    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def finish(self, status: str) -> None: ...
    def state(self) -> dict[str, Any]: ...


class Mirror:
    """All trackers of a run as one, each guarded: the first error of one prints a line and turns it off."""

    def __init__(self, trackers: Mapping[str, Tracker], note: Callable[[str], None]) -> None:
        self.trackers = dict(trackers)
        self.note = note
        self._states: dict[str, dict[str, Any]] = {}

    def start(self, path: Path, config: Mapping[str, Any], step: int, states: Mapping[str, Any]) -> None:
        """Start each one with its saved state; a state is kept for the next checkpoint even if its tracker fails."""
        self._states = {k: dict(v) for k, v in states.items()}
        for name in list(self.trackers):
            run = Start(path, redact(config), step, self._states.get(name, {}), self.note)
            self._guarded(name, lambda t, run=run: t.start(run))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Mirror the finite numbers of a row."""
        row = numbers(values)
        for name in list(self.trackers):
            self._guarded(name, lambda t: t.log(step, row))

    def finish(self, status: str) -> None:
        """Close each one."""
        for name in list(self.trackers):
            self._guarded(name, lambda t: t.finish(status))

    def state(self) -> dict[str, Any]:
        """Each tracker's state, for the checkpoint."""
        for name in list(self.trackers):
            self._guarded(name, lambda t, name=name: self._states.__setitem__(name, t.state()))
        return dict(self._states)

    def _guarded(self, name: str, use: Callable[[Tracker], Any]) -> None:
        try:
            use(self.trackers[name])
        except Exception as e:
            del self.trackers[name]
            what = (str(e).strip().splitlines() or [""])[0]
            self.note(f"warning: tracker {name} is off from here on, the run goes on: {type(e).__name__}: {what}")


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row."""
    return {k: v for k, v in strict(values).items() if isinstance(v, int | float) and k != "step"}


def recorded(run: Start, after: int) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, numbers) of the run's own files, of steps after `after` up to the one that it resumes from."""
    rows: dict[int, dict[str, float]] = {}
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        for row in read(run.path / name):
            if after < row["step"] <= run.step:
                rows.setdefault(row["step"], {}).update(numbers(row))
    yield from sorted(rows.items())


class WandB:
    """Weights & Biases, in the run's folder. Without a key, or without network, it writes an offline run there.

    Args:
        mode: offline (nothing is sent) | online (needs WANDB_API_KEY or a netrc entry).
        project: name of the project.
        entity: user or team; empty: the key's default.
    """

    def __init__(self, *, mode: Literal["offline", "online"], project: str, entity: str | None) -> None:
        self.mode = mode
        self.project = project
        self.entity = entity
        self._run: Any = None
        self._id = ""
        self._name = ""
        self._mark = Path()
        self._floor = -1  # highest step sent before this start; a repeated stretch is equal and is not sent again
        self._last = -1

    def start(self, run: Start) -> None:
        """Begin, or go on with the same id and the rows that it lacks."""
        mode = self._mode(run.note)
        os.environ["WANDB_SILENT"] = "true"
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # otherwise reports go out even offline
        self._name = run.path.resolve().name
        self._mark = run.path / "wandb" / "mirror.json"
        self._recall(run)
        try:
            if mode == "online":
                _reach(_server())
            self._run = self._init(run, mode)
        except Exception as e:
            if mode == "offline":
                raise
            first = (str(e).splitlines() or [""])[0]
            send = f"wandb sync {run.path}/wandb/offline-run-*"
            run.note(f"W&B cannot be reached ({first}); writing offline, send it later: {send}")
            self._run = self._init(run, "offline")
        self._id = self._run.id
        self._floor = max(self._floor, int(self._run.step) - 1)
        for step, row in recorded(run, self._floor):  # of a service that was ended by the signal that stopped the run
            self.log(step, row)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send a row; evaluation of the newest step joins that step's row."""
        if step <= self._floor or step < self._last:
            return
        self._run.log(dict(values), step=step)
        self._last = step
        self._mark.write_text(json.dumps(self.state()), encoding="utf-8")

    def finish(self, status: str) -> None:
        """Close; wait at most `finish_timeout` for the upload."""
        self._run.finish(exit_code=0 if status in ("finished", "preempted") else 1)

    def state(self) -> dict[str, Any]:
        """The id, so that a resumed run goes on in the same place."""
        return {"id": self._id, "last": max(self._last, self._floor), "run": self._name}

    def _mode(self, note: Callable[[str], None]) -> str:
        if self.mode == "offline" or os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
            return "offline"
        if not has_key():
            note("W&B has no key (WANDB_API_KEY, or `wandb login`); writing offline")
            return "offline"
        return "online"

    def _recall(self, run: Start) -> None:
        """Id and highest step from the folder, else from the checkpoint if that is this run's."""
        kept: Mapping[str, Any] = run.state if run.state.get("run") == self._name else {}
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(self._mark.read_text(encoding="utf-8"))
        self._id = str(kept.get("id", ""))
        self._floor = int(kept.get("last", -1))

    def _init(self, run: Start, mode: str) -> Any:
        import wandb

        wandb.teardown()  # a failed online start would otherwise hold the id
        quiet = {"silent": True, "quiet": True, "console": "off"}
        quiet |= {"show_info": False, "show_warnings": False, "show_errors": False}
        closed = {
            "x_disable_meta": True,
            "x_disable_stats": True,
            "x_save_requirements": False,
        }  # argv may hold secrets
        closed |= {"disable_git": True, "disable_code": True, "save_code": False}
        limits = {"finish_timeout": 60.0, "init_timeout": 30.0}
        known = wandb.Settings.model_fields  # older releases lack some
        settings = wandb.Settings(**{k: v for k, v in (quiet | closed | limits).items() if k in known})
        (run.path / "wandb").mkdir(exist_ok=True)
        return wandb.init(
            dir=str(run.path),
            project=self.project,
            entity=self.entity,
            name=self._name,
            config=dict(run.config),
            id=self._id or None,
            resume="allow" if self._id and mode == "online" else None,
            mode=mode,
            settings=settings,
        )


class TensorBoard:
    """TensorBoard event files in the run's folder `tensorboard`."""

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, run: Start) -> None:
        """Begin; on resume, events of later steps are marked as void."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=run.step + 1, flush_secs=30)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write a row."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, status: str) -> None:
        """Close the file."""
        self._writer.close()

    def state(self) -> dict[str, Any]:
        """Nothing to keep; but what a checkpoint covers must be on the disk."""
        self._writer.flush()
        return {}


def has_key() -> bool:
    """Whether a W&B key is set, in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(_server()[0]) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _server() -> tuple[str, int]:
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    return url.hostname or "", url.port or (80 if url.scheme == "http" else 443)


def _reach(server: tuple[str, int]) -> None:
    """Fail within 5 s where there is no network; behind a proxy only W&B itself can tell."""
    if not urllib.request.getproxies():
        socket.create_connection(server, timeout=5).close()
