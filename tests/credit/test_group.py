"""Group credits against hand numbers; ragged groups, ties, single rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.credit import (
    RunningMean,
    batch_leave_one_out,
    batch_mean,
    greedy_baseline,
    group_norm,
    group_norm_at_token,
    group_norm_to_go,
    group_whitened,
    leave_one_out,
)
from rlhf_cli.shaping.place import at_end

grpo = partial(group_norm, scale="std", ddof=1, eps=1e-4)
dr_grpo = partial(group_norm, scale="none", ddof=1, eps=0.0)
ONE_TOKEN = torch.ones(4, 1, dtype=torch.bool)
SAME = torch.zeros(4, dtype=torch.int64)


def rows(credit: Callable[..., Any], score: list[float], group: Tensor | None = None) -> Tensor:
    """Advantage per row, one token each."""
    group = torch.zeros(len(score), dtype=torch.int64) if group is None else group
    made = credit(torch.tensor(score, dtype=torch.float32), torch.ones(len(score), 1, dtype=torch.bool), group)
    assert made.returns is None and made.advantage.dtype == torch.float32
    return made.advantage[:, 0]


@pytest.mark.parametrize(
    ("credit", "score", "expected"),
    [
        # mean 0.5, sample std sqrt(4 * .25 / 3) = .57735: .5 / .57735 = .866025, with eps .865875
        (grpo, [1, 0, 0, 1], [0.865875, -0.865875, -0.865875, 0.865875]),
        (partial(group_norm, scale="std", ddof=1, eps=0.0), [1, 0, 0, 1], [0.866025, -0.866025, -0.866025, 0.866025]),
        # population std 0.5
        (partial(group_norm, scale="std", ddof=0, eps=0.0), [1, 0, 0, 1], [1, -1, -1, 1]),
        # mean .25, sample std sqrt((.5625 + 3 * .0625) / 3) = .5
        (partial(group_norm, scale="std", ddof=1, eps=0.0), [1, 0, 0, 0], [1.5, -0.5, -0.5, -0.5]),
        # K = 2 keeps the sign: half the difference over (difference / sqrt 2)
        (partial(group_norm, scale="std", ddof=1, eps=0.0), [7, 3], [0.707107, -0.707107]),
        (dr_grpo, [1, 0, 0, 1], [0.5, -0.5, -0.5, 0.5]),
        # others' means: 1/3 for a 1, 2/3 for a 0
        (leave_one_out, [1, 0, 0, 1], [0.666667, -0.666667, -0.666667, 0.666667]),
        (leave_one_out, [1, 0, 0, 0], [1, -0.333333, -0.333333, -0.333333]),
        # K = 2: the difference
        (leave_one_out, [7, 3], [4, -4]),
    ],
)
def test_hand_numbers(credit: Callable[..., Any], score: list[float], expected: list[float]) -> None:
    assert torch.allclose(rows(credit, score), torch.tensor(expected, dtype=torch.float32), atol=1e-6)


@pytest.mark.parametrize(
    "credit", [grpo, partial(group_norm, scale="std", ddof=1, eps=0.0), dr_grpo, leave_one_out, group_whitened]
)
def test_equal_scores_and_single_rows_get_exactly_zero(credit: Callable[..., Any]) -> None:
    # in float32 the mean of seven 0.7 is not 0.7; group 5 has one row
    assert torch.full((7,), 0.7).sum() / 7 != torch.tensor(0.7)
    got = rows(credit, [0.7] * 7 + [3.0], torch.tensor([0] * 7 + [5]))
    assert torch.equal(got, torch.zeros(8))


@pytest.mark.parametrize("credit", [grpo, dr_grpo, leave_one_out])
def test_interleaved_ragged_groups_equal_each_group_alone(credit: Callable[..., Any]) -> None:
    score = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    group = torch.tensor([8, 2, 8, 2, 2, 11, 8])
    got = rows(credit, score, group)
    for label in (8, 2, 11):
        member = (group == label).nonzero().squeeze(-1)
        assert torch.allclose(got[member], rows(credit, [score[i] for i in member.tolist()]), atol=1e-6)


def test_leave_one_out_equals_the_slow_definition() -> None:
    score = torch.tensor([0.3, -1.2, 2.2, 0.9, 0.4])
    slow = [score[i] - (score.sum() - score[i]) / 4 for i in range(5)]
    assert torch.allclose(rows(leave_one_out, score.tolist()), torch.stack(slow), atol=1e-6)


def test_group_norm_forgets_shift_and_scale_of_the_reward_and_dr_grpo_only_shift() -> None:
    score = [0.2, 0.9, 0.4, 0.1]
    moved = [10 * x + 3 for x in score]
    exact = partial(group_norm, scale="std", ddof=1, eps=0.0)
    assert torch.allclose(rows(exact, moved), rows(exact, score), atol=1e-5)
    assert torch.allclose(rows(dr_grpo, moved), 10 * rows(dr_grpo, score), atol=1e-5)


def test_group_whitened_is_reinforce_pp_baseline() -> None:
    # two groups, centred: +-.5 and (.75, -.25 x3); biased variance (4 * .25 + .75) / 8 = .21875, std .467707
    got = rows(group_whitened, [1, 0, 0, 1, 1, 0, 0, 0], torch.tensor([0] * 4 + [1] * 4))
    expected = torch.tensor([1.0690, -1.0690, -1.0690, 1.0690, 1.6036, -0.5345, -0.5345, -0.5345])
    assert torch.allclose(got, expected, atol=1e-4)


def test_batch_mean() -> None:
    made = batch_mean(torch.tensor([1.0, 0.0, 0.0, 1.0]), ONE_TOKEN)
    assert made.advantage[:, 0].tolist() == [0.5, -0.5, -0.5, 0.5]
    seven = torch.ones(7, 1, dtype=torch.bool)
    assert torch.equal(batch_mean(torch.full((7,), 0.7), seven).advantage, torch.zeros(7, 1))


def test_the_baseline_of_the_others_does_not_move_with_the_rows_own_reward() -> None:
    # (1, 0, 0, 1): the others of a 1 have mean 1/3, those of a 0 have 2/3
    made = batch_leave_one_out(torch.tensor([1.0, 0.0, 0.0, 1.0]), ONE_TOKEN).advantage[:, 0]
    assert torch.allclose(made, torch.tensor([2, -2, -2, 2]) / 3)
    raised = batch_leave_one_out(torch.tensor([4.0, 0.0, 0.0, 1.0]), ONE_TOKEN).advantage[:, 0]
    assert torch.allclose(raised[0] - made[0], torch.tensor(3.0)), "the baseline stays: all of the 3 is advantage"
    seven = torch.ones(7, 1, dtype=torch.bool)
    assert torch.equal(batch_leave_one_out(torch.full((7,), 0.7), seven).advantage, torch.zeros(7, 1))
    assert batch_leave_one_out(torch.tensor([0.7]), seven[:1]).advantage.tolist() == [[pytest.approx(0.7)]]


def test_advantage_is_zero_outside_the_mask() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    advantage = dr_grpo(torch.tensor([1.0, 0.0, 0.0, 1.0]), mask, SAME).advantage
    assert advantage.tolist() == [[0.5, 0.5, 0], [-0.5, 0, -0.5], [0, 0, 0], [0.5, 0.5, 0.5]]


def test_to_go_adds_the_penalty_after_the_baseline() -> None:
    # centred score +-.5; token penalties -.1, -.2, -.3: to go -.6, -.5, -.3
    mask = torch.ones(2, 3, dtype=torch.bool)
    score = torch.tensor([1.0, 0.0])
    penalty = torch.tensor([[-0.1, -0.2, -0.3], [0.0, 0.0, 0.0]])
    made = group_norm_to_go(
        score, penalty + at_end(score, mask), mask, torch.tensor([3, 3]), scale="none", ddof=1, eps=0.0
    )
    assert torch.allclose(made.advantage, torch.tensor([[-0.1, 0.0, 0.2], [-0.5, -0.5, -0.5]]), atol=1e-6)


def test_at_token_adds_each_token_s_own_penalty() -> None:
    # the same numbers, not summed
    mask = torch.tensor([[True, True, True], [True, True, False]])
    score = torch.tensor([1.0, 0.0])
    penalty = torch.tensor([[-0.1, -0.2, -0.3], [0.0, 0.0, 9.0]])
    reward = penalty + at_end(score, mask)
    made = group_norm_at_token(score, reward, mask, torch.tensor([3, 3]), scale="none", ddof=1, eps=0.0)
    assert torch.allclose(made.advantage, torch.tensor([[0.4, 0.3, 0.2], [-0.5, -0.5, 0.0]]), atol=1e-6)


def test_to_go_without_penalty_is_group_norm() -> None:
    score = torch.tensor([1.0, 0.0, 0.0, 1.0])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    made = group_norm_to_go(score, at_end(score, mask), mask, SAME, scale="std", ddof=1, eps=1e-4)
    assert torch.allclose(made.advantage, grpo(score, mask, SAME).advantage, atol=1e-6)


@pytest.mark.parametrize("credit", [grpo, leave_one_out, group_whitened])
def test_float64_stays_float64_and_no_rows_are_no_error(credit: Callable[..., Any]) -> None:
    score = torch.tensor([1.0, 0.0, 0.0, 2.0], dtype=torch.float64)
    assert credit(score, ONE_TOKEN, SAME).advantage.dtype == torch.float64
    assert credit(score[:0], ONE_TOKEN[:0], SAME[:0]).advantage.shape == (0, 1)


def test_the_greedy_score_is_the_baseline_of_the_reward_to_go() -> None:
    # rewards -0.1, -0.2 and the score 1 at the last token: to go 0.7, 0.8, 1 (0 outside), minus the greedy score 0.5
    mask = torch.tensor([[False, True, True, True]])
    reward = torch.tensor([[9.0, -0.1, -0.2, 1.0]])
    found = greedy_baseline(reward, torch.tensor([0.5]), mask)
    assert torch.allclose(found.advantage, torch.tensor([[0.0, 0.2, 0.3, 0.5]]))
    assert found.returns is not None and torch.allclose(found.returns, torch.tensor([[0.0, 0.7, 0.8, 1.0]]))


def test_a_running_mean_is_of_the_steps_before() -> None:
    credit = RunningMean(decay=0.9)
    one = torch.ones(2, 1, dtype=torch.bool)
    assert credit(torch.tensor([1.0, 3.0]), one).advantage.flatten().tolist() == [-1, 1]  # the first step's own mean
    assert credit(torch.tensor([3.0, 3.0]), one).advantage.flatten().tolist() == [1, 1]  # still 2
    other = RunningMean(decay=0.9)
    other.load_state_dict(credit.state_dict())
    assert other(torch.zeros(2), one).advantage[0].item() == pytest.approx(-2.1)  # 0.9 x 2 + 0.1 x 3
    assert other.stats == pytest.approx({"baseline": 2.1})
