"""Shapers and the place where a score lands."""

import pytest
import torch

from rlhf_cli.compose import compose
from rlhf_cli.shaping import clip, missing_eos, overlong, scale, sequence_kl, token_kl
from rlhf_cli.shaping.place import at_end

MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
BEHAVIOR = torch.tensor([[-1.0, -1.0, -9.0, -9.0], [-9.0, -2.0, -9.0, -1.0], [-9.0, -9.0, -9.0, -9.0]])
REF = torch.tensor([[-1.5, -0.5, 0.0, 0.0], [0.0, -1.0, 0.0, -1.5], [0.0, 0.0, 0.0, 0.0]])


def test_at_end_is_the_last_mask_token_and_nothing_for_an_empty_row() -> None:
    placed = at_end(torch.tensor([2.0, 3.0, float("nan")]), MASK)
    assert placed.tolist() == [[0, 2, 0, 0], [0, 0, 0, 3], [0, 0, 0, 0]]


def test_token_kl_k1() -> None:
    # d = (0.5, -0.5) and (-1, 0.5) on mask tokens; -beta d with beta 0.1
    shaped = token_kl(BEHAVIOR, REF, MASK, beta=0.1, kind="k1")
    assert torch.allclose(shaped, torch.tensor([[-0.05, 0.05, 0, 0], [0, 0.1, 0, -0.05], [0, 0, 0, 0]]))


@pytest.mark.parametrize(("kind", "first"), [("k2", -0.0125), ("k3", -0.0106531)])
def test_token_kl_other_kinds(kind: str, first: float) -> None:
    # d = 0.5: k2 0.125, k3 0.106531
    shaped = token_kl(BEHAVIOR, REF, MASK, beta=0.1, kind=kind)  # type: ignore[arg-type]
    assert shaped[0, 0].item() == pytest.approx(first, abs=1e-7)


def test_sequence_kl_sums_the_row() -> None:
    # sums of d: 0, -0.5, 0; score 1 - 0.1 * sum
    shaped = sequence_kl(torch.ones(3), BEHAVIOR, REF, MASK, beta=0.1)
    assert torch.allclose(shaped, torch.tensor([1.0, 1.05, 1.0]))


def test_sequence_kl_is_score_plus_the_sum_of_token_kl() -> None:
    score = torch.tensor([1.0, 2.0, 3.0])
    tokens = token_kl(BEHAVIOR, REF, MASK, beta=0.3, kind="k1")
    assert torch.allclose(sequence_kl(score, BEHAVIOR, REF, MASK, beta=0.3), score + tokens.sum(-1))


def test_clip_and_scale() -> None:
    score = torch.tensor([-20.0, 1.0, 11.0])
    assert clip(score, low=-10.0, high=10.0).tolist() == [-10, 1, 10]
    assert scale(score, factor=0.5).tolist() == [-10, 0.5, 5.5]


def test_overlong() -> None:
    # limit 100, buffer 20: 80 -> 0, 90 -> -.5, 100 -> -1, 101 -> -1; below, nothing
    length = torch.tensor([10, 80, 90, 100, 101])
    mask = torch.arange(101) < length[:, None]
    shaped = overlong(torch.zeros(5), mask, max_tokens=100, buffer=0.2, factor=1.0)
    assert torch.allclose(shaped, torch.tensor([0.0, 0.0, -0.5, -1.0, -1.0]))
    assert torch.allclose(overlong(torch.ones(5), mask, max_tokens=100, buffer=0.2, factor=0.5), 1 + 0.5 * shaped)


@pytest.mark.parametrize("longest", [8, 32, 20480])
def test_overlong_begins_at_four_fifths_of_whatever_is_allowed(longest: int) -> None:
    node = compose("train", ["algo=dapo", f"rollout.max_tokens={longest}"], None).shaping.overlong
    settings = {k: v for k, v in node.items() if k != "_target_"}
    length = torch.tensor([0.1, 0.5, 0.79, 0.9, 1.0]) * longest
    mask = torch.arange(longest) < length.round()[:, None]
    penalty = -overlong(torch.zeros(5), mask, **settings)
    assert penalty[:3].tolist() == [0, 0, 0] and float(penalty[4]) == pytest.approx(1)
    assert float(penalty[3]) == pytest.approx((round(0.9 * longest) / longest - 0.8) / 0.2, abs=1e-5)


def test_overlong_without_buffer_is_a_step() -> None:
    mask = torch.arange(6) < torch.tensor([4, 5, 6])[:, None]
    assert overlong(torch.zeros(3), mask, max_tokens=4, buffer=0.0, factor=1.0).tolist() == [0, -1, -1]


def test_missing_eos() -> None:
    assert missing_eos(torch.ones(2), torch.tensor([True, False]), penalty=0.25).tolist() == [0.75, 1.0]
