"""What the terminal shows of a sweep: lines that stay, and below them one line per running point."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_cli.record.metrics import tail
from rlhf_cli.record.rundir import RunDir
from rlhf_cli.report.compare import duration


class Board:
    """`say` prints a line; on a terminal `show` keeps the running points up to date."""

    def __init__(self) -> None:
        self.live: Any = None
        self._lines: list[str] = []
        if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            from rich.live import Live

            self.live = Live(get_renderable=self._renderable, refresh_per_second=2, transient=True)
            self.live.start()

    def say(self, text: str) -> None:
        if self.live is None:
            print(text, flush=True)
        else:
            self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, running: Mapping[str, tuple[Path, float]]) -> None:
        """`running`: point -> its folder and the seconds it has taken."""
        if self.live is not None:
            self._lines = [f"  {name}  {progress(path)}, {duration(s)}" for name, (path, s) in running.items()]

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _renderable(self) -> Any:
        from rich.text import Text

        return Text("\n".join(self._lines), no_wrap=True, overflow="ellipsis")


def progress(path: Path) -> str:
    """`step 12, score 0.213`, or the phase before the first step."""
    rows = tail(path / "metrics.jsonl")
    if rows:
        row = rows[-1]
        score = row.get("score/mean")
        return f"step {row['step']}" + (f", score {score:.3f}" if isinstance(score, float) else "")
    return RunDir(path).status().get("phase") or "starts"
