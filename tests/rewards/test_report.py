"""The report of a reward over a file: statistics, rank correlations, agreement, warnings."""

import math

import pytest
import torch

from rlhf_cli.rewards.agreement import agreement, kendall
from rlhf_cli.rewards.combine import Combined
from rlhf_cli.rewards.report import render, report, spearman
from rlhf_cli.types import Sample, Scores

GROUP = torch.tensor([0, 0, 0, 1, 1, 1])


def texts(*word_counts):
    return [Sample("p", " ".join(f"w{i}" for i in range(n)), uid=str(i)) for i, n in enumerate(word_counts)]


def given(*values):
    x = torch.tensor(values)
    return lambda samples, group: Scores(x, x.isnan())


def one(*values):
    return Combined({"x": (1.0, given(*values))})


def test_spearman_by_hand():
    # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * (1 + 1 + 1 + 1) / (4 * 15) = 0.6.
    assert spearman(torch.tensor([1.0, 2, 3, 40]), torch.tensor([2.0, 1, 4, 3])) == pytest.approx(0.6)
    # Ties share their mean rank: 1.5 1.5 3 against 1 2 3, centred -.5 -.5 1 and -1 0 1: 1.5 / sqrt(1.5 * 2).
    assert spearman(torch.tensor([0.0, 0, 9]), torch.tensor([1.0, 2, 3])) == pytest.approx(1.5 / math.sqrt(3))
    assert math.isnan(spearman(torch.ones(3), torch.tensor([1.0, 2, 3])))


def test_agreement_counts_a_tie_as_half_and_leaves_missing_out():
    value, words = torch.tensor([3.0, 1.0, 1.0, float("nan")]), torch.ones(4)
    got = agreement(value, torch.tensor([[0, 1], [1, 0], [1, 2], [0, 3]]), words)
    assert (got.pairs, got.accuracy, got.ties) == (3, 0.5, 1)
    nothing = agreement(value, torch.zeros(0, 2, dtype=torch.int64), words)
    assert math.isnan(nothing.accuracy) and math.isnan(nothing.tau) and (nothing.pairs, nothing.ties) == (0, 0)


def test_kendall_by_hand():
    # Of the pairs of 1 2 3 4 and 1 3 2 4 five agree and one does not: (5 - 1) / 6.
    assert kendall(torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 3, 2, 4])) == pytest.approx(4 / 6)
    # 1 1 2 against 1 2 3: two of three pairs agree, one is a tie on the left: 2 / sqrt(2 * 3).
    assert kendall(torch.tensor([1.0, 1, 2]), torch.tensor([1.0, 2, 3])) == pytest.approx(2 / math.sqrt(6))
    assert math.isnan(kendall(torch.ones(3), torch.tensor([1.0, 2, 3])))
    # A missing value leaves its row out: 1 3 against 1 2.
    assert kendall(torch.tensor([1.0, float("nan"), 3]), torch.tensor([1.0, 9, 2])) == 1


def test_agreement_with_rankings_and_by_length():
    # Two prompts: values follow the recorded scores in the first and oppose them in the second.
    value, recorded = torch.tensor([1.0, 2, 3, 3, 2, 1]), torch.tensor([10.0, 20, 30, 10, 20, 30])
    words = torch.tensor([9.0, 10, 100, 9, 10, 100])
    pairs = torch.tensor([[2, 0], [1, 0], [5, 3], [3, 5]])
    got = agreement(value, pairs, words, recorded, [torch.arange(3), torch.arange(3, 6)])
    assert (got.tau, got.prompts, got.accuracy) == (0.0, 2, 0.75)
    # [2,0] and [5,3]: the winner is ten times as long, right and wrong; [1,0]: 11/10 is alike, right; [3,5]: shorter, right.
    assert got.bands == ((1.0, 1), (1.0, 1), (0.5, 2))


def test_statistics():
    got = report(texts(3, 1, 2, 2, 3, 1), GROUP, one(0.0, 1.0, 2.0, 3.0, 4.0, float("nan")))
    (row,) = got.rows
    assert (got.samples, got.groups, got.comparable_groups) == (6, 2, 2)
    assert (row.name, row.weight, row.mean, row.low, row.high, row.missing) == ("x", 1.0, 2.0, 0.0, 4.0, 1)
    assert row.std == pytest.approx(math.sqrt(2)) and row.quantiles == pytest.approx((0.4, 2.0, 3.6))
    assert row.milliseconds is not None and row.milliseconds >= 0
    assert got.warnings == ("x: 1 of 6 samples could not be scored; they would be left out of training",)


def warnings(samples, combined):
    return report(samples, GROUP, combined).warnings


def test_a_healthy_reward_warns_of_nothing():
    # Ranks 1 2 3 against lengths 2 3 1 in both groups: -0.5 inside each, not beyond the limit.
    assert warnings(texts(4, 6, 2, 5, 7, 3), one(1.0, 2.0, 3.0, 1.5, 2.5, 3.5)) == ()


def test_constant_output():
    got = warnings(texts(1, 2, 3, 1, 2, 3), one(*[0.25] * 6))
    assert got == ("x: every sample scores 0.25; a constant reward teaches nothing",)


def test_constant_within_groups():
    got = warnings(texts(1, 2, 3, 1, 2, 3), one(0.0, 0.0, 0.0, 1.0, 1.0, 1.0))
    assert got == ("x: constant within every one of the 2 groups; group-relative methods get no signal",)
    got = warnings(texts(1, 2, 3, 2, 1, 3), one(0.0, 0.0, 0.0, 1.0, 1.0, 2.0))
    assert "x: constant within 1 of 2 groups; those groups give no signal" in got


def test_length_correlation():
    got = warnings(texts(1, 2, 3, 4, 5, 6), one(1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    assert got == (
        "x: rank correlation with response length is +1.00 over all samples, +1.00 within groups (limit 0.5); "
        "writing longer may be enough to raise it",
    )
    assert "writing shorter" in warnings(texts(6, 5, 4, 3, 2, 1), one(1.0, 2.0, 3.0, 4.0, 5.0, 6.0))[0]
    got = warnings(texts(1, 2, 3, 4, 5, 6), one(4.0, 5.0, 6.0, 1.0, 2.0, 3.0))
    # Ranks 4 5 6 1 2 3 against 1..6: 1 - 6 * (6 * 9) / (6 * 35) = -0.54; inside the groups +1.
    assert "is -0.54 over all samples, +1.00 within groups" in got[0] and "writing longer" in got[0]


def test_duplicates_and_empty_responses():
    got = warnings(texts(2, 2, 3, 0, 2, 3), one(1.0, 1.5, 1.2, 0.7, 0.6, 0.65))
    assert "1 of 6 responses repeat another response to the same prompt" in got
    assert "1 of 6 responses are empty" in got


def test_several_components_and_rendering():
    part = torch.tensor([1.0] * 6)
    b = lambda samples, group: Scores(torch.full((6,), 2.0), None, {"found": part})  # noqa: E731
    combined = Combined({"a": (1.0, given(1.0, 2.0, 3.0, 1.5, 2.5, 3.5)), "b": (0.5, b)})
    got = report(texts(4, 6, 2, 5, 7, 3), GROUP, combined, torch.tensor([[2, 0], [0, 1]]))
    assert [r.name for r in got.rows] == ["reward", "a", "b", "b/found"]
    total, a, b, found = got.rows
    assert total.mean == pytest.approx(a.mean + 1.0) and total.milliseconds >= a.milliseconds
    assert (a.agreement.accuracy, a.agreement.ties, b.agreement.accuracy, b.agreement.ties) == (0.5, 0, 0.5, 2)
    assert found.weight is None and found.milliseconds is None
    text = render(got)
    assert [line.split()[0] for line in text.splitlines()[2:7]] == ["component", "reward", "a", "b", "/found"]
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("6 samples in 2 groups, 2 recorded pairs")
    assert "warning: b: every sample scores 2; a constant reward teaches nothing" in text
    # [2,0]: 2 words beat 4, [0,1]: 4 beat 6; both winners are shorter, and a is right on the first alone.
    table = text[text.index("agreement ") :].splitlines()
    assert table[2].split() == ["a", "2", "0.500", "0", "-", "0.500", "-", "-"]
    assert "2 shorter, 0 alike, 0 longer" in text
    assert "no warnings" in render(report(texts(4, 6, 2, 5, 7, 3), GROUP, one(1.0, 2.0, 3.0, 1.5, 2.5, 3.5)))
