"""Policy surrogates: clipping cases, limits, gradients."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.objectives import (
    cispo,
    entropy_bonus,
    gspo_token,
    ppo_clip,
    reinforce,
    sequence_ratio_clip,
    two_sided_clip,
)
from rlhf_cli.reduce import sequence_mean


def at_ratio(ratio: float, advantage: float, **settings: float | None) -> tuple[float, float]:
    """Loss of one token, and its gradient with respect to logp."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    surrogate = partial(ppo_clip, **{"eps_low": 0.2, "eps_high": 0.2, "dual_clip": None} | settings)  # type: ignore
    loss = surrogate(logp, torch.zeros_like(logp), torch.full_like(logp, advantage))
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    return loss.item(), grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 1.0, -1.2, 0.0),  # clipped above
        (0.5, 1.0, -0.5, -0.5),  # d(-r A)/d logp = -r A
        (1.5, -1.0, 1.5, 1.5),
        (0.5, -1.0, 0.8, 0.0),  # clipped below
        (1.25, 1.0, -1.2, 0.0),
        (1.0, 1.0, -1.0, -1.0),
    ],
)
def test_ppo_clip(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    assert at_ratio(ratio, advantage) == pytest.approx((loss, gradient), abs=1e-12)


def test_clip_higher_lets_the_gradient_through() -> None:
    # 1.25 < 1.28: not clipped
    assert at_ratio(1.25, 1.0, eps_high=0.28) == pytest.approx((-1.25, -1.25), abs=1e-12)


def test_dual_clip_bounds_bad_tokens_only() -> None:
    assert at_ratio(5.0, -1.0) == pytest.approx((5.0, 5.0))
    assert at_ratio(5.0, -1.0, dual_clip=3.0) == pytest.approx((3.0, 0.0))  # -c A = 3
    assert at_ratio(2.5, -1.0, dual_clip=3.0) == pytest.approx((2.5, 2.5))
    assert at_ratio(5.0, 1.0, dual_clip=3.0) == pytest.approx((-1.2, 0.0))


def test_on_policy_gradients_equal_reinforce() -> None:
    torch.manual_seed(0)
    logp = (-torch.rand(3, 4, dtype=torch.float64)).requires_grad_()
    old, advantage = logp.detach(), torch.randn(3, 4, dtype=torch.float64)
    surrogate = ppo_clip(logp, old, advantage, eps_low=0.2, eps_high=0.2, dual_clip=3.0)
    (grad,) = torch.autograd.grad(surrogate.sum(), logp)
    (plain,) = torch.autograd.grad(reinforce(logp, advantage).sum(), logp)
    assert torch.equal(plain, -advantage) and torch.allclose(grad, plain, atol=1e-12)
    assert torch.allclose(surrogate, -advantage)


def rowed(level: Any, advantage: float, log_ratios: list[float], eps: float = 10.0) -> tuple[float, Tensor]:
    """Loss of one row whose last token is outside the mask, and its gradient."""
    logp = torch.tensor([[*log_ratios, 5.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * len(log_ratios) + [False]])
    constant = torch.full_like(logp, advantage)
    loss = sequence_ratio_clip(logp, torch.zeros_like(logp), constant, mask, level=level, eps_low=eps, eps_high=eps)
    assert loss.shape == (1,)
    return loss.item(), torch.autograd.grad(loss.sum(), logp)[0]


def test_sequence_ratio() -> None:
    # log-ratios .1, -.1, .3: sum .3, mean .1; e^.1 = 1.105171, e^.3 = 1.349859
    loss, grad = rowed("seq_mean", 1.0, [0.1, -0.1, 0.3])
    assert loss == pytest.approx(-1.105171, abs=1e-6)
    assert torch.allclose(grad, torch.tensor([[-1.105171 / 3] * 3 + [0.0]], dtype=torch.float64), atol=1e-6)
    loss, grad = rowed("seq_sum", 1.0, [0.1, -0.1, 0.3])
    assert loss == pytest.approx(-1.349859, abs=1e-6)
    assert torch.allclose(grad, torch.tensor([[-1.349859] * 3 + [0.0]], dtype=torch.float64), atol=1e-6)


def test_a_clipped_row_has_no_gradient_on_any_token() -> None:
    loss, grad = rowed("seq_mean", 1.0, [0.1, -0.1, 0.3], eps=0.05)  # 1.105 > 1.05
    assert loss == pytest.approx(-1.05) and torch.equal(grad, torch.zeros(1, 4, dtype=torch.float64))
    loss, grad = rowed("seq_mean", -1.0, [0.1, -0.1, 0.3], eps=0.05)  # the pessimistic side flows
    assert loss == pytest.approx(1.105171, abs=1e-6) and (grad[0, :3] > 0).all()


def test_on_policy_sequence_ratio_has_the_gradient_of_the_row_sum_or_mean() -> None:
    # with one advantage per row: seq_sum equals REINFORCE summed over the row, seq_mean its mean (GRPO's reduction)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    logp = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([[2.0] * 3, [-1.0] * 3], dtype=torch.float64)
    levels: list[tuple[Any, Tensor]] = [("seq_sum", mask.double()), ("seq_mean", mask / mask.sum(-1, keepdim=True))]
    for level, weight in levels:
        rows = sequence_ratio_clip(logp, logp.detach(), advantage, mask, level=level, eps_low=0.2, eps_high=0.2)
        (grad,) = torch.autograd.grad(rows.sum(), logp)
        assert torch.allclose(grad, -advantage * weight, atol=1e-7)


def test_a_row_without_tokens_gives_zero() -> None:
    empty = torch.zeros(1, 2, dtype=torch.bool)
    x = torch.full((1, 2), 3.0)
    assert sequence_ratio_clip(x, -x, x, empty, level="seq_mean", eps_low=0.2, eps_high=0.2).tolist() == [0.0]


def test_entropy_bonus() -> None:
    assert entropy_bonus(torch.tensor([[0.5]])).item() == -0.5


def one_token(objective: Any, ratio: float, advantage: float, **settings: Any) -> tuple[float, float]:
    """Loss of one token at a log-prob of log(ratio), and its gradient."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss = objective(logp, torch.zeros_like(logp), torch.full_like(logp, advantage), **settings)
    return loss.item(), torch.autograd.grad(loss.sum(), logp)[0].item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [
        (1.5, 1.0, -1.28),  # the weight is cut to 1.28 and the token still learns, where PPO's gradient is 0
        (1.0, 1.0, -1.0),  # REINFORCE
        (1.5, -1.0, 1.28),
        (0.5, 1.0, -0.5),  # no floor
    ],
)
def test_cispo_bounds_the_weight_and_keeps_the_gradient(ratio: float, advantage: float, gradient: float) -> None:
    loss, found = one_token(cispo, ratio, advantage, cap=1.28, floor=None)
    assert found == pytest.approx(gradient) and loss == pytest.approx(gradient * math.log(ratio))


def test_cispo_with_a_floor() -> None:
    assert one_token(cispo, 0.5, 1.0, cap=1.2, floor=0.8)[1] == pytest.approx(-0.8)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (5.0, -1.0, 4.0, 0.0),  # -min(-min(5, 4), -1.2) = 4
        (3.0, -1.0, 3.0, 3.0),
        (1.5, 1.0, -1.2, 0.0),
        (0.5, -1.0, 0.8, 0.0),
    ],
)
def test_two_sided_clip(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    found = one_token(two_sided_clip, ratio, advantage, eps_low=0.2, eps_high=0.2, delta=4.0)
    assert found == pytest.approx((loss, gradient))


def test_gspo_token_is_gspo_where_a_row_has_one_advantage() -> None:
    random = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)
    old = -torch.rand(3, 4, dtype=torch.float64, generator=random)
    logp = (old + 0.4 * torch.randn(3, 4, dtype=torch.float64, generator=random)).requires_grad_()
    advantage = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64).expand(3, 4)
    for eps in (0.02, 10.0):  # some rows are clipped, none is
        rows = sequence_ratio_clip(logp, old, advantage, mask, level="seq_mean", eps_low=eps, eps_high=eps)
        tokens = gspo_token(logp, old, advantage, mask, eps_low=eps, eps_high=eps)
        mean = (tokens * sequence_mean(mask)).sum()
        assert torch.allclose(mean, rows.mean(), atol=1e-12)
        one, two = torch.autograd.grad(mean, logp)[0], torch.autograd.grad(rows.mean(), logp)[0]
        assert torch.allclose(one, two, atol=1e-12) and one.abs().max() > 0.01
