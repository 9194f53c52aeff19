"""A process bound to another one: the kernel sends it a signal when that one is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rlhf_cli.launch.child import bound

SLEEPS = [sys.executable, "-c", "import os, time; print(sorted(os.sched_getaffinity(0)), flush=True); time.sleep(600)"]
PARENT = f"""
import subprocess, sys
from rlhf_cli.launch.child import bound
child = subprocess.Popen(bound({SLEEPS!r}, 15), stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_it_ends_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert not gone(child)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 60
    while not gone(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert gone(child)


def test_one_whose_parent_died_before_it_began_does_nothing(tmp_path: Path) -> None:
    words = bound([sys.executable, "-c", f"open({str(tmp_path / 'x')!r}, 'w')"], signal.SIGKILL)
    words[words.index(str(os.getpid()))] = "1"
    assert subprocess.run(words, check=False).returncode == 1 and not (tmp_path / "x").exists()


def test_its_share_of_the_cores_and_its_exit_status() -> None:
    core = min(os.sched_getaffinity(0))
    child = subprocess.Popen(bound(SLEEPS, signal.SIGTERM, [core]), stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == f"[{core}]\n"
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert subprocess.run(bound([sys.executable, "-c", "raise SystemExit(7)"], 15), check=False).returncode == 7
