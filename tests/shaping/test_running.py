"""Shapers with a memory: against statistics of everything seen, after a resume, and read without moving."""

import pytest
import torch

from rlhf_cli.shaping import MinMax, RunningClip, RunningNorm

STEPS = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1e4, -3.0]), torch.tensor([0.5])]


def make() -> list:
    return [RunningNorm(center=True, eps=0.0), RunningNorm(center=False, eps=0.0), RunningClip(sigmas=1.0), MinMax()]


def test_moments_are_those_of_all_scores_so_far() -> None:
    norm, scaled, clipped, _ = make()
    for i, step in enumerate(STEPS):
        seen = torch.cat(STEPS[: i + 1]).double()
        mean, std = seen.mean().item(), seen.std(correction=0).item()
        assert norm(step).tolist() == pytest.approx(((step - mean) / std).tolist(), rel=1e-6)
        assert scaled(step).tolist() == pytest.approx((step / std).tolist(), rel=1e-6)
        assert clipped(step).tolist() == pytest.approx(step.clamp(mean - std, mean + std).tolist(), rel=1e-6)
        assert norm.stats == pytest.approx({"running_mean": mean, "running_std": std})


def test_extremes() -> None:
    made = MinMax()
    assert made(torch.tensor([2.0, 2.0])).tolist() == [0, 0], "a constant first batch divides by nothing"
    assert made(torch.tensor([0.0, 3.0])).tolist() == [0, 1]
    assert made(torch.tensor([1.5])).tolist() == [0.5]
    assert made.stats == {"running_low": 0, "running_high": 3}


@pytest.mark.parametrize("i", range(4))
def test_a_resumed_memory_goes_on(i: int) -> None:
    first, second = make()[i], make()[i]
    second.load_state_dict(second.state_dict())  # an empty one survives too
    first(STEPS[0])
    second.load_state_dict(first.state_dict())
    for step in STEPS[1:]:
        assert torch.equal(first(step), second(step))


@pytest.mark.parametrize("i", range(4))
def test_reading_does_not_move(i: int) -> None:
    made = make()[i]
    made(STEPS[0])
    before = made.state_dict()
    made.frozen(STEPS[1])
    assert made.state_dict() == before
