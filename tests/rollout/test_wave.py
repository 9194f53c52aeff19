"""The cache holds no more rows than a step wants."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_cli.models.tiny import tiny_causal
from rlhf_cli.rollout import limits
from rlhf_cli.rollout.limits import ROWS, bytes_per_row, rows_at_a_time


@pytest.fixture
def model() -> Any:
    return tiny_causal(0, torch.float32)


@pytest.mark.parametrize(
    ("rows", "wave", "wanted"),
    [
        (0, 0, 64),  # no wave known
        (0, 24, 24),
        (0, 64, 64),
        (0, 1000, 64),  # decoded in turns
        (7, 3, 7),  # what the user typed
    ],
)
def test_the_wave_bounds_what_the_device_would_hold(model: Any, rows: int, wave: int, wanted: int) -> None:
    assert rows_at_a_time(model, torch.device("cpu"), rows, 100, wave) == wanted


@pytest.mark.parametrize(("wave", "wanted"), [(5, 5), (8, 8), (24, 8)])
def test_memory_bounds_the_wave(monkeypatch: pytest.MonkeyPatch, model: Any, wave: int, wanted: int) -> None:
    monkeypatch.setattr(limits, "_memory", lambda device: 5 * 9 * bytes_per_row(model, 100))  # a fifth holds nine rows
    assert rows_at_a_time(model, torch.device("cpu"), 0, 100, wave) == wanted


def test_a_gpu_has_more_slots_and_the_same_bound(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    monkeypatch.setattr(limits, "_memory", lambda device: 1 << 40)
    gpu: Any = SimpleNamespace(type="cuda")
    assert rows_at_a_time(model, gpu, 0, 100) == rows_at_a_time(model, gpu, 0, 100, 1000) == ROWS["cuda"]
    assert rows_at_a_time(model, gpu, 0, 100, 96) == 96
