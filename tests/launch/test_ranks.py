"""Which rank failed first, what is said of silence, and how a keeper ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_cli.launch import ranks
from rlhf_cli.launch.rank import obituary
from rlhf_cli.record.heartbeat import born
from rlhf_cli.record.rundir import RunDir

KEEPER = """
import os, sys, time
from pathlib import Path
from rlhf_cli.launch.rank import keep
from rlhf_cli.launch.stop import Stop, die_with_parent
from rlhf_cli.record.rundir import RunDir
Stop()
worker = os.fork()
if worker == 0:
    die_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
sys.exit(keep(worker, RunDir(sys.argv[1]), 1))
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run").create()


def failed(run: RunDir, rank: int, text: str, at: int) -> None:
    run.error(rank).write_text(text + "\n")
    os.utime(run.error(rank), ns=(at, at))


def test_the_first_failure_by_time(run: RunDir) -> None:
    assert ranks.first_failure(run.errors()) is None
    failed(run, 1, "Traceback ...\nValueError: bad", 2_000)
    failed(run, 0, "Traceback ...\nrlhf_cli.errors.GateError: step 3: x", 3_000)
    failed(run, 12, "Killed: was killed (SIGKILL); out of memory? see dmesg", 4_000)
    assert ranks.first_failure(run.errors()) == (1, "ValueError", "bad")


@pytest.mark.parametrize(
    "lost",
    [
        "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711",
        "torch.distributed.DistBackendError: NCCL error in: x",
    ],
)
def test_a_lost_connection_is_never_the_cause(lost: str, run: RunDir) -> None:
    failed(run, 0, lost, 1_000)
    failed(run, 1, "Killed: was killed (SIGKILL); out of memory? see dmesg", 9_000)
    assert ranks.first_failure(run.errors()) == (1, "Killed", "was killed (SIGKILL); out of memory? see dmesg")
    run.error(1).unlink()
    found = ranks.first_failure(run.errors())
    assert found and found[0] == 0, "alone it is all there is to say"


def test_silence_names_the_rank_that_others_wait_for(run: RunDir) -> None:
    head = 'rank {} in phase score for 3 s; stacks of all threads:\nThread 0x1 (most recent call first):\n  File "a.py", line 1 in wait\n\n'
    waits = '  File "/x/torch/distributed/distributed_c10d.py", line 9 in all_gather\n  File "/x/stages.py", line 1 in score\n'
    works = '  File "/x/mine.py", line 2 in score\n  File "/x/torch/nn/modules/module.py", line 1 in forward\n'
    for rank, body in ((0, waits), (1, works)):
        run.stacks(rank).write_text(head.format(rank) + "Thread 0x2 (most recent call first):\n" + body)
    said = ranks.silenced(run, "rank 0 silent for 3 s in phase score")
    assert said.startswith(
        "rank 0 silent for 3 s in phase score; every rank but 1 waits in a collective; stacks of every"
    )
    woken = run.stacks(1).read_text() + head.format(1) + "Thread 0x2 (most recent call first):\n" + waits
    run.stacks(1).write_text(woken)
    assert "every rank but 1 waits" in ranks.silenced(run, "rank 0 silent"), "a rank that woke up later hung before"
    dump = (
        "Thread 0x1 (most recent call first):\n  File 'a.py', line 1 in wait\n\nThread 0x2 (most recent call first):\n"
    )
    run.stacks(1).write_text(head.format(1) + "Thread 0x2 (most recent call first):\n" + works + dump + waits)
    assert "every rank but 1 waits" in ranks.silenced(run, "rank 0 silent"), "its keeper asked after it woke up"
    run.stacks(0).write_text(head.format(0) + "Thread 0x2 (most recent call first):\n" + works)
    assert "every rank but" not in ranks.silenced(run, "rank 0 silent"), "both work: nobody is blamed"
    assert ranks.silenced(run, "") == ""


def test_what_is_said_of_the_dead() -> None:
    assert obituary(signal.SIGKILL) == "was killed (SIGKILL); out of memory? see dmesg"
    assert obituary(signal.SIGSEGV) == "was killed (SIGSEGV); see the end of its log"


@pytest.fixture
def kept(run: RunDir):
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert keeper.stdout
    worker = int(keeper.stdout.readline())
    time.sleep(0.1)  # it installs its handler right after the fork
    yield keeper, worker
    keeper.kill()
    keeper.wait()


def test_a_keeper_tells_of_a_killed_rank(kept, run: RunDir) -> None:
    keeper, worker = kept
    os.kill(worker, signal.SIGKILL)
    assert keeper.wait(60) == 128 + signal.SIGKILL
    assert run.error(1).read_text() == "Killed: was killed (SIGKILL); out of memory? see dmesg\n"


def test_a_keeper_that_is_told_to_end_kills_its_rank_and_blames_nobody(kept, run: RunDir) -> None:
    keeper, worker = kept
    for harmless in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        keeper.send_signal(harmless)
    time.sleep(0.2)
    assert born(worker) >= 0
    keeper.send_signal(signal.SIGTERM)  # nobody failed: the rank is asked, and may save
    time.sleep(0.3)
    assert born(worker) >= 0 and keeper.poll() is None
    run.error(0).write_text("ValueError: first\n")
    keeper.send_signal(signal.SIGTERM)
    assert keeper.wait(60) == 128 + signal.SIGKILL
    assert not run.error(1).exists() and born(worker) == -1


def test_a_rank_dies_with_its_keeper(kept) -> None:
    keeper, worker = kept
    keeper.kill()
    keeper.wait()
    end = time.monotonic() + 60
    while born(worker) >= 0 and time.monotonic() < end:
        time.sleep(0.01)
    assert born(worker) == -1, "gone, or a zombie that nobody reaps"
