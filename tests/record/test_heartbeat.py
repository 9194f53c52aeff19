"""A silent process ends with 75, and its stacks name the function it hangs in."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_cli.record import heartbeat
from rlhf_cli.record.heartbeat import STACKS, Heartbeat

HANG = """
import sys, time
from pathlib import Path
from rlhf_cli.record.heartbeat import Heartbeat
def waits_for_nobody():
    time.sleep(60)
told = Path(sys.argv[1]) / "told"
beat = Heartbeat(Path(sys.argv[1]), 3, 1.0, on_silence=told.write_text).start()
for _ in range(8):  # alive for longer than the limit
    time.sleep(0.2); beat.beat("rollout")
beat.beat("update")
waits_for_nobody()
"""

BUSY = """
import sys, time
from pathlib import Path
from rlhf_cli.record.heartbeat import Heartbeat
beat = Heartbeat(Path(sys.argv[1]), 0, 1.0).start()
print("ready", flush=True)
end = time.time() + 9
while time.time() < end:
    time.sleep(0.1); beat.beat("update")
"""

# Rank 1 holds the interpreter's lock for ever, so no thread of it can notice anything; there is no keeper.
STUCK = """
import ctypes, signal, sys, time
from pathlib import Path
from rlhf_cli.record.heartbeat import Heartbeat
signal.signal(signal.SIGQUIT, getattr(signal, sys.argv[3]))  # ignored is what a script's `command &` begins with
rank = int(sys.argv[2])
def waits_for_the_other():
    time.sleep(60)
def holds_the_lock():
    for _ in range(3):  # a signal ends a sleep
        ctypes.PyDLL(None).sleep(60)
told = Path(sys.argv[1]) / f"told-{rank}"
beat = Heartbeat(Path(sys.argv[1]), rank, 4.0, on_silence=told.write_text, ranks=2).start()
while not (Path(sys.argv[1]) / "logs" / f"heartbeat-rank-{1 - rank}.json").exists():
    time.sleep(0.01); beat.beat("load")
time.sleep(1.5)  # both have written their own
holds_the_lock() if rank else waits_for_the_other()
"""


def test_silence_ends_the_process_and_names_rank_phase_and_line(tmp_path: Path) -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANG, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 75
    assert time.monotonic() - began > 2.5, "not before the limit"
    stacks = (tmp_path / "logs" / "rank-3.stacks").read_text()
    first = (tmp_path / "told").read_text()
    assert re.fullmatch(r"rank 3 silent for \d+ s in phase update", first)
    for text in (stacks, done.stderr):
        assert text.startswith(f"{first} (hardware.timeout=1); stacks of all threads:\n")
        assert "in waits_for_nobody" in text
    seen = json.loads((tmp_path / "logs" / "heartbeat-rank-3.json").read_text())
    assert (seen["rank"], seen["phase"]) == (3, "update")


@pytest.mark.parametrize(("begins", "ends"), [("SIG_DFL", signal.SIGQUIT), ("SIG_IGN", signal.SIGKILL)])
def test_a_rank_that_holds_the_lock_is_made_to_write_its_stacks_by_another(
    begins: str, ends: int, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", STUCK, str(tmp_path)]
    ranks = [subprocess.Popen([*words, str(i), begins], stderr=subprocess.DEVNULL) for i in (0, 1)]
    assert [p.wait(timeout=120) for p in ranks] == [75, -ends]
    logs = tmp_path / "logs"
    assert "in waits_for_the_other" in (logs / "rank-0.stacks").read_text()
    assert "in holds_the_lock" in (logs / "rank-1.stacks").read_text()
    assert re.fullmatch(r"rank 0 silent for \d+ s in phase load", (tmp_path / "told-0").read_text())


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pids that a signal was sent to, by nobody."""
    pids: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: pids.append(pid) if number == STACKS else None)
    monkeypatch.setattr(heartbeat, "DUMP_TIME", 0.0)
    return pids


def seen(logs: Path, rank: int, *, stacks: str = "", **changed: object) -> None:
    logs.mkdir(exist_ok=True)
    who = {"rank": rank, "pid": os.getpid(), "born": heartbeat.born(os.getpid()), "host": socket.gethostname()}
    (logs / f"heartbeat-rank-{rank}.json").write_text(json.dumps(who | changed))
    (logs / f"rank-{rank}.stacks").write_text(stacks)


def test_only_a_mute_rank_of_this_machine_is_told_and_once(tmp_path: Path, sent: list[int]) -> None:
    seen(tmp_path, 0, stacks="x")
    seen(tmp_path, 1)
    seen(tmp_path, 2, stacks="x")
    seen(tmp_path, 3, host="elsewhere")
    seen(tmp_path, 4, born=1)  # the number is another process's by now
    seen(tmp_path, 6)  # of an earlier try with more ranks; rank 5 never began
    assert heartbeat.wake(tmp_path, 2, 6) == [] and sent == [], "rank 0 does it"
    assert heartbeat.wake(tmp_path, 0, 6) == [1] and sent == [os.getpid()]


def test_a_process_that_is_over_was_never_born() -> None:
    over = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, over.pid, os.WEXITED | os.WNOWAIT)
    assert heartbeat.born(over.pid) == -1, "a zombie takes no signal"
    over.wait()
    assert heartbeat.born(over.pid) == -1 and heartbeat.born(os.getpid()) >= 0


def test_a_suspended_process_is_not_silent(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", BUSY, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    child.stdout.readline()
    time.sleep(0.5)
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(7.5)
    os.kill(child.pid, signal.SIGCONT)
    assert child.wait(timeout=300) == 0


def test_zero_turns_it_off_and_stop_leaves_no_empty_file(tmp_path: Path) -> None:
    off = Heartbeat(tmp_path / "off", 0, 0).start()
    off.beat("x")
    off.stop()
    assert not off.enabled and not (tmp_path / "off").exists()
    on = Heartbeat(tmp_path / "on", 0, 100).start()
    on.stop()
    assert not on.stacks.exists()


def test_a_beat_is_cheap(tmp_path: Path) -> None:
    beat = Heartbeat(tmp_path, 0, 0)
    began = time.perf_counter()
    for _ in range(10_000):
        beat.beat("update")
    assert (time.perf_counter() - began) / 10_000 < 2e-5
