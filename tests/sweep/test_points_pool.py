"""Shares of the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from rlhf_cli.errors import ConfigError
from rlhf_cli.sweep.pool import Running, Share, Wish, shares, work


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six cores and four GPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 8, 9})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-a,7")


def test_one_at_a_time_takes_everything(machine: None) -> None:
    assert shares(1, "cuda", 0) == [Share()]
    assert Share().environment()["CUDA_VISIBLE_DEVICES"] == "4,5,GPU-a,7"


def test_cores_are_disjoint_and_all_used(machine: None) -> None:
    assert [s.cores for s in shares(2, "cpu", 0)] == [(0, 1, 2), (3, 8, 9)]
    assert [len(s.cores) for s in shares(4, "cpu", 0)] == [1, 2, 1, 2]
    assert [s.gpus for s in shares(2, "cpu", 0)] == [None, None]
    assert {len(s.cores) for s in shares(9, "cpu", 0)} == {1}, "more points than cores: some serve twice"


def test_gpus_are_disjoint(machine: None) -> None:
    made = shares(2, "cuda", 2)
    assert [s.gpus for s in made] == [("4", "5"), ("GPU-a", "7")]
    assert made[1].environment()["CUDA_VISIBLE_DEVICES"] == "GPU-a,7"
    assert [s.gpus for s in shares(3, "cuda", 0)] == [("4",), ("5",), ("GPU-a",)]


def test_too_many_for_the_gpus(machine: None) -> None:
    with pytest.raises(ConfigError, match=r"sweep.parallel=3: 4 GPUs are visible and a point takes 2; at most 2"):
        shares(3, "cuda", 2)
    with pytest.raises(ConfigError, match=r"sweep.parallel=0: wanted 1 or more"):
        shares(0, "cpu", 0)


def test_two_signals_of_one_moment_ask_before_they_kill() -> None:
    """Both come between two looks: the point is asked to stop, and only at a later look it is killed."""
    wish, told, ended = Wish(), [], []

    class Noted(Running):
        def stop(self) -> None:
            told.append("stop")

        def kill(self) -> None:
            told.append("kill")
            super().kill()

    def begin(share: Share) -> Running:
        wish(signal.SIGINT, None)
        wish(signal.SIGTERM, None)
        return Noted("a", subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]), {})

    looks: list[list[str]] = []
    work(begin, lambda r, code: ended.append(code), lambda running: looks.append([*told]), [Share()], wish)
    assert looks[:2] == [["stop"], ["stop", "kill"]] and ended == [-signal.SIGKILL]
