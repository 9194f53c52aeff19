"""Bradley-Terry on scores 1.0 (chosen) and 0.2 (rejected): d = 0.8."""

import math

import pytest
import torch

from rlhf_cli.objectives import bradley_terry, bradley_terry_margin, centering

SCORE = torch.tensor([1.0, 0.2])
PAIR = torch.tensor([[0, 1]])


@pytest.mark.parametrize(
    ("label_smoothing", "expected"),
    [(0.0, 0.371101), (0.1, 0.451101)],  # softplus(-0.8); + 0.1 * 0.8
)
def test_bradley_terry(label_smoothing: float, expected: float) -> None:
    loss = bradley_terry(SCORE, PAIR, label_smoothing=label_smoothing)
    assert loss.shape == (1,) and loss.item() == pytest.approx(expected, abs=1e-6)


def test_gradient() -> None:
    # -sigmoid(-0.8) = -0.310026 on the chosen score, the opposite on the rejected one
    score = SCORE.clone().requires_grad_()
    (grad,) = torch.autograd.grad(bradley_terry(score, PAIR, label_smoothing=0.0).sum(), score)
    assert torch.allclose(grad, torch.tensor([-0.310026, 0.310026]), atol=1e-6)


def test_smoothed_optimum_is_finite() -> None:
    score = torch.tensor([math.log(9.0), 0.0], requires_grad=True)  # d = log(.9 / .1) = 2.1972
    (grad,) = torch.autograd.grad(bradley_terry(score, PAIR, label_smoothing=0.1).sum(), score)
    assert grad.abs().max() < 1e-7


def test_margin() -> None:
    # d - 0.5 = 0.3: softplus(-0.3)
    loss = bradley_terry_margin(SCORE, PAIR, torch.tensor([0.5]), label_smoothing=0.0)
    assert loss.item() == pytest.approx(0.554355, abs=1e-6)


def test_centering() -> None:
    assert centering(SCORE, PAIR).item() == pytest.approx(1.44)  # 1.2^2
