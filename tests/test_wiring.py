"""Pieces of `make_run` that hold a formula or a gate; whole runs are tested through the command line."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_cli import pipeline, wiring
from rlhf_cli.data.record import Record
from rlhf_cli.errors import GateError
from rlhf_cli.rollout.builtin import refresh


def config(steps: int, warmup: int, schedule: str) -> Any:
    return SimpleNamespace(steps=steps, optim=SimpleNamespace(warmup=warmup, schedule=schedule))


@pytest.mark.parametrize(
    ("steps", "warmup", "schedule", "wanted"),
    [
        (4, 0, "constant", [1.0, 1.0, 1.0, 1.0]),
        (4, 2, "constant", [1 / 3, 2 / 3, 1.0, 1.0]),
        (4, 0, "linear", [1.0, 0.75, 0.5, 0.25]),  # (steps - step) / steps
        (6, 2, "linear", [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25]),
        (4, 0, "cosine", [1.0, 0.5 + 0.5**0.5 / 2, 0.5, 0.5 - 0.5**0.5 / 2]),  # (1 + cos(pi step / steps)) / 2
        (1, 5, "linear", [1 / 6]),
    ],
)
def test_learning_rate(steps: int, warmup: int, schedule: str, wanted: list[float]) -> None:
    cfg = config(steps, warmup, schedule)
    found = [pipeline.learning_rate(cfg, {"policy": 0.01, "critic": 1.0}, "policy", s) for s in range(steps)]
    assert found == pytest.approx([0.01 * w for w in wanted], rel=1e-12)
    assert pipeline.learning_rate(cfg, {"policy": 0.01, "critic": 1.0}, "critic", 0) == pytest.approx(wanted[0])


def learner(module: nn.Module, moved: bool) -> Any:
    """An engine whose weights are those of `module`, named as its head names them."""
    both = [*module.named_parameters(), *module.named_buffers()]
    return SimpleNamespace(moved=moved, full_state=lambda: ((f"model.{k}", v.detach().double()) for k, v in both))


def test_refresh_copies_every_weight_and_buffer() -> None:
    actor, trained = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        trained.weight.fill_(2.0)
        trained.running_mean.fill_(5.0)  # type: ignore[union-attr]
    refresh(actor, learner(trained, moved=True))
    assert actor.weight.tolist() == [2.0] * 3 and actor.running_mean.tolist() == [5.0] * 3  # type: ignore[union-attr]
    assert actor.weight.dtype == torch.float32 and actor.weight.requires_grad


def test_refresh_refuses_an_update_that_changed_nothing() -> None:
    actor = nn.Linear(2, 2)
    refresh(actor, learner(actor, moved=False))  # no update, nothing to copy
    with pytest.raises(GateError) as e:
        refresh(actor, learner(actor, moved=True))
    assert str(e.value) == "the weights that sample did not change after an update: the copy from the learner is broken"


def test_the_probe_makes_two_groups_of_two_rows_of_different_length() -> None:
    records = [Record(({"role": "user", "content": t},), t, uid=t) for t in ("a", "b")]
    encoded = [list(range(1, 12)), list(range(20, 30))]
    exp = wiring.probe_rows(encoded=encoded, records=records)
    assert exp.group.tolist() == [0, 0, 1, 1] and exp.mask.sum(-1).tolist() == [5, 9, 5, 9]
    assert exp.ids[0, :16].tolist() == [*range(1, 12), 7, 8, 9, 10, 11]


def test_recorded_rows_are_scored_at_temperature_one() -> None:
    def temperature(source: str, t: float) -> float:
        return wiring.temperature_of(
            SimpleNamespace(rollout=SimpleNamespace(temperature=t)), SimpleNamespace(source=source)
        )  # type: ignore[arg-type]

    assert (temperature("sampled", 0.7), temperature("sampled", 0.0), temperature("recorded", 0.7)) == (0.7, 1.0, 1.0)
