"""How many rows a step forwards, and through what: a pass that nothing needs is not made."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from rlhf_cli.compose import compose
from rlhf_cli.engine.comm import Comm, start
from rlhf_cli.hardware import resolve_hardware
from rlhf_cli.loop import train
from rlhf_cli.models.heads import PolicyHead
from rlhf_cli.types import Experience
from rlhf_cli.wiring import make_run

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ROWS = 8  # two prompts, four responses each
LORA = "model.lora.r=2"
FORWARD = PolicyHead.forward
NO_KL = "updates.policy.kl=null"


@pytest.fixture(scope="module")
def comm() -> Iterator[Comm]:
    before = {k: os.environ.get(k) for k in LAUNCHER}
    yield start(torch.device("cpu"))
    for k, v in before.items():
        if v is None:
            os.environ.pop(k, None)
        else:
            os.environ[k] = v


class Silent:
    """A record that keeps nothing."""

    def phase(self, name: str) -> Any:
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return lambda *a, **k: None


@dataclass(frozen=True)
class Pass:
    """Rows that went through a head."""

    rows: int
    policy: bool  # the trained model, not another
    learns: bool
    adapters: bool  # in use


def passes(comm: Comm, monkeypatch: pytest.MonkeyPatch, *words: str, varied: int = 2) -> list[Pass]:
    """Every pass of one step whose first `varied` groups have scores that differ."""
    cfg = compose(
        "train",
        ["debug=tiny", "algo=grpo", "reward=length", "steps=1", "hardware=cpu", "reward_workers.processes=-1", *words],
        None,
    )
    OmegaConf.update(cfg, "hardware", resolve_hardware(cfg), merge=True)
    run, parts = make_run(cfg, comm, Silent())
    policy, seen = parts.engines["policy"].module, []

    def counted(self: PolicyHead, ids: Any, *args: Any) -> Any:
        off = any(getattr(m, "disable_adapters", False) is True for m in self.modules())
        seen.append(Pass(len(ids), self is policy, torch.is_grad_enabled(), bool(cfg.model.lora.r) and not off))
        return FORWARD(self, ids, *args)

    def forwarded(self: PolicyHead, **inputs: Any) -> Any:
        inputs.setdefault("allowed", None)
        return counted(self, *(inputs[k] for k in ("ids", "attention", "mask", "group", "want", "allowed")))

    def score(exp: Experience) -> Experience:
        names = torch.unique(exp.group)[:varied]
        number = torch.arange(len(exp)).float()
        return replace(exp, score=torch.where(torch.isin(exp.group, names), number, 1.0))

    monkeypatch.setattr(PolicyHead, "forward", forwarded)
    train(replace(run, score=score, check=lambda *a: None))
    return seen


def rows(some: list[Pass], **wanted: bool) -> int:
    return sum(p.rows for p in some if all(getattr(p, k) == v for k, v in wanted.items()))


def test_without_a_term_that_needs_it_the_reference_is_not_asked(comm: Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    found = passes(comm, monkeypatch, NO_KL)
    assert rows(found, learns=True) == ROWS and rows(found, learns=False) == 0


def test_a_reference_is_a_model_of_its_own_and_asked_once(comm: Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    found = passes(comm, monkeypatch)
    assert rows(found, learns=True, policy=True) == rows(found, learns=False, policy=False) == ROWS
    assert rows(found) == 2 * ROWS


def test_under_lora_the_policy_without_adapters_is_the_reference(comm: Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    found = passes(comm, monkeypatch, LORA)
    assert rows(found, learns=False, policy=True, adapters=False) == ROWS
    assert rows(found, learns=True, policy=True, adapters=True) == ROWS
    assert rows(found) == 2 * ROWS, "no second model"


def test_under_lora_no_reference_pass_without_a_term_that_needs_it(comm: Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    found = passes(comm, monkeypatch, LORA, NO_KL)
    assert rows(found, learns=True, adapters=True) == rows(found) == ROWS


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_old_log_probs_cost_a_pass_only_where_a_rollout_serves_several_updates(
    comm: Comm, monkeypatch: pytest.MonkeyPatch, adapters: bool
) -> None:
    words = [NO_KL, LORA] if adapters else [NO_KL]
    assert rows(passes(comm, monkeypatch, *words), learns=False) == 0
    twice = passes(comm, monkeypatch, *words, "batch.minibatches=2")
    assert rows(twice, learns=False, policy=True, adapters=adapters) == ROWS == rows(twice, learns=False)
    assert rows(twice, learns=True) == ROWS


@pytest.mark.parametrize("words", [(NO_KL,), (NO_KL, LORA)], ids=["full", "lora"])
def test_rows_without_advantage_are_not_forwarded(
    comm: Comm, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    assert rows(passes(comm, monkeypatch, *words, varied=1)) == ROWS // 2
    assert rows(passes(comm, monkeypatch, *words, varied=2)) == ROWS


def test_another_term_keeps_rows_without_advantage(comm: Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    found = passes(comm, monkeypatch, LORA, varied=1)
    assert rows(found, learns=True) == ROWS and rows(found, learns=False) == ROWS
