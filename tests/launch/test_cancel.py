"""`rlhf cancel` ends the run that it names and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_cli.errors import ConfigError
from rlhf_cli.launch import cancel as cancelling
from rlhf_cli.launch import queue
from rlhf_cli.launch.cancel import cancel
from rlhf_cli.launch.queue import Job
from rlhf_cli.record.rundir import RunDir, born


def test_a_copy_does_not_cancel_the_job_of_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "a").create()
    run.set_job("12")
    shutil.copytree(run.path, tmp_path / "b")
    told: list[str] = []
    monkeypatch.setattr(queue, "jobs", lambda ids: {i: Job("RUNNING") for i in ids})
    monkeypatch.setattr(queue, "cancel", told.append)
    with pytest.raises(ConfigError, match="nobody works on"):
        cancel(RunDir(tmp_path / "b"))
    assert told == [] and "cancelled job 12" in cancel(run) and told == ["12"] and "cancelled" in run.job()


def test_a_signal_does_not_part_the_mark_from_the_cancelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "a").create()
    run.set_job("12")
    told: list[str] = []

    def scancel(job: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        told.append(job)

    monkeypatch.setattr(queue, "jobs", lambda ids: {"12": Job("RUNNING")})
    monkeypatch.setattr(queue, "cancel", scancel)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            cancel(run)
    finally:
        signal.signal(signal.SIGINT, before)
    assert told == ["12"] and "cancelled" in run.job()


def test_a_process_that_got_the_number_of_an_earlier_writer_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancelling, "MOMENT", 0.01)
    run = RunDir(tmp_path / "a").create()
    run.claim()  # by a process that has not written its name yet; the one before was killed
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger:
        who = {"pid": stranger.pid, "born": born(stranger.pid) - 1, "host": socket.gethostname()}
        (run.path / ".lock").write_text(json.dumps(who))
        with pytest.raises(ConfigError, match="is just starting; type it again"):
            cancel(run)
        assert stranger.poll() is None
        (run.path / ".lock").write_text(json.dumps(who | {"born": born(stranger.pid)}))
        assert cancel(run).startswith(f"asked process {stranger.pid} to stop")
        assert stranger.wait() == -signal.SIGTERM
    run.release()
