"""sweep.json: what a sweep consists of and where each of its points stands, whole on the disk after every change."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ConfigError
from rlhf_cli.record.files import write_json_atomic
from rlhf_cli.record.redact import redact_text
from rlhf_cli.record.rundir import RunDir, now
from rlhf_cli.sweep.points import Command, Point

FILE = "sweep.json"
LOG = "logs/output.log"  # inside a point's run directory
# waiting: never started. interrupted: stopped or killed, goes on from its checkpoint. submitted: handed to a queue.
STATES = ("waiting", "running", "finished", "failed", "interrupted", "submitted", "pruned")


class Record:
    """The record of the sweep in `path`; `open` reads or begins it."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data = data

    @classmethod
    def open(cls, path: Path, command: Command, typed: str) -> Record:
        """The record that is there, or a new one. Refuses another sweep's folder."""
        file = path / FILE
        if not file.exists():
            made = {"name": path.name, "command": redact_text(typed), "definition": command.definition, "begun": now()}
            return cls(path, made | {"points": []})
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["definition"] != command.definition:
            gone = [w for w in data["definition"] if w not in command.definition]
            new = [w for w in command.definition if w not in data["definition"]]
            changed = " ".join([*(f"-{w}" for w in gone), *(f"+{w}" for w in new)])
            raise ConfigError(
                f"sweep {path} is defined otherwise ({changed}); choose another sweep.name, or continue it with: {data['command']}"
            )
        data["command"] = redact_text(typed)
        return cls(path, data)

    def rundir(self, name: str) -> RunDir:
        return RunDir(self.path / name)

    def names(self, *states: str) -> list[str]:
        """Points in one of these states."""
        return [e["name"] for e in self.data["points"] if e["status"] in states]

    def __getitem__(self, name: str) -> dict[str, Any]:
        return next(e for e in self.data["points"] if e["name"] == name)

    def add(self, points: Iterable[Point], commands: Iterable[Sequence[str]]) -> None:
        """Enter points that are not there yet."""
        known = {e["name"] for e in self.data["points"]}
        for p, words in zip(points, commands, strict=True):
            if p.name not in known:
                line = redact_text(" ".join(words))
                entry = {"name": p.name, "overrides": list(p.overrides), "status": "waiting", "tries": 0, "error": ""}
                self.data["points"].append(entry | {"seconds": 0.0, "command": line})
        self.save()

    def set(self, name: str, **fields: Any) -> None:
        """Change an entry and write the file."""
        self[name].update(fields)
        self.save()

    def save(self) -> None:
        write_json_atomic(self.path / FILE, self.data)

    def settle(self) -> None:
        """What the run directories say, where it is news: the last sweep may have been killed, a queue may have worked on."""
        for entry in self.data["points"]:
            run, noted = self.rundir(entry["name"]), entry["status"]
            entry["status"] = state(noted, run)
            if entry["status"] != noted:
                entry["error"] = reason(run, run.path / LOG, {}) if entry["status"] == "failed" else ""
        self.save()


def state(noted: str, run: RunDir) -> str:
    """Where a point stands, from what the record noted and what its run says."""
    said = run.said()
    if run.writer():  # not noted over what decides whether the point runs again without being asked for
        return noted if noted in ("pruned", "failed", "submitted") else "running"
    if said in ("finished", "failed"):
        return said
    if noted in ("pruned", "failed", "submitted"):  # a process that was killed leaves no word in its run
        return noted
    if noted == "running" and run.job() and not said:  # this process was killed after it had handed the point over
        return "submitted"
    return "waiting" if noted == "waiting" and not said else "interrupted"


def reason(run: RunDir, log: Path, before: Mapping[str, Any]) -> str:
    """Why a point failed, in one line: what its run wrote down since `before`, or the last line that its process printed."""
    status = run.status()
    if status != before and status.get("status") == "failed" and status.get("reason"):
        return " ".join(str(status["reason"]).split())[:300]
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    said = [x.strip() for x in lines if x.strip()]
    errors = [x for x in said if x.startswith("rlhf: error: ")]
    return (errors or said or ["it ended without a word"])[-1].removeprefix("rlhf: error: ")[:300]
