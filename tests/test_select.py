"""Selection: ragged groups, ties, renumbered pairs, counts."""

import torch

from rlhf_cli.select import (
    all_pairs,
    best_of_n,
    best_vs_worst,
    drop_zero_variance,
    drop_zero_variance_mask_truncated,
    gives,
    group_pairs,
    grouped,
    keep_all,
    mask_truncated,
)

# group 7: rows 0, 2, 5 scores 1, 3, 3 (the best is tied); group 4: rows 1, 3 equal; group 9: row 4 alone
GROUP = torch.tensor([7, 4, 7, 4, 9, 7])
SCORE = torch.tensor([1.0, 0.1, 3.0, 0.1, 5.0, 3.0])


def test_grouped_numbers_groups_densely() -> None:
    g = grouped(SCORE, GROUP)
    assert g.index.tolist() == [1, 0, 1, 0, 2, 1] and g.size.tolist() == [2, 3, 1]
    assert torch.allclose(g.low, torch.tensor([0.1, 1.0, 5.0])) and torch.allclose(
        g.high, torch.tensor([0.1, 3.0, 5.0])
    )
    assert g.flat.tolist() == [True, False, True]


def test_keep_all_changes_nothing() -> None:
    assert keep_all() == (None, None, {})


def test_drop_zero_variance() -> None:
    keep, pairs, stats = drop_zero_variance(SCORE, GROUP, {}, metric="")
    assert keep is not None and keep.tolist() == [0, 2, 5] and pairs is None
    assert stats == {"dropped_rows": 3.0, "dropped_groups": 2.0}


def test_dynamic_sampling_can_judge_one_reward_alone() -> None:
    # scores differ by a format reward; all of group 4 is wrong, row 3 of group 0 right; unknown is not equal
    group, score = torch.tensor([4, 4, 0, 0, 9, 9]), torch.tensor([0.1, 0.2, 0.1, 1.2, 0.1, 0.3])
    parts = {"math": torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, float("nan")])}
    kept = {m: drop_zero_variance(score, group, parts, metric=m).keep.tolist() for m in ("", "math")}  # type: ignore[union-attr]
    assert kept == {"": [0, 1, 2, 3, 4, 5], "math": [2, 3, 4, 5]}


def test_best_vs_worst_takes_the_first_of_equals_and_renumbers() -> None:
    # best of group 7 is row 2 (row 5 ties, later), worst row 0; kept rows 0, 2 become 0, 1
    keep, pairs, stats = best_vs_worst(SCORE, GROUP)
    assert keep is not None and keep.tolist() == [0, 2]
    assert pairs is not None and pairs.dtype == torch.int64 and pairs.tolist() == [[1, 0]]
    assert stats == {"dropped_rows": 4.0, "dropped_groups": 2.0}


def test_best_vs_worst_has_one_pair_per_group() -> None:
    keep, pairs, _ = best_vs_worst(torch.tensor([1.0, 2.0, 0.0, 9.0, 8.0, 7.0]), torch.tensor([0, 0, 0, 1, 1, 1]))
    # rows 1 over 2, rows 3 over 5; kept 1, 2, 3, 5
    assert keep is not None and keep.tolist() == [1, 2, 3, 5]
    assert pairs is not None and pairs.tolist() == [[0, 1], [2, 3]]


def test_all_pairs() -> None:
    # group 7: rows 2 and 5 each beat row 0, and tie with one another; kept rows 0, 2, 5 become 0, 1, 2
    keep, pairs, stats = all_pairs(SCORE, GROUP)
    assert keep is not None and keep.tolist() == [0, 2, 5]
    assert pairs is not None and pairs.tolist() == [[1, 0], [2, 0]]
    assert stats == {"dropped_rows": 3.0, "dropped_groups": 2.0}


def test_all_pairs_of_four_different_scores_are_six() -> None:
    _, pairs, _ = all_pairs(torch.tensor([0.3, 0.1, 0.4, 0.2]), torch.zeros(4, dtype=torch.int64))
    assert pairs is not None and sorted(map(tuple, pairs.tolist())) == [(0, 1), (0, 3), (2, 0), (2, 1), (2, 3), (3, 1)]


def test_group_pairs_are_all_couples_of_a_group_the_better_row_first() -> None:
    found = group_pairs(torch.tensor([0.0, 2.0, 0.0, 5.0]), torch.tensor([7, 7, 7, 1]))
    assert found.keep is None and found.pairs is not None
    assert found.pairs.tolist() == [
        [0, 2],
        [1, 0],
        [1, 2],
    ]  # a tie keeps the order of the rows; a group of one has none


def test_best_of_n_keeps_row_order() -> None:
    # group 4: the first of two equal rows, 1; group 7: row 2; group 9: row 4
    keep, pairs, stats = best_of_n(SCORE, GROUP)
    assert keep is not None and keep.tolist() == [1, 2, 4] and pairs is None
    assert stats == {"dropped_rows": 3.0, "dropped_groups": 0.0}
    # labels that fall while rows rise
    keep, _, _ = best_of_n(SCORE[:3], torch.tensor([9, 4, 9]))
    assert keep is not None and keep.tolist() == [1, 2]
    keep, _, _ = best_of_n(SCORE[:2], torch.tensor([9, 4]))
    assert keep is not None and keep.tolist() == [0, 1]


def test_nothing_left_is_empty_not_an_error() -> None:
    flat, group = torch.ones(4), torch.tensor([0, 0, 1, 1])
    assert drop_zero_variance(flat, group, {}, metric="").keep.tolist() == []  # type: ignore[union-attr]
    for rule in (best_vs_worst, all_pairs):
        keep, pairs, stats = rule(flat, group)
        assert keep.shape == (0,) and pairs.shape == (0, 2)
        assert stats == {"dropped_rows": 4.0, "dropped_groups": 2.0}


def test_gives_marks() -> None:
    @gives("pairs", "margin")
    def rule() -> None: ...

    assert rule.gives == ("pairs", "margin")  # type: ignore[attr-defined]


def test_truncated_rows_leave_the_loss_and_stay_in_their_group() -> None:
    mask = torch.ones(6, 2, dtype=torch.bool)
    truncated = torch.tensor([True, False, False, False, True, False])
    found = mask_truncated(mask, truncated)
    assert found.keep is None and found.mask.sum(-1).tolist() == [0, 2, 2, 2, 0, 2]
    both = drop_zero_variance_mask_truncated(SCORE, GROUP, mask, truncated, {}, metric="")
    assert both.keep is not None and both.keep.tolist() == [0, 2, 5] and torch.equal(both.mask, found.mask)
    assert both.stats == {"dropped_rows": 3.0, "dropped_groups": 2.0, "masked_rows": 2.0}
