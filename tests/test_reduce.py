"""Reductions: the four weights, empty rows, empty masks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from rlhf_cli.reduce import constant_length, sequence_mean, sequence_sum, token_mean

RULES = [token_mean, sequence_mean, sequence_sum, partial(constant_length, length=8)]
# rows of 2 and 4 tokens with losses 1 and 0.5: (2 + 2)/6, (1 + 0.5)/2, (2 + 2)/2, (2 + 2)/(2 * 8)
EXPECTED = [4 / 6, 0.75, 2.0, 0.25]
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
LOSS = torch.tensor([[1.0, 1.0, 7.0, 7.0], [0.5, 0.5, 0.5, 0.5]])


@pytest.mark.parametrize(("rule", "expected"), zip(RULES, EXPECTED, strict=True))
def test_hand_numbers(rule: Callable[..., Any], expected: float) -> None:
    assert (rule(MASK) * LOSS).sum().item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("rule", "expected"), zip(RULES, EXPECTED, strict=True))
def test_a_row_without_tokens_is_left_out(rule: Callable[..., Any], expected: float) -> None:
    mask = torch.cat([MASK, torch.zeros(3, 4, dtype=torch.bool)])
    loss = torch.cat([LOSS, torch.full((3, 4), 100.0)])
    assert (rule(mask) * loss).sum().item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_an_empty_mask_gives_zeros(rule: Callable[..., Any]) -> None:
    weights = rule(torch.zeros(2, 3, dtype=torch.bool))
    assert weights.dtype == torch.float32 and torch.equal(weights, torch.zeros(2, 3))
    assert rule(torch.zeros(0, 3, dtype=torch.bool)).shape == (0, 3)


@pytest.mark.parametrize("rule", RULES[:2])
def test_means_sum_to_one(rule: Callable[..., Any]) -> None:
    assert rule(MASK).sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_holes_in_the_mask_do_not_count(rule: Callable[..., Any]) -> None:
    # the same number of tokens elsewhere in the row: the same sum
    moved = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    loss = torch.tensor([[7.0, 1.0, 7.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    assert torch.allclose((rule(moved) * loss).sum(), (rule(MASK) * LOSS).sum())
