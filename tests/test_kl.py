"""KL estimators: values, bounds, and which divergence each one's gradient follows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.kl import ESTIMATORS, estimate
from rlhf_cli.objectives import kl_k1, kl_k2, kl_k3, kl_k3_corrected, kl_k3_straight

P = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)  # the policy
Q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)  # the reference


@pytest.mark.parametrize(("kind", "value"), [("k1", 0.5), ("k1_positive", 0.5), ("k2", 0.125), ("k3", 0.106531)])
def test_value(kind: str, value: float) -> None:
    # logp -1.0, ref -1.5: d = 0.5; d^2/2 = 0.125; e^-0.5 - 1 + 0.5 = 0.606531 - 0.5
    assert estimate(torch.tensor(0.5), kind).item() == pytest.approx(value, abs=1e-6)


def test_the_positive_part_is_biased_upward() -> None:
    # d = ln 3, ln .6, ln(1/3): only the first counts, .6 ln 3 = 0.659167 > KL = 0.396058
    assert estimate(torch.tensor(-0.5), "k1_positive").item() == 0.0
    assert (P * estimate((P / Q).log(), "k1_positive")).sum().item() == pytest.approx(0.659167, abs=1e-6)


@pytest.mark.parametrize(("kind", "value"), [("k1", 0.396058), ("k2", 0.461574), ("k3", 0.396058)])
def test_expected_value(kind: str, value: float) -> None:
    # KL(p||q) = .6 ln 3 + .3 ln .6 + .1 ln(1/3) = 0.396058 for k1, and for k3: the extra terms sum to 0
    assert (P * estimate((P / Q).log(), kind)).sum().item() == pytest.approx(value, abs=1e-6)


def on_policy(logp: Tensor, ref_logp: Tensor) -> Tensor:
    return kl_k3_corrected(logp, logp.detach(), ref_logp)


@pytest.mark.parametrize(
    ("objective", "gradient"),
    [
        (kl_k1, (0.0, 0.0, 0.0)),
        (kl_k2, (0.421532, -0.272065, -0.149467)),  # grad KL(p||q) = p (ln p/q - KL)
        (kl_k3, (0.4, -0.2, -0.2)),  # grad KL(q||p) = p - q
        (kl_k3_straight, (0.421532, -0.272065, -0.149467)),  # k2's
        (on_policy, (0.421532, -0.272065, -0.149467)),  # k3 grad logp + grad k3, in expectation grad E_p[k3]
    ],
)
def test_expected_gradient(objective: Callable[..., Any], gradient: tuple[float, ...]) -> None:
    # exact expectation over the 3 tokens: sampling probabilities fixed, the gradient through logp only
    z = P.log().requires_grad_()
    loss = (P * objective(z.log_softmax(-1), Q.log())).sum()
    (grad,) = torch.autograd.grad(loss, z)
    assert torch.allclose(grad, torch.tensor(gradient, dtype=torch.float64), atol=1e-6)


def test_k2_and_k3_gradients_are_those_of_the_two_divergences() -> None:
    def grad_of(divergence: Callable[..., Any]) -> Tensor:
        z = P.log().requires_grad_()
        return torch.autograd.grad(divergence(z.softmax(-1)), z)[0]

    forward = grad_of(lambda p: (p * (p / Q).log()).sum())
    reverse = grad_of(lambda p: (Q * (Q / p).log()).sum())
    assert torch.allclose(forward, torch.tensor([0.421532, -0.272065, -0.149467], dtype=torch.float64), atol=1e-6)
    assert torch.allclose(reverse, torch.tensor([0.4, -0.2, -0.2], dtype=torch.float64), atol=1e-6)


def test_no_overflow_and_exact_up_to_twenty() -> None:
    d = torch.tensor([-1e4, -20.0, -19.0, 19.0, 1e4], requires_grad=True)
    k3 = estimate(d, "k3")
    assert torch.isfinite(k3).all()
    # the middle: e^19 - 20 = 178482280.96
    assert k3[2].item() == pytest.approx(178482280.96, rel=1e-6)
    k3.sum().backward()
    assert d.grad is not None and d.grad[0] == 0 and d.grad[4] == 0  # constant outside
    assert d.grad[2].item() == pytest.approx(1 - 178482300.96, rel=1e-6)


def test_only_these_names() -> None:
    assert sorted(ESTIMATORS) == ["k1", "k1_positive", "k2", "k3"]
    with pytest.raises(KeyError, match="k4"):
        estimate(torch.zeros(1), "k4")  # type: ignore[arg-type]


def test_the_straight_k3_has_the_value_of_k3_and_the_corrected_one_that_of_the_whole_expectation() -> None:
    d = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    assert torch.allclose(kl_k3_straight(d, torch.zeros_like(d)), estimate(d, "k3"))
    # samples from q as the old policy: E_q[p / q k3] = E_p[k3] = KL(p||q) = 0.396058
    assert (Q * kl_k3_corrected(P.log(), Q.log(), Q.log())).sum().item() == pytest.approx(0.396058, abs=1e-6)
