"""A silent process ends with 75, and its stacks name the function it hangs in."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from rlhf_cli.record.heartbeat import Heartbeat

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
