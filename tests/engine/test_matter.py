"""Rows without advantage are not forwarded where no term can tell, and the step stays the same."""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from engine_bed import FUSED, LR, engine, experience, surrogate, weights
from torch import Tensor

from rlhf_cli.engine import step as exact
from rlhf_cli.engine.comm import Comm, start
from rlhf_cli.objectives import kl_k3, reinforce, sequence_ratio_clip
from rlhf_cli.reduce import token_mean
from rlhf_cli.types import Experience, Term, Update

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
KEPT = [0, 4, 5, 7]  # of groups (0, 1), (2, 3), (4, 5), (6, 7): halves, one whole, one gone
KL = Term("kl", partial(kl_k3), token_mean, 0.3)
sequence = Term("sequence", partial(sequence_ratio_clip, level="seq_sum", eps_low=0.2, eps_high=0.2))
plain = Term("plain", partial(reinforce), token_mean, 0.5)


@pytest.fixture(scope="module")
def comm() -> Iterator[Comm]:
    before = {k: os.environ.get(k) for k in LAUNCHER}
    yield start(torch.device("cpu"))
    for k, v in before.items():
        if v is None:
            os.environ.pop(k, None)
        else:
            os.environ[k] = v


def partly(kept: list[int]) -> Experience:
    """Advantages only in `kept`; elsewhere only off the mask, where they say nothing."""
    exp = experience()
    assert exp.advantage is not None
    rows = torch.isin(torch.arange(len(exp)), torch.tensor(kept))[:, None]
    return replace(exp, advantage=torch.where(rows, exp.advantage, (~exp.mask).float()))


def everything(terms: Any, exp: Experience) -> Tensor:
    return torch.ones(len(exp), dtype=torch.bool)


def one_step(comm: Comm, exp: Experience, update: Update, zero: int) -> tuple[dict[str, float], dict[str, Tensor], int]:
    """What the step tells, the weights after it, and how many rows were forwarded."""
    e, seen = engine(comm, zero=zero), 0
    forward = e._forward

    def counted(want: frozenset[str]) -> exact.Forward:
        def call(x: Experience, rows: Tensor) -> dict[str, Tensor]:
            nonlocal seen
            seen += len(rows)
            return forward(want)(x, rows)

        return call

    e._forward = counted  # type: ignore[method-assign]
    stats = e.step(exp, update, lr=LR)
    assert e.updates == 1
    return stats, weights(e), seen


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("terms", [(surrogate,), (sequence,), (surrogate, plain)], ids=["tokens", "rows", "two"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_a_step_without_the_idle_rows_is_the_same_step(
    comm: Comm, monkeypatch: pytest.MonkeyPatch, terms: tuple[Term, ...], zero: int, on_policy: bool
) -> None:
    exp = partly(KEPT)
    exp = replace(exp, old_logp=None) if on_policy else exp
    stats, after, seen = one_step(comm, exp, Update(terms), zero)
    monkeypatch.setattr(exact, "that_matter", everything)
    whole, wanted, all_seen = one_step(comm, exp, Update(terms), zero)
    assert (seen, all_seen) == (len(KEPT), len(exp))
    assert whole["grad_norm"] > 1e-3
    for k in stats:
        if k.startswith(("loss", "grad_norm")):
            assert stats[k] == pytest.approx(whole[k], abs=1e-6, rel=1e-5), k
    for name in wanted:
        torch.testing.assert_close(after[name], wanted[name], rtol=0, atol=1e-6)


def test_diagnostics_are_those_of_the_rows_that_were_forwarded(comm: Comm) -> None:
    exp, kept = partly(KEPT), torch.tensor(KEPT)
    e = engine(comm)
    outs = exact.infer(exp, e.batches(exp), e._forward(frozenset({"logp"})))
    assert exp.old_logp is not None
    ratio = (outs["logp"] - exp.old_logp)[kept][exp.mask[kept]].clamp(-20, 20).exp()
    stats = e.step(exp, FUSED, lr=LR)
    assert stats["ratio_mean"] == pytest.approx(float(ratio.mean()), rel=1e-4)
    assert stats["ratio_max"] == pytest.approx(max(1.0, float(ratio.max())), rel=1e-4)


@pytest.mark.parametrize("zero", [0, 2])
def test_a_step_of_idle_rows_only_is_still_a_step(comm: Comm, monkeypatch: pytest.MonkeyPatch, zero: int) -> None:
    stats, after, seen = one_step(comm, partly([]), FUSED, zero)
    assert seen == 1, "one row, for ranks that wait"
    assert stats["loss"] == stats["grad_norm"] == 0.0
    monkeypatch.setattr(exact, "that_matter", everything)
    wanted = one_step(comm, partly([]), FUSED, zero)[1]
    for name in wanted:
        torch.testing.assert_close(after[name], wanted[name], rtol=0, atol=1e-7)


def test_nothing_is_told_of_rows_that_were_not_forwarded(comm: Comm) -> None:
    stats = one_step(comm, partly([]), FUSED, 0)[0]
    assert "ratio_max" not in stats or stats["ratio_max"] < 5  # log-probs are near -4: exp(0 - -4) is 55


@pytest.mark.parametrize("terms", [(KL,), (surrogate, KL)], ids=["alone", "beside"])
def test_a_term_that_needs_no_advantage_keeps_every_row(comm: Comm, terms: tuple[Term, ...]) -> None:
    exp = partly(KEPT)
    assert exact.that_matter(terms, exp).all()
    assert one_step(comm, exp, Update(terms), 0)[2] == len(exp)


def test_rows_that_matter() -> None:
    exp = partly(KEPT)
    assert exact.that_matter((surrogate,), exp).nonzero().flatten().tolist() == KEPT
    assert exact.that_matter((surrogate,), replace(exp, advantage=None)).all()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_micro_batches_hold_the_rows_that_matter_once_and_no_other(world: int, packed: bool) -> None:
    exp = partly(KEPT)
    plans = exact.micro_batches(exp, world, 24, packed, exact.that_matter((surrogate,), exp))
    assert len(plans) == world and len({len(p) for p in plans}) == 1
    assert sorted(r for p in plans for b in p if b is not None for r in b.tolist()) == KEPT
    assert exact.micro_batches(exp, world, 24, packed, torch.zeros(len(exp), dtype=torch.bool)) == [[None]] * world
