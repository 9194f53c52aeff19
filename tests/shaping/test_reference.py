"""Shapers that compare with the initial policy's responses: numbers by hand, identities, and what group normalisation erases."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_cli.credit import group_norm, leave_one_out
from rlhf_cli.shaping import Whiten, ceil, centered, length_penalty, lsc, lsc_canned, par, relative_length, sgfc, squash
from rlhf_cli.shaping.reference import POLY, reference_level

F = torch.float64
NAN = float("nan")
REFS = torch.tensor([[0.0, 1.0, 3.0]], dtype=F)
TWO = torch.tensor([2.0], dtype=F)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_par_by_hand() -> None:
    # (sigmoid(2) + sigmoid(1) + sigmoid(-1)) / 3 = (0.880797 + 0.731059 + 0.268941) / 3
    assert par(TWO, REFS, kind="sigmoid", k=1.0).item() == pytest.approx(0.626932, abs=1e-6)
    assert par(TWO, REFS, kind="sigmoid", k=2.0).item() == pytest.approx((sigmoid(4) + sigmoid(2) + sigmoid(-2)) / 3)
    assert par(TWO, REFS, kind="tanh", k=1.0).item() == pytest.approx((math.tanh(2) + math.tanh(1) - math.tanh(1)) / 3)


def test_par_sees_differences_only_is_bounded_and_keeps_the_order() -> None:
    r = torch.linspace(-30, 30, 101, dtype=F)
    refs = REFS.expand(101, 3)
    shaped = par(r, refs, kind="sigmoid", k=1.0)
    assert torch.allclose(shaped, par(r + 7.5, refs + 7.5, kind="sigmoid", k=1.0))
    assert (shaped.diff() > 0).all() and shaped.min() > 0 and shaped.max() <= 1
    assert par(torch.tensor([1e6], dtype=F), REFS, kind="sigmoid", k=1.0).item() == 1


def test_par_with_one_reference_is_exp_of_lsc() -> None:
    one = torch.tensor([[0.7]], dtype=F)
    assert par(TWO, one, kind="sigmoid", k=1.0).item() == pytest.approx(
        lsc(TWO, one, level="mean", quantile=0.5).exp().item()
    )


def test_missing_references_are_left_out() -> None:
    gaps = torch.tensor([[0.0, NAN, 1.0, 3.0, NAN]], dtype=F)
    assert par(TWO, gaps, kind="sigmoid", k=1.0).item() == pytest.approx(0.626932, abs=1e-6)
    assert par(TWO, gaps, kind="poly", k=1.0).isfinite().all() and sgfc(TWO, gaps, k=1.0, shift=3.0).isfinite().all()
    assert lsc(TWO, gaps, level="gaussian", quantile=0.85).item() == pytest.approx(-1.252921, abs=1e-5)
    assert centered(TWO, gaps).item() == pytest.approx(2 - 4 / 3)


def test_lsc_by_hand() -> None:
    # mean 4/3, sample std sqrt((16 + 1 + 25) / 9 / 2) = 1.5275, q85 = 1.3333 + 1.0364 * 1.5275 = 2.9165
    assert reference_level(REFS, "gaussian", 0.85).item() == pytest.approx(2.9165, abs=1e-4)
    assert lsc(TWO, REFS, level="gaussian", quantile=0.85).item() == pytest.approx(-1.252921, abs=1e-5)
    assert reference_level(REFS, "mean", 0.85).item() == pytest.approx(4 / 3)
    assert reference_level(REFS, "empirical", 0.75).item() == pytest.approx(2.0)
    assert reference_level(torch.tensor([[4.0]], dtype=F), "gaussian", 0.85).item() == 4, "one reference has no spread"


def test_a_canned_answer_is_a_level_of_one_value() -> None:
    # log sigmoid(2 - 0.7) = -0.241008; a reference of that value alone gives the same
    level = torch.tensor([0.7], dtype=F)
    assert lsc_canned(TWO, level).item() == pytest.approx(math.log(sigmoid(1.3))) == pytest.approx(-0.241008, abs=1e-6)
    assert torch.equal(lsc_canned(TWO, level), lsc(TWO, level[:, None], level="mean", quantile=0.5))
    # the answer itself is worth log 1/2, and a constant on the reward changes nothing
    assert lsc_canned(level, level).item() == pytest.approx(math.log(0.5))
    assert torch.allclose(lsc_canned(TWO + 9, level + 9), lsc_canned(TWO, level))


def test_lsc_slope_and_no_overflow() -> None:
    zero = torch.zeros(5, 1, dtype=F)
    r = torch.tensor([-3.0, 0.0, 3.0, -800.0, 800.0], dtype=F, requires_grad=True)
    u = lsc(r, zero, level="mean", quantile=0.5)
    u.sum().backward()
    assert r.grad is not None and r.grad[:3].tolist() == pytest.approx([0.9526, 0.5, 0.0474], abs=1e-4)
    assert u[3].item() == -800 and u[4].item() == 0


def test_lsc_sums_are_a_logical_and() -> None:
    gaps = torch.tensor([[4.0, -2.0], [1.0, 1.0], [0.0, 0.0]], dtype=F)
    u = sum(lsc(gaps[:, i], torch.zeros(3, 1, dtype=F), level="mean", quantile=0.5) for i in range(2))
    assert isinstance(u, Tensor)
    assert u[:2].tolist() == pytest.approx([-2.1451, -0.6265], abs=1e-4)
    assert u[:2].exp().tolist() == pytest.approx([0.1171, 0.5344], abs=1e-4)


def test_a_tabular_policy_trained_on_lsc_finds_the_closed_form() -> None:
    """max E[u] - KL(pi, pi_0): pi ~ pi_0 e^u with gamma 1; gradient ascent on logits must arrive there, and the plain sum elsewhere."""
    start = torch.tensor([0.5, 0.3, 0.2], dtype=F)
    gaps = torch.tensor([[4.0, -2.0], [1.0, 1.0], [0.0, 0.0]], dtype=F)
    shaped = torch.stack(
        [lsc(gaps[:, i], torch.zeros(3, 1, dtype=F), level="mean", quantile=0.5) for i in range(2)]
    ).sum(0)
    for reward, wanted in ((shaped, [0.2177, 0.5963, 0.1860]), (gaps.sum(-1), [0.6045, 0.3627, 0.0327])):
        logits = start.log().clone().requires_grad_()
        optimiser = torch.optim.Adam([logits], lr=0.05)
        for _ in range(600):
            pi = logits.softmax(0)
            loss = -(pi * (reward - (pi / start).log())).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert logits.softmax(0).tolist() == pytest.approx(wanted, abs=1e-3)


def test_the_polynomial_is_the_best_fit_to_the_sigmoid() -> None:
    x = np.linspace(-5, 5, 20001)
    powers = np.stack([x, x**3, x**5], 1)
    fit = np.linalg.lstsq(powers, 1 / (1 + np.exp(-x)) - 0.5, rcond=None)[0]
    assert pytest.approx(fit, rel=1e-3) == POLY
    ends = squash(torch.tensor([-5.1, 0.0, 5.1, 1.0]), kind="poly", k=1.0)
    assert ends[:3].tolist() == [0, 0.5, 1] and ends[3].item() == pytest.approx(sigmoid(1), abs=0.03)


def test_the_other_curves() -> None:
    r = torch.tensor([1.5], dtype=F)
    assert squash(r, kind="sigmoid", k=2.0).item() == pytest.approx(sigmoid(3))
    assert squash(r, kind="tanh", k=1.0).item() == pytest.approx(math.tanh(1.5))
    assert squash(r, kind="atan", k=1.0).item() == pytest.approx(math.atan(1.5) * 2 / math.pi)
    assert sgfc(TWO, REFS, k=1.0, shift=3.0).item() == pytest.approx((sigmoid(-1) + sigmoid(-2) + sigmoid(-4)) / 3)
    assert ceil(torch.tensor([2.0, 9.0]), high=3.0).tolist() == [2, 3]


# -- what a credit erases ----------------------------------------------------------------------------------------------

GROUP = torch.zeros(4, dtype=torch.int64)
MASK = torch.ones(4, 1, dtype=torch.bool)
R = torch.tensor([1.0, 2.0, 4.0, 7.0], dtype=F)


def advantage(score: Tensor, scale: str = "std") -> list[float]:
    return group_norm(score, MASK, GROUP, scale=scale, ddof=1, eps=0.0).advantage[:, 0].tolist()  # type: ignore[arg-type]


def test_group_normalisation_by_hand() -> None:
    assert advantage(R) == pytest.approx([-0.9449, -0.5669, 0.1890, 1.3229], abs=1e-4)
    three = torch.full((4, 1), 3.0, dtype=F)
    assert advantage(par(R, three, kind="sigmoid", k=1.0)) == pytest.approx(
        [-1.0136, -0.6399, 0.5136, 1.1399], abs=1e-4
    )
    assert advantage(lsc(R, three, level="mean", quantile=0.5)) == pytest.approx(
        [-1.2276, -0.3840, 0.6528, 0.9588], abs=1e-4
    )


def test_affine_shapers_are_erased_and_others_are_not() -> None:
    refs = torch.tensor([[0.0, 5.0]], dtype=F).expand(4, 2)
    for same in (centered(R, refs), Whiten(center=True, eps=1e-8)(R), 3 * R + 100):
        assert advantage(same) == pytest.approx(advantage(R), abs=1e-6)
    for other in (par(R, refs, kind="sigmoid", k=1.0), lsc(R, refs, level="mean", quantile=0.5), ceil(R, high=3.0)):
        assert advantage(other) != pytest.approx(advantage(R), abs=0.05)
    # without the std a scale matters and an offset does not
    assert advantage(centered(R, refs), "none") == pytest.approx(advantage(R, "none"))
    assert advantage(3 * R, "none") == pytest.approx([3 * a for a in advantage(R, "none")])
    loo = leave_one_out(centered(R, refs), MASK, GROUP).advantage
    assert torch.allclose(loo, leave_one_out(R, MASK, GROUP).advantage)


def test_whitening_equal_scores_gives_exactly_zero() -> None:
    assert Whiten(center=True, eps=1e-8)(torch.full((3,), 0.1)).eq(0).all()
    assert Whiten(center=True, eps=0.0)(R).std().item() == pytest.approx(1)
    kept = Whiten(center=False, eps=0.0)(R)
    assert kept.mean().item() == pytest.approx(3.5) and kept.std().item() == pytest.approx(1)


def test_length_penalties_by_hand() -> None:
    mask = torch.arange(10) < torch.tensor([2, 6, 10, 4])[:, None]
    assert length_penalty(torch.ones(4), mask, rate=0.1, free=5, most=None).tolist() == pytest.approx([1, 0.9, 0.5, 1])
    # a bonus of 0.1 for each of at most 3.5 tokens beyond the second: 0, 0.35 (of 4), 0.35 (of 8), 0.2
    assert length_penalty(torch.ones(4), mask, rate=-0.1, free=2, most=3.5).tolist() == pytest.approx(
        [1, 1.35, 1.35, 1.2]
    )
    # lengths 2, 6, 10 in one group: 1/2 - 0, 1/2 - 1/2, 1/2 - 1; a wrong row gets no bonus, and a group of one length nothing
    group = torch.tensor([0, 0, 0, 1])
    score = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert relative_length(score, mask, group, factor=1.0, correct=1.0).tolist() == [1.5, 1, 0.5, 1]
    assert relative_length(0 * score, mask, group, factor=1.0, correct=1.0).tolist() == [0, 0, -0.5, 0]
