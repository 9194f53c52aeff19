"""The critic's loss, and the likelihood of demonstrations."""

import pytest
import torch

from rlhf_cli.objectives import clipped_value, nll


@pytest.mark.parametrize(
    ("value_new", "clip", "loss", "gradient"),
    [
        (1.5, None, 0.125, 0.5),  # (1.5 - 1)^2 / 2; v - G
        (0.8, 0.2, 0.18, 0.0),  # old 0.2: kept at 0.4, error .6 > .2: .36 / 2, moved far enough already
        (0.3, 0.2, 0.245, -0.7),  # within reach: .49 / 2
        (-0.5, 0.2, 1.125, -1.5),  # moved away: the plain error is the worse one
    ],
)
def test_clipped_value(value_new: float, clip: float | None, loss: float, gradient: float) -> None:
    v = torch.tensor([[value_new]], requires_grad=True)
    got = clipped_value(v, torch.tensor([[0.2]]), torch.tensor([[1.0]]), clip=clip)
    (grad,) = torch.autograd.grad(got.sum(), v)
    assert got.item() == pytest.approx(loss, abs=1e-6) and grad.item() == pytest.approx(gradient, abs=1e-6)


def test_nll() -> None:
    assert nll(torch.tensor([[-0.25, -2.0]])).tolist() == [[0.25, 2.0]]
