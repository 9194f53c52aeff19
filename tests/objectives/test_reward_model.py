"""Bradley-Terry on scores 1.0 (chosen) and 0.2 (rejected): d = 0.8."""

import math

import pytest
import torch

from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.objectives import bradley_terry, bradley_terry_margin, centering, squared_error
from rlhf_cli.plan import validate

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


def test_regression_by_hand() -> None:
    score = SCORE.clone().requires_grad_()
    loss = squared_error(score, torch.tensor([0.5, 0.4]))
    assert torch.allclose(loss, torch.tensor([0.25, 0.04]))
    (grad,) = torch.autograd.grad(loss.mean(), score)
    assert torch.allclose(grad, torch.tensor([0.5, -0.2]))  # 2 (s - y) / N


def test_a_score_per_attribute_recovers_a_linear_teacher() -> None:
    g = torch.Generator().manual_seed(0)
    x, teacher = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((64, 6), (6, 4)))
    label, student = x @ teacher, torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        loss = torch.stack([squared_error(x @ student[:, k], label[:, k]).mean() for k in range(4)]).mean()
        (grad,) = torch.autograd.grad(loss, student)
        with torch.no_grad():
            student -= 0.8 * grad
    assert float(loss.detach()) < 1e-12 and torch.allclose(student, teacher, atol=1e-5)


def test_regression_is_planned_on_recorded_scores() -> None:
    words = ["algo=reward_model", "objective@updates.reward.preference.objective=squared_error", "dataset=scored"]
    plan = validate(compose("train", words, None))
    assert plan.source == "recorded" and plan.learners == {"reward": "score"}
    with pytest.raises(
        ConfigError, match=r"squared_error needs label; the dataset has no label: map it with dataset.columns"
    ):
        validate(compose("train", [*words[:2], "source=sampled"], None))
