"""Importance corrections: weights worked out by hand, and the stage that applies them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli import correction, stages
from rlhf_cli.types import Experience

LOG2 = math.log(2.0)
# Row 0: ratios 2, 1/2 and a masked 8. Row 1: ratios 4, 4, 1/2.
DIFFERENCE = torch.tensor([[LOG2, -LOG2, 3 * LOG2], [2 * LOG2, 2 * LOG2, -LOG2]])
MASK = torch.tensor([[True, True, False], [True, True, True]])
BEHAVIOR = torch.tensor([[-3.0, -1.0, -2.0], [-4.0, -5.0, -1.0]])
OLD = BEHAVIOR + DIFFERENCE
GAP = (1 + 1 + 2 + 2 + 1) * LOG2 / 5  # mean over trained tokens


def near(found: Tensor, wanted: list[list[float]]) -> None:
    assert torch.allclose(found.float(), torch.tensor(wanted, dtype=torch.float32), atol=1e-5)


def test_truncated_token() -> None:
    weight, bounded = correction.truncated_token(OLD, BEHAVIOR, MASK, cap=3.0, threshold=0.0)
    near(weight, [[2, 0.5, 0], [3, 3, 0.5]])
    near(bounded, [[0, 0, 0], [1, 1, 0]])


def test_truncated_sequence_multiplies_a_rows_ratios() -> None:
    weight, bounded = correction.truncated_sequence(OLD, BEHAVIOR, MASK, cap=3.0, threshold=0.0)
    near(weight, [[1, 1, 0], [3, 3, 3]])  # 2 x 1/2, and 4 x 4 x 1/2 = 8 cut to 3
    near(bounded, [[0, 0, 0], [1, 1, 1]])


def test_masked_token() -> None:
    weight, bounded = correction.masked_token(OLD, BEHAVIOR, MASK, low=0.6, high=3.0, threshold=0.0)
    near(weight, [[2, 0, 0], [0, 0, 0]])
    near(bounded, [[0, 1, 0], [1, 1, 1]])


def test_masked_sequence_judges_the_geometric_mean() -> None:
    weight, bounded = correction.masked_sequence(OLD, BEHAVIOR, MASK, low=0.5, high=1.5, threshold=0.0)
    near(weight, [[1, 1, 0], [0, 0, 0]])  # means 1 and 8^(1/3) = 2
    near(bounded, [[0, 0, 0], [1, 1, 1]])


RULES = [
    (correction.truncated_token, {"cap": 3.0}),
    (correction.truncated_sequence, {"cap": 3.0}),
    (correction.masked_token, {"low": 0.6, "high": 3.0}),
    (correction.masked_sequence, {"low": 0.5, "high": 1.5}),
]
each_rule = pytest.mark.parametrize(("rule", "settings"), RULES, ids=lambda x: getattr(x, "__name__", ""))


@each_rule
def test_off_while_the_gap_is_small_and_on_above_it(rule: Any, settings: dict[str, float]) -> None:
    weight, bounded = rule(OLD, BEHAVIOR, MASK, threshold=GAP * 1.001, **settings)
    assert torch.equal(weight, MASK.float()) and not bounded.any()
    weight, bounded = rule(OLD, BEHAVIOR, MASK, threshold=GAP * 0.999, **settings)
    assert not torch.equal(weight, MASK.float()) and bounded.any()


@each_rule
def test_constant_finite_and_one_where_both_agree(rule: Any, settings: dict[str, float]) -> None:
    old = OLD.clone().requires_grad_()
    assert not rule(old, BEHAVIOR, MASK, threshold=0.0, **settings).weight.requires_grad
    far = rule(BEHAVIOR + 1e4, BEHAVIOR, MASK, threshold=0.0, **settings)
    assert far.weight.isfinite().all()
    near(rule(BEHAVIOR, BEHAVIOR, MASK, threshold=-1.0, **settings).weight, MASK.float().tolist())


def test_the_stage_weighs_advantages_and_reports() -> None:
    counted: dict[str, float] = {}
    exp = Experience(
        ids=torch.zeros(2, 3, dtype=torch.int64), mask=MASK, old_logp=OLD, behavior_logp=BEHAVIOR, advantage=torch.tensor([[1.0, 1, 0], [-2, -2, -2]]),
    )  # fmt: skip

    def rule(old_logp: Tensor, behavior_logp: Tensor, mask: Tensor) -> correction.Correction:
        return correction.truncated_token(old_logp, behavior_logp, mask, cap=3.0, threshold=0.0)

    done = stages.correcting(
        rule, lambda numbers, stage: counted.update({f"{stage}/{k}": v for k, v in numbers.items()})
    )(exp)
    near(done.advantage, [[2, 0.5, 0], [-6, -6, -1]])
    assert counted == pytest.approx(
        {"correction/gap": GAP, "correction/on": 1.0, "correction/weight": 9 / 5, "correction/bounded": 2 / 5}
    )
