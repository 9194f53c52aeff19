"""Append-only rows of numbers (metrics.jsonl) or texts (samples.jsonl) along one monotone axis, `step`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from rlhf_cli.errors import ConfigError
from rlhf_cli.record.files import plain, strict, sync_folder

TAIL = 1 << 16  # bytes at the end of a file, more than a row has


class Metrics:
    """One file of rows, key `step` first. Floats round-trip exactly; NaN and infinity are null, named in `nonfinite`.

    Args:
        path: the file; rows moved aside on resume go to NAME.discarded.jsonl beside it.
        unique: one row per step (metrics); otherwise a step may have many (samples).
    """

    def __init__(self, path: Path, *, unique: bool = True) -> None:
        self.path = path
        self.discarded = path.with_suffix(".discarded.jsonl")
        self.unique = unique
        self._file: TextIO | None = None
        self._last = -1

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row and hand it to the operating system, so that killing this process loses nothing."""
        step = row["step"]
        file = self._opened()
        assert step > self._last or (step == self._last and not self.unique), f"step {step} after step {self._last}"
        file.write(_line({"step": step} | dict(row)))
        file.flush()
        self._last = step

    def sync(self) -> None:
        """Wait until every row is on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def truncate_after(self, step: int) -> int:
        """Move rows with a later step to the discarded file, each with the number of this resume. Returns how many.

        They are copied before they are removed: a crash in between duplicates discarded rows and loses none.
        """
        self.close()
        if not self.path.exists():
            return 0
        rows = read(self.path)
        late = [r for r in rows if r["step"] > step]
        if late:
            resume = 1 + max((r["resume"] for r in read(self.discarded)), default=0)
            _trim(self.discarded)
            with self.discarded.open("a", encoding="utf-8", errors="backslashreplace") as f:
                f.writelines(_line({"step": r["step"], "resume": resume} | r) for r in late)
                f.flush()
                os.fsync(f.fileno())
            self._rewrite([line for line, r in _parsed(self.path) if r["step"] <= step])
        return len(late)

    def _rewrite(self, lines: list[str]) -> None:
        aside = self.path.with_suffix(".tmp")
        with aside.open("w", encoding="utf-8") as f:
            f.writelines(lines)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, self.path)
        sync_folder(self.path.parent)

    def _opened(self) -> TextIO:
        if self._file is None:
            _trim(self.path)
            self._last = max((r["step"] for r in read(self.path)), default=-1)
            self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")
        return self._file


def tail(path: Path) -> list[dict[str, Any]]:
    """The last whole rows of a file; a row that is being written is left out."""
    try:
        with path.open("rb") as f:
            f.seek(max(0, path.stat().st_size - TAIL))
            lines = f.read().decode("utf-8", errors="replace").split("\n")[:-1]
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut where the tail begins
            continue
    return rows


def read(path: Path) -> list[dict[str, Any]]:
    """Every row of the file, without a last line torn by a kill; none if there is no file."""
    return [row for _, row in _parsed(path)]


def _parsed(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line with its end, row). A line torn in the middle is damage, not a kill, and is an error."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no step")
        except ValueError:
            if i < len(lines) - 1:
                raise ConfigError(
                    f"{path}:{i + 1}: not a row of metrics; remove the line or restore the file"
                ) from None
            continue
        yield line + "\n", row


def _trim(path: Path) -> None:
    """Cut off a torn last line, and end a whole one, so that the next row starts on its own line."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        whole = "".join(line for line, _ in _parsed(path)).encode()
        with path.open("r+b") as f:
            f.write(whole)
            f.truncate(len(whole))


def _line(row: Mapping[str, Any]) -> str:
    row = {k: plain(v) for k, v in row.items()}
    bad = {k: str(v) for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    noted = row | ({"nonfinite": bad} if bad else {})
    return json.dumps(strict(noted), ensure_ascii=False, allow_nan=False) + "\n"
