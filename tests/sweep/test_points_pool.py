"""Shares of the machine."""

from __future__ import annotations

import os

import pytest

from rlhf_cli.errors import ConfigError
from rlhf_cli.sweep.pool import Share, shares


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
