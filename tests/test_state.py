"""Objects with state: found when built, written, read back, equal on all ranks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli import state
from rlhf_cli.engine.comm import Comm
from rlhf_cli.errors import GateError

COMM = Comm(torch.device("cpu"))
NODE = {"_target_": "rlhf_cli.shaping.adaptive_kl.AdaptiveKL", "beta": 0.2, "kind": "k1", "target": 6.0, "per": "row"}
NODE |= {"bound": 0.2, "count": "rows", "horizon": 10000}


class Remembers:
    def __init__(self, held: Any = None) -> None:
        self.held = held

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, found: Mapping[str, Any]) -> None:
        self.held = found["held"]


def test_the_builder_remembers_what_has_state() -> None:
    build = state.Builder([])
    shaper = build(NODE, "shaping.adaptive_kl")
    build({"_target_": "rlhf_cli.select.keep_all"}, "select")
    assert build.state == {"shaping.adaptive_kl": shaper}


def test_numbers_and_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    x = torch.tensor([0.1, -3e-30, float("inf")])
    held = {"n": [1, 0.1], "deep": [{"x": x, "i": torch.arange(3)}], "flag": torch.tensor(True)}
    plain = state.save({"a": Remembers(held), "b": Remembers(None)}, tmp_path, COMM)
    a, b = Remembers(), Remembers(5)
    state.load({"a": a, "b": b}, tmp_path, plain)
    assert b.held is None and a.held["n"] == [1, 0.1] and torch.equal(a.held["deep"][0]["x"], x)
    assert a.held["deep"][0]["i"].dtype == torch.int64 and a.held["flag"].item() is True


class Ranks:
    """Rank 0 of two; rank 1 hands in `other`."""

    rank, world = 0, 2

    def __init__(self, other: Any = None) -> None:
        self.other, self.sent = other, None

    def gather(self, mine: Any) -> list[Any]:
        self.sent = mine
        return [mine, self.other or mine]


def test_ranks_that_remember_different_things_stop(tmp_path: Path) -> None:
    second: Any = Ranks()
    state.save({"shaping.x": Remembers(0.25)}, tmp_path, second)
    same: Any = Ranks(second.sent)
    state.save({"shaping.x": Remembers(0.25)}, tmp_path, same)
    with pytest.raises(GateError, match=r"^shaping\.x: rank 1 remembers something else than rank 0"):
        state.save({"shaping.x": Remembers(0.5)}, tmp_path, same)
    for held in (torch.ones(2), torch.zeros(2)):
        found: Any = Ranks()
        state.save({"shaping.x": Remembers(held)}, tmp_path, found)
        same.other = same.other if held.any() else found.sent
    with pytest.raises(GateError, match="remembers something else"):
        state.save({"shaping.x": Remembers(torch.ones(2))}, tmp_path, same)
