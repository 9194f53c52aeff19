"""Fingerprints of weights: they add up over parts, see any change they read, and visit everything in time."""

import pytest
import torch

from rlhf_cli.rollout.fingerprint import COLUMNS, add, block, checksum, column_sum, of_tensor, whole_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_by_rows_and_by_columns_add_up(dtype: torch.dtype) -> None:
    w = torch.randn(12, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    for turn in range(4):
        whole = of_tensor(w, turn)
        assert whole == add([of_tensor(w[:5], turn), of_tensor(w[5:], turn)])
        columns = block(40, turn)
        left, right = [c for c in columns if c < 20], [c for c in columns if c >= 20]
        assert whole == add([column_sum(w[:, left], left), column_sum(w[:, right], right)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smallest_change_is_seen_within_one_round(dtype: torch.dtype) -> None:
    w = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    for column in (0, 17, 49):
        other = w.clone()
        one = w[3, column]
        other[3, column] = one + one.abs() * torch.finfo(dtype).eps  # one step
        assert other[3, column] != one
        turns = range(-(-50 // COLUMNS))
        assert [of_tensor(w, t) != of_tensor(other, t) for t in turns].count(True) >= 1
        assert whole_sum(w) != whole_sum(other) and checksum(w) != checksum(other)


def test_exchanged_columns_are_seen() -> None:
    w = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    assert of_tensor(w, 0) != of_tensor(w[:, [1, 0, *range(2, 8)]], 0)


def test_what_kernels_lose_does_not_count() -> None:
    w = torch.tensor([[1.0, -0.0], [1e-40, 2.0]])
    assert of_tensor(w, 0) == of_tensor(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), 0)


def test_every_column_has_its_turn() -> None:
    assert {c for turn in range(4) for c in block(50, turn)} == set(range(50))
    assert block(3, 7) == [0, 1, 2]
