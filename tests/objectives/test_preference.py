"""Pair objectives on the fixture h(winner) = 2, h(loser) = -1 (D = 3), and their limits."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_cli.objectives import dpo, hinge, ipo

WIN = torch.tensor([[0, 1]])
LOSE = torch.tensor([[1, 0]])


def fixture(lengths: tuple[int, int] = (2, 3)) -> tuple[Tensor, Tensor, Tensor]:
    """logp, ref_logp, mask with h = (2, -1) spread over the rows; what lies outside the mask is garbage."""
    mask = torch.arange(max(lengths) + 1) < torch.tensor(lengths)[:, None]
    ref = torch.full(mask.shape, -3.0, dtype=torch.float64)
    h = torch.tensor([[2.0 / lengths[0]], [-1.0 / lengths[1]]], dtype=torch.float64)
    return torch.where(mask, ref + h, 50.0), ref, mask


@pytest.mark.parametrize(
    ("pairs", "label_smoothing", "expected"),
    [
        (WIN, 0.0, 0.554355),  # softplus(-0.3)
        (LOSE, 0.0, 0.854355),  # softplus(0.3)
        (WIN, 0.1, 0.584355),  # 0.9 * 0.554355 + 0.1 * 0.854355
    ],
)
def test_dpo(pairs: Tensor, label_smoothing: float, expected: float) -> None:
    loss = dpo(*fixture(), pairs, beta=0.1, label_smoothing=label_smoothing)
    assert loss.shape == (1,) and loss.item() == pytest.approx(expected, abs=1e-6)


def test_dpo_of_the_reference_itself_is_log_two() -> None:
    _, ref, mask = fixture()
    assert dpo(ref, ref, mask, WIN, beta=0.1, label_smoothing=0.0).item() == pytest.approx(math.log(2))


def test_dpo_with_a_uniform_reference_is_the_logp_form() -> None:
    # sums -10 and -18 against the same reference on both: beta (8) = 0.8, softplus(-0.8) = 0.371101
    logp = torch.tensor([[-10.0], [-18.0]])
    mask = torch.ones(2, 1, dtype=torch.bool)
    loss = dpo(logp, torch.full_like(logp, -4.0), mask, WIN, beta=0.1, label_smoothing=0.0)
    assert loss.item() == pytest.approx(0.371101, abs=1e-6)


def test_smoothed_dpo_has_its_minimum_at_the_log_odds() -> None:
    # beta D = log(.9 / .1) = 2.1972: zero gradient there
    gap = torch.tensor([[math.log(9.0)], [0.0]], requires_grad=True)
    mask = torch.ones(2, 1, dtype=torch.bool)
    loss = dpo(gap, torch.zeros(2, 1), mask, WIN, beta=1.0, label_smoothing=0.1)
    assert torch.autograd.grad(loss.sum(), gap)[0].abs().max() < 1e-7


def test_ipo() -> None:
    # tau .1: target 5. Sum: (3 - 5)^2 = 4; mean with lengths 10 and 20: (.2 + .05 - 5)^2 = 22.5625
    assert ipo(*fixture(), WIN, tau=0.1, level="seq_sum").item() == pytest.approx(4.0)
    assert ipo(*fixture((10, 20)), WIN, tau=0.1, level="seq_mean").item() == pytest.approx(22.5625)


def test_hinge() -> None:
    assert hinge(*fixture(), WIN, beta=0.1).item() == pytest.approx(0.7)  # 1 - 0.3
    assert hinge(*fixture(), WIN, beta=0.5).item() == 0.0  # 1 - 1.5 < 0


def test_pairs_may_share_rows() -> None:
    logp, ref, mask = (torch.cat([x, x[:1]]) for x in fixture())
    pairs = torch.tensor([[0, 1], [2, 1], [0, 2]])
    loss = dpo(logp, ref, mask, pairs, beta=0.1, label_smoothing=0.0)
    expected = torch.tensor([0.554355, 0.554355, math.log(2)], dtype=torch.float64)
    assert torch.allclose(loss, expected, atol=1e-6)
