"""GRPO-S: the coefficients by hand, the limits, and the sources of their columns."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.credit import difficulty_scaled, group_norm
from rlhf_cli.credit.difficulty import mean_by
from rlhf_cli.engine.step import term_losses, weights_of
from rlhf_cli.errors import ConfigError
from rlhf_cli.objectives import kl_k3, ppo_clip
from rlhf_cli.reduce import sequence_mean
from rlhf_cli.rewards.by_category import ByCategory
from rlhf_cli.rewards.clause_distance import ClauseDistance, clauses, distance
from rlhf_cli.types import Experience, Sample, Term

SCORE = torch.tensor([1.0, 0, 0, 1, 2, 0])
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
MASK = torch.ones(6, 2, dtype=torch.bool)
ONE = torch.zeros(6)


def scaled(hardness: Any, gap: Any, category: Tensor = ONE, **changes: Any) -> Tensor:
    settings: dict[str, Any] = {"sign": "formula", "tau": 1e9, "ddof": 1, "eps": 1e-4} | changes
    columns = (torch.as_tensor(hardness), torch.as_tensor(gap), category)
    return difficulty_scaled(SCORE, MASK, GROUP, *columns, **settings).advantage


PLAIN = group_norm(SCORE, MASK, GROUP, scale="std", ddof=1, eps=1e-4).advantage


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_equal_data_without_outliers_are_grpo_bit_for_bit() -> None:
    assert torch.equal(scaled([0.3] * 6, [0.1, 1.2, -0.7, 0.4, 0.9, 2.2]), PLAIN)
    assert torch.equal(scaled([0.3] * 6, [0.7] * 6, tau=0.0), PLAIN)


def test_hardness_by_hand() -> None:
    # prompts at .2 and .6, mean .4: sigmoid(.2)/sigmoid(.4) = .918399, sigmoid(.6)/sigmoid(.4) = 1.078453; rows of a prompt share it
    alpha = scaled([0.1, 0.2, 0.3, 0.6, 0.5, 0.7], [1.0] * 6) / PLAIN
    assert torch.allclose(alpha[:3], torch.tensor(0.918399), atol=1e-5)
    assert torch.allclose(alpha[3:][PLAIN[3:] != 0], torch.tensor(1.078453), atol=1e-5)
    prose = scaled([0.1, 0.2, 0.3, 0.6, 0.5, 0.7], [1.0] * 6, sign="prose") / PLAIN
    assert torch.allclose(prose[0], torch.tensor(sigmoid(0.8) / sigmoid(0.6)), atol=1e-5), (
        "1 - delta: .8 and .4, mean .6"
    )


def test_responsiveness_by_hand() -> None:
    # gaps 1, 2, 9 twice: mean 4, squares 9, 4, 25; tau 10 keeps 1 and 2: sigmoid(1.5) / sigmoid(4) = .832549
    gap = [1.0, 2, 9, 1, 2, 9]
    alpha = scaled([0.4] * 6, gap, tau=10.0) / PLAIN
    assert torch.allclose(alpha[PLAIN != 0], torch.tensor(0.832549), atol=1e-5)
    both = scaled([0.2] * 3 + [0.6] * 3, gap, tau=10.0) / PLAIN
    assert torch.allclose(both[0], torch.tensor(0.764612), atol=1e-5)
    assert torch.allclose(both[3:][PLAIN[3:] != 0], torch.tensor(0.897865), atol=1e-5)
    # twice the variance, 2 (9 + 4 + 25) / 3 = 25.3, keeps 25 too
    assert torch.equal(scaled([0.4] * 6, gap, tau=0.0), PLAIN)


def test_categories_are_apart_and_a_group_still_sums_to_zero() -> None:
    apart = scaled([0.2] * 3 + [0.6] * 3, [1.0] * 6, torch.tensor([1.0, 1, 1, 7, 7, 7]))
    assert torch.equal(apart, PLAIN), "each prompt is its category's mean"
    uneven = scaled(
        torch.rand(6, generator=torch.Generator().manual_seed(0)),
        torch.randn(6, generator=torch.Generator().manual_seed(1)),
        tau=0.5,
    )
    assert torch.allclose(uneven[:, 0].reshape(2, 3).sum(-1), torch.zeros(2), atol=1e-5)


def test_the_coefficient_scales_the_policy_gradient_and_not_the_kl_term() -> None:
    # the gaps of `test_responsiveness_by_hand`: alpha is 1 where all of them count, and .832549 where tau 10 leaves 9 out
    gap = [1.0, 2, 9, 1, 2, 9]
    g = torch.Generator().manual_seed(0)
    ref, old, logp = (-1 + 0.1 * torch.randn(6, 2, generator=g) for _ in range(3))
    logp.requires_grad_()
    clip = partial(ppo_clip, eps_low=0.2, eps_high=0.2, dual_clip=None)
    terms = [Term("surrogate", clip, sequence_mean), Term("kl", kl_k3, sequence_mean, 0.04)]
    grads = []
    for tau in (1e9, 10.0):
        advantage = scaled([0.4] * 6, gap, tau=tau)
        exp = Experience(
            ids=torch.zeros(6, 2, dtype=torch.int64), mask=MASK, old_logp=old, ref_logp=ref, advantage=advantage
        )
        losses = term_losses(terms, exp, {"logp": logp}, [weights_of(t, exp) for t in terms])
        grads.append([torch.autograd.grad(losses[t.name], logp, retain_graph=True)[0] for t in terms])
    (policy, kl), (other, same) = grads
    assert torch.allclose(other, 0.832549 * policy, atol=1e-6) and policy.abs().max() > 0.01
    assert torch.equal(same, kl) and kl.abs().max() > 1e-4


def test_means_of_equal_numbers_are_exact() -> None:
    x, index = torch.tensor([0.1, 0.1, 0.1, 7.0]), torch.tensor([0, 0, 0, 1])
    assert torch.equal(mean_by(x, index, torch.tensor([True, False, True, False])), x)


# -- where the columns come from ---------------------------------------------------------------------------------------


def test_clauses_and_their_distance() -> None:
    assert clauses("I won't help; call a friend, and stay.\nBye!") == ["i won't help", "call a friend", "stay", "bye"]
    e = torch.eye(3)
    # .6 e0 + .8 e1 is .8 from e1: mean of max cosines (1, .8) = .9
    assert distance([e[0], 0.6 * e[0] + 0.8 * e[1]], [e[0], e[1]]) == pytest.approx(0.1)
    assert distance([], [e[0]]) == 1.0


def test_clause_distance_is_zero_for_the_demonstration_itself() -> None:
    scorer = ClauseDistance.__new__(ClauseDistance)
    scorer.encode = lambda texts: torch.stack([torch.eye(5)[min(len(t), 4)] for t in texts])
    texts = ["abc. a", "", "abcd"]
    found = scorer([Sample("p", t, references=("abc, a",)) for t in texts], torch.zeros(3, dtype=torch.int64))
    assert found.value.tolist() == pytest.approx([0.0, 1.0, 1.0]) and torch.equal(
        found.components["hardness"], found.value
    )


def test_each_category_has_its_model_and_the_demonstration_is_scored_by_it() -> None:
    settings: dict[str, Any] = {
        "by": "category",
        "render": "turn",
        "batch_size": 4,
        "max_tokens": 99,
        "device": "cpu",
        "dtype": "fp32",
    }
    scorer = ByCategory(path="tiny:{category}", **settings)
    rows = [
        Sample("p", r, references=("a demonstration",), meta={"category": c}, uid=c)
        for c, r in (("1", "x"), ("2", "x"), ("1", "a demonstration"), ("1", "x"))
    ]
    found = scorer(rows, torch.tensor([0, 1, 0, 0]))
    assert found.missing is not None and not found.missing.any() and set(scorer.models) == {"1", "2"}
    value, gap, number = found.value, found.components["gap"], found.components["category"]
    assert value[0] == value[3] != value[1], "another model"
    assert torch.allclose(gap, found.components["demonstration"] - value)
    assert abs(float(gap[2])) < 1e-5, "what the demonstration says earns what it earns"
    assert number[0] == number[2] != number[1]
    with pytest.raises(ConfigError, match=r"map it with dataset.columns.meta.category=COLUMN"):
        scorer([Sample("p", "x", references=("d",), uid="u")], torch.zeros(1, dtype=torch.int64))
