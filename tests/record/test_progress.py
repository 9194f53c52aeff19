"""Plain lines are exact text without control codes; a broken terminal never reaches the run."""

from __future__ import annotations

import io
import os
import pty
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from rlhf_cli.record.progress import Live, Pace, Progress, duration, number, sparkline, three

ROW: dict[str, Any] = {
    "score/mean": 0.31234, "policy/loss": -0.00012345, "policy/kl": 0.0123, "response/length": 31.44,
    "time/step": 2.0, "time/between": 0.0, "time/rows_per_s": 8.0, "time/tokens_per_s": 1234.5,
}  # fmt: skip


def test_plain_text() -> None:
    out = io.StringIO()
    p = Progress("run", 10, out)
    p.phase("rollout")
    p.evaluation(0, {"eval/reward": 0.25, "eval/rows": 96, "note": "x"})
    p.step(1, ROW)
    p.note("a note")
    p.step(2, {"policy/loss": 0.5})
    p.step(10, ROW | {"time/between": 3.0})
    p.close()
    numbers = "reward 0.3123     loss -1.23e-04  kl 0.0123     length 31.4 tok"
    speed = " 2.00 s/step   8.00 rows/s   1234 tok/s"
    assert out.getvalue().splitlines() == [
        "evaluation at step 0: reward 0.2500  rows 96",
        f"step  1/10  {numbers}   {speed}  left 18 s",  # 9 steps of 2 s
        "a note",
        "step  2/10  loss 0.5000     left 8 s",  # 8 steps; the median of 2 s and an unknown 0 s is 1 s
        f"step 10/10  {numbers}   {speed}",
    ]


def test_time_left_is_the_median_step_plus_what_lies_between() -> None:
    pace = Pace(10)
    assert pace.left() is None
    for step, (seconds, between) in enumerate(
        [(1, 500), (100, 2), (1, 4)], 1
    ):  # one slow step; the start does not count
        pace.add(step, {"time/step": seconds, "time/between": between})
    assert pace.left() == 7 * (1 + 3)  # 7 steps of median 1 s, mean of 2 and 4 s between
    pace.add(10, {"time/step": 1})
    assert pace.left() is None


def test_formats() -> None:
    assert [duration(s) for s in (0, 59.4, 60, 372, 3600, 90061)] == [
        "0 s", "59 s", "1 min 00 s", "6 min 12 s", "1 h 00 min", "1 d 1 h",
    ]  # fmt: skip
    assert [three(x) for x in (0.0123, 0.5, 1.234, 12.34, 123.4, 1234.5)] == [
        "0.012",
        "0.500",
        "1.23",
        "12.3",
        "123",
        "1234",
    ]
    assert [number(x) for x in (0.0, 0.5, -0.0005, 12345.6, 7)] == ["0.0000", "0.5000", "-5.00e-04", "1.23e+04", "7"]
    from collections import deque

    assert sparkline(deque([0.0, 0.5, 1.0])) == "▁▅█"
    assert sparkline(deque([1.0, 1.0])) == "▁▁"


class Broken(io.StringIO):
    def write(self, s: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("make", [Broken, lambda: None])
def test_it_never_raises(make: Callable[[], Any]) -> None:
    p = Progress("run", 2, make() or Broken())
    p.phase("rollout")
    p.step(1, ROW)
    p.step(2, {"score/mean": "no number", "time/step": None})
    p.note("x")
    p.close()


def test_a_row_it_cannot_show_turns_only_the_display_off() -> None:
    out = io.StringIO()
    p = Progress("run", 2, out)
    p.step(1, {"time/step": "broken"})
    p.note("still here")
    assert out.getvalue() == "still here\n"


def terminal(use: Callable[[Progress], None], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "110")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w", encoding="utf-8") as stream:
        p = Progress("my-run", 10, stream)
        assert isinstance(p.display, Live)
        use(p)
        p.close()
    seen = b""
    with suppress(OSError):  # EIO: the other side is closed, and everything was read
        while part := os.read(leader, 1 << 20):
            seen += part
    return seen.decode(errors="replace")


def test_a_terminal_gets_the_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    def use(p: Progress) -> None:
        p.phase("rollout")
        p.step(3, ROW)
        p.note("a [note] that stays")

    seen = terminal(use, monkeypatch)
    for text in ("my-run", "3/10", "0.3123", "31.4 tok", "1234 tok/s", "left ", "14 s", "a [note] that stays"):
        assert text in seen, text
    assert seen.rstrip().endswith("\x1b[?25h"), "the cursor comes back"


def test_a_terminal_without_cursor_control_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w", encoding="utf-8") as stream:
        Progress("run", 2, stream).step(1, ROW)
    assert "\x1b" not in os.read(leader, 10000).decode()


def test_it_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under 1 % of a short step of 0.5 s: processor time of phases, a step and the redraws meanwhile."""

    def use(p: Progress) -> None:
        began, used = time.perf_counter(), time.process_time()
        for step in range(1, 5):
            for phase in ("rollout", "score", "update"):
                p.phase(phase)
                time.sleep(0.1)
            p.step(step, ROW)
        spent.append((time.process_time() - used) / (time.perf_counter() - began))

    spent: list[float] = []
    while not spent or (spent[-1] >= 0.03 and len(spent) < 5):  # beside other work all takes longer
        terminal(use, monkeypatch)
    print(f"display: {100 * min(spent):.2f} % of one core")
    assert min(spent) < 0.03
