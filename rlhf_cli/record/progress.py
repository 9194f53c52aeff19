"""What the terminal shows: a live display, or one plain line per step. Never raises, costs next to nothing."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

Row = Mapping[str, Any]
BETWEEN = ("load", "prepass", "evaluate", "checkpoint", "export")  # phases that are not part of a step
WINDOW = 20  # steps behind the median step time
SPARKS = "▁▂▃▄▅▆▇█"


class Display(Protocol):
    """Something that shows a run."""

    def resume(self, step: int) -> None: ...
    def phase(self, name: str) -> None: ...
    def step(self, step: int, row: Row) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class Progress:
    """Shows a run on `stream`; an error of the display turns it off and nothing else.

    Args:
        name: the run's name.
        steps: steps of the whole run.
        stream: where to show it; a terminal gets the live display.
        log: gets every line too.
    """

    def __init__(self, name: str, steps: int, stream: TextIO | None = None, log: TextIO | None = None) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.display: Display | None = None
        self.log = Plain(steps, log) if log is not None else None
        self._try(lambda: self._open(name, steps))

    def phase(self, name: str) -> None:
        """The run enters a phase; empty: it left one."""
        self._show(lambda d: d.phase(name))

    def resume(self, step: int) -> None:
        """The run begins after this many steps."""
        self._show(lambda d: d.resume(step))

    def step(self, step: int, row: Row) -> None:
        """A step is done; `step` counts from 1."""
        self._show(lambda d: d.step(step, row))

    def evaluation(self, step: int, row: Row) -> None:
        """A line with the results of an evaluation."""
        numbers = {k.removeprefix("eval/"): v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        self.note(f"evaluation at step {step}: " + "  ".join(f"{k} {number(v)}" for k, v in numbers.items()))

    def note(self, text: str) -> None:
        """A line that stays."""
        self._show(lambda d: d.note(text))
        if self.display is None:
            self._try(lambda: print(text, file=self.stream, flush=True))

    def line(self, text: str) -> None:
        """A line that the program printed, and that is in the log already."""
        display = self.display
        if display is None or not self._try(lambda: display.note(text)):
            self._try(lambda: print(text, file=self.stream, flush=True))

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        self._show(lambda d: d.close())

    def _open(self, name: str, steps: int) -> None:
        able = os.environ.get("TERM", "dumb") != "dumb" and "utf" in (self.stream.encoding or "").lower()
        live = able and self.stream.isatty()
        self.display = Live(name, steps, self.stream) if live else Plain(steps, self.stream)

    def _show(self, use: Callable[[Display], None]) -> None:
        display, log = self.display, self.log
        if log is not None:
            self._try(lambda: use(log))
        if display is not None and not self._try(lambda: use(display)):
            self.display = None

    def _try(self, use: Callable[[], None]) -> bool:
        try:
            use()
        except Exception:
            return False
        return True


class Plain:
    """One line per step, without control codes."""

    def __init__(self, steps: int, stream: TextIO) -> None:
        self.stream = stream
        self.pace = Pace(steps)

    def resume(self, step: int) -> None:
        """Count from here."""
        self.pace.step = step

    def phase(self, name: str) -> None:
        """Not shown."""

    def step(self, step: int, row: Row) -> None:
        """The step's line."""
        self.pace.add(step, row)
        width = len(str(self.pace.steps))
        numbers = [f"{k} {v:<9}" for k, v in key_numbers(row)]
        left = self.pace.left()
        rest = [f"left {duration(left)}"] if left is not None else []
        self.note("  ".join([f"step {step:{width}d}/{self.pace.steps}", *numbers, *rates(row), *rest]).rstrip())

    def note(self, text: str) -> None:
        """A line."""
        print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Nothing to give back."""


class Live:
    """Five calm lines that stay at the bottom of the terminal."""

    def __init__(self, name: str, steps: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self.name = name
        self.pace = Pace(steps)
        self.row: Row = {}
        self.phases: dict[str, float] = {}  # seconds of the last time
        self.active = ("", time.monotonic())
        self.rewards: deque[float] = deque(maxlen=24)
        # The log takes what the process prints, and shows it here line by line; nothing is left to redirect.
        console = Console(file=stream)
        self.live = RichLive(self, console=console, refresh_per_second=4, redirect_stdout=False, redirect_stderr=False)
        self.live.start()

    def resume(self, step: int) -> None:
        """Count from here."""
        self.pace.step = step

    def phase(self, name: str) -> None:
        """Mark the phase as the active one."""
        before, since = self.active
        if before and before not in BETWEEN:
            self.phases[before] = time.monotonic() - since
        if name and name not in BETWEEN:
            self.phases.setdefault(name, 0.0)
        self.active = (name, time.monotonic())

    def step(self, step: int, row: Row) -> None:
        """Take over the numbers of a step."""
        self.pace.add(step, row)
        self.row = row
        if isinstance(row.get("score/mean"), float):
            self.rewards.append(row["score/mean"])

    def note(self, text: str) -> None:
        """A line above the display."""
        self.live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Draw once more and stop."""
        self.phase("")
        self.live.stop()

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        try:
            return Group(Text(""), self._head(), self._bar(), self._phases(), self._numbers(), self._rates())
        except Exception:  # drawn by a thread: an error here would end it with a traceback in the display
            return Text("")

    def _head(self) -> Any:
        from rich.text import Text

        return Text(f" {self.name}", style="bold", overflow="ellipsis", no_wrap=True)

    def _bar(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        steps, left = self.pace.steps, self.pace.left()
        grid = Table.grid(padding=(0, 2, 0, 0))
        bar = ProgressBar(max(steps, 1), self.pace.step, width=40, complete_style="cyan", finished_style="green")
        count = Text.assemble(("step ", "dim"), f"{self.pace.step:{len(str(steps))}d}/{steps}")
        rest = Text.assemble(("left ", "dim"), duration(left)) if left is not None else Text("")
        grid.add_row(Text(""), bar, count, rest)
        return grid

    def _phases(self) -> Any:
        from rich.text import Text

        text = Text(" ", no_wrap=True, overflow="ellipsis")
        active, since = self.active
        aside = {active: 0.0} if active in BETWEEN else {}
        for name, seconds in (self.phases | aside).items():
            now = name == active
            shown = time.monotonic() - since if now else seconds
            text.append(" ● " if now else " · ", style="cyan" if now else "dim")
            text.append(f"{name} {shown:5.1f} s  ", style="cyan" if now else "dim")
        return text

    def _numbers(self) -> Any:
        from rich.text import Text

        text = Text(" ", no_wrap=True, overflow="ellipsis")
        for label, value in key_numbers(self.row):
            text.append(f" {label} ", style="dim").append(f"{value:<9}", style="bold" if label == "reward" else "")
            if label == "reward":
                text.append(f"{sparkline(self.rewards):<{self.rewards.maxlen}}  ", style="cyan")
        return text

    def _rates(self) -> Any:
        from rich.text import Text

        return Text("  " + "   ".join(rates(self.row)), style="dim", no_wrap=True, overflow="ellipsis")


class Pace:
    """How far, and how long still: the moving median of step times, plus the mean of what lies between steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.step = 0
        self.times: deque[float] = deque(maxlen=WINDOW)
        self.between: list[float] = []

    def add(self, step: int, row: Row) -> None:
        """A step is done."""
        self.step = step
        if self.times:  # what came before the first step (loading, the first evaluation) does not come again
            self.between.append(float(row.get("time/between", 0.0)))
        self.times.append(float(row.get("time/step", 0.0)))

    def left(self) -> float | None:
        """Seconds still to go, or None while unknown."""
        if not self.times or self.step >= self.steps:
            return None
        return (self.steps - self.step) * (statistics.median(self.times) + statistics.fmean(self.between or [0.0]))


def key_numbers(row: Row) -> list[tuple[str, str]]:
    """The few numbers that tell how a run goes: (label, text), in one order."""
    loss = next((k for k in ("policy/loss", *row) if k in row and k.endswith("/loss")), "")
    kl = next((k for k in ("policy/kl", *row) if k in row and k.endswith("/kl")), "")
    wanted = {"reward": "score/mean", "loss": loss, "kl": kl, "length": "response/length"}
    found = {label: row.get(key) for label, key in wanted.items()}
    unit = {"length": " tok"}
    return [
        (k, (f"{v:.1f}" if k == "length" else number(v)) + unit.get(k, "")) for k, v in found.items() if v is not None
    ]


def rates(row: Row) -> list[str]:
    """Speed, with units."""
    wanted = {"time/step": "s/step", "time/rows_per_s": "rows/s", "time/tokens_per_s": "tok/s"}
    return [f"{three(row[k]):>5} {unit}" for k, unit in wanted.items() if row.get(k)]


def number(x: float) -> str:
    """Four decimals, or an exponent where they would hide the value."""
    if isinstance(x, int):
        return str(x)
    return f"{x:.4f}" if x == 0 or 1e-3 <= abs(x) < 1e4 else f"{x:.2e}"


def three(x: float) -> str:
    """About three digits: 0.123, 1.23, 12.3, 1234."""
    return f"{x:.{max(0, 2 - len(str(int(abs(x)))) + (1 if abs(x) >= 1 else 2))}f}"


def duration(seconds: float) -> str:
    """`42 s`, `6 min 12 s`, `3 h 05 min`, `2 d 4 h`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min" if s < 86400 else f"{s // 86400} d {s % 86400 // 3600} h"


def sparkline(values: deque[float]) -> str:
    """One block per value, from the lowest to the highest."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(SPARKS[min(int((v - low) / span * len(SPARKS)), len(SPARKS) - 1)] for v in values)
