"""Rules over rewards: numbers by hand, identities, missing rows."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from rlhf_cli import combine as c
from rlhf_cli.credit import gae, group_norm
from rlhf_cli.rewards.joining import by_rule

NAN = float("nan")
ROW = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
ONES = torch.ones(3, dtype=torch.float64)
NONE = torch.full((1, 3), NAN, dtype=torch.float64)
RULES = {
    "mean": c.mean, "minimum": c.minimum, "median": c.median, "uwo": partial(c.uwo, lam=0.5, ddof=1),
    "mean_minus_std": partial(c.mean_minus_std, lam=1.0, ddof=0),
}  # fmt: skip


def value(rule, row: Tensor = ROW, **columns: Tensor) -> float:
    return float(rule(row, torch.ones(row.shape[1], dtype=row.dtype), **columns))


def test_three_members_by_hand() -> None:
    # mean 3; squared deviations 4 + 1 + 9 = 14: variance 14/3 = 4.6667 and 14/2 = 7
    assert (value(c.mean), value(c.median), value(c.minimum)) == (3, 2, 1)
    assert value(partial(c.uwo, lam=0.5, ddof=0)) == pytest.approx(3 - 14 / 6) == pytest.approx(0.6667, abs=1e-4)
    assert value(partial(c.uwo, lam=0.5, ddof=1)) == pytest.approx(-0.5)
    assert value(partial(c.mean_minus_std, lam=1.0, ddof=0)) == pytest.approx(0.8398, abs=1e-4)
    assert value(partial(c.mean_minus_std, lam=1.0, ddof=1)) == pytest.approx(0.3542, abs=1e-4)


def test_members_1_2_4() -> None:
    row = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    assert value(c.mean, row) == pytest.approx(2.3333, abs=1e-4) and value(c.median, row) == 2
    assert value(partial(c.mean_minus_std, lam=1.0, ddof=0), row) == pytest.approx(1.0861, abs=1e-4)
    assert value(partial(c.mean_minus_std, lam=1.0, ddof=1), row) == pytest.approx(0.8058, abs=1e-4)
    assert value(c.median, torch.tensor([[1.0, 2.0, 4.0, 9.0]])) == 3


@pytest.mark.parametrize("name", list(RULES))
def test_equal_members_are_one_reward(name: str) -> None:
    x = torch.tensor([0.1, -3.7, 2.2], dtype=torch.float64)
    assert torch.equal(RULES[name](x[:, None].expand(3, 5), torch.ones(5, dtype=torch.float64)), x) or torch.allclose(
        RULES[name](x[:, None].expand(3, 5), torch.ones(5, dtype=torch.float64)), x, atol=1e-15, rtol=0
    )


def test_a_constant_per_member_and_prompt_moves_the_raw_minimum_and_not_the_centred_one() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, generator=g, dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 0, 5, 5, 5, 5])
    shift = torch.tensor([[3.0, 0.0, -2.0]] * 4 + [[0.0, 9.0, 1.0]] * 4, dtype=torch.float64)
    raw, moved = c.minimum(x, ONES), c.minimum(x + shift, ONES)
    within = [raw[:4].argsort().tolist(), raw[4:].argsort().tolist()]
    assert within != [moved[:4].argsort().tolist(), moved[4:].argsort().tolist()], "another order within a prompt"
    assert torch.allclose(c.minimum(c.centre(x, group), ONES), c.minimum(c.centre(x + shift, group), ONES))
    for rule in (c.mean, c.weighted_sum):  # a mean keeps the order within a prompt
        assert torch.equal(rule(x, ONES)[:4].argsort(), rule(x + shift, ONES)[:4].argsort())


def test_centring_equal_values_gives_exactly_zero() -> None:
    assert c.centre(torch.full((3, 1), 0.1), torch.tensor([2, 2, 2])).eq(0).all()


def test_nominal_and_robust() -> None:
    mu = torch.tensor([[1.0, 0.4, 1.3]], dtype=torch.float64)
    sigma = torch.tensor([[0.5, 0.2, 0.9]], dtype=torch.float64)
    assert value(partial(c.nominal_robust, lam=1.0), mu, sigmas=sigma) == pytest.approx(0.4)
    assert value(partial(c.nominal_robust, lam=0.0), mu, sigmas=sigma) == pytest.approx(0.4)
    # r_nom (1, .4), r_min (.2, .3), lambda .4: (.4 + .12, .16 + .18)
    two = torch.tensor([[1.0, 0.2], [0.4, 0.3]], dtype=torch.float64)
    sure = torch.tensor([[0.1, 0.9], [0.1, 0.9]], dtype=torch.float64)
    assert c.nominal_robust(two, ONES[:2], sure, lam=0.4).tolist() == pytest.approx([0.52, 0.34])
    one = torch.tensor([[0.7], [0.1]], dtype=torch.float64)
    for lam in (0.0, 0.3, 1.0):
        assert torch.allclose(c.nominal_robust(one, ONES[:1], torch.full_like(one, NAN), lam=lam), one[:, 0])
    # without sigmas nominal is the mean
    assert value(partial(c.nominal_robust, lam=1.0), ROW, sigmas=NONE) == 3


def test_constant_rewards_leave_no_policy_gradient() -> None:
    # whatever lambda blends, equal rows have advantage 0 in a group, and under a critic that knows them
    mu, sigma = torch.tensor([[1.0, 0.4]]).expand(4, 2), torch.tensor([[0.5, 0.2]]).expand(4, 2)
    for lam in (0.0, 0.4, 1.0):
        score = c.nominal_robust(mu, torch.ones(2), sigma, lam=lam)
        assert not any(advantages(score))
        reward, mask = score[:, None], torch.ones(4, 1, dtype=torch.bool)
        assert not gae(reward, reward, mask, gamma=1.0, lam=0.95, whiten=True).advantage.any()


def test_the_batch_minimum_is_of_means() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.6]], dtype=torch.float64)  # means .5 and .3: source 1 is worst
    none = torch.full_like(rows, NAN)
    assert c.nominal_robust_batch(rows, ONES[:2], none, lam=0.0).tolist() == [0, 0.6]
    assert c.nominal_robust(rows, ONES[:2], none, lam=0.0).tolist() == [0, 0]


def test_maxmin_takes_the_worst_mean_and_not_the_worst_of_each_row() -> None:
    # groups A [1, 0], B [0, 0.8] on two responses: means 0.5 and 0.4, so B, which favours the second
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.8]], dtype=torch.float64)
    assert c.maxmin(rows, ONES[:2], temperature=0.0).tolist() == [0, 0.8]
    assert c.minimum(rows, ONES[:2]).tolist() == [0, 0], "no signal at all"
    assert torch.equal(c.maxmin(rows[:, :1], ONES[:1], temperature=0.0), rows[:, 0]), "one group is plain RLHF"
    w = math.exp(-0.5) / (math.exp(-0.5) + math.exp(-0.4))
    assert c.maxmin(rows, ONES[:2], temperature=1.0).tolist() == pytest.approx([w, 0.8 * (1 - w)])


@pytest.mark.parametrize(("middle", "best"), [(0.52, 0.52), (0.45, 0.4706)])
def test_maxmin_finds_the_best_worst_case_of_a_bandit(middle: float, best: float) -> None:
    """Users like arms by (1, m, 0) and (.1, m, .8). The mean picks arm 1, whose worst user has .1. At m = .52 arm 2 is best; at .45
    the mixture p, 1 - p of arms 1 and 3 at p = .1 p + .8 (1 - p), p = .8 / 1.7. A minimum in each row would give .45.
    """
    likes = torch.tensor([[1.0, 0.1], [middle, middle], [0.0, 0.8]], dtype=torch.float64)
    logits, mean = torch.zeros(2, 3, dtype=torch.float64)
    for step in range(1, 401):
        p = logits.softmax(0)
        score = c.maxmin(3 * p[:, None] * likes, ONES[:2], temperature=0.0) / (
            3 * p
        )  # rows whose mean is the expectation
        logits = logits + 2 * step**-0.5 * (score - p @ score)  # an exact policy gradient step
        mean = mean + p / 200 if step > 200 else mean
    assert likes.mean(-1).argmax() == 0
    assert float((mean @ likes).min()) == pytest.approx(best, abs=0.01)


def test_maxmin_over_records_has_the_worst_groups_mean() -> None:
    rows, labels = torch.tensor([[1.0], [0.5], [0.2]], dtype=torch.float64), torch.tensor([0, 0, 1])
    out = c.maxmin_records(rows, ONES[:1], labels, by_meta="team", temperature=0.0)
    assert out.tolist() == pytest.approx([0, 0, 0.6]) and float(out.mean()) == pytest.approx(0.2)


def test_direction_is_a_dot_product() -> None:
    # helpfulness 57, verbosity 51 under (0.8, -0.6): 45.6 - 30.6 = 15; 69, 62: 18; 41, 43: 7
    rows = torch.tensor([[57.0, 51.0], [69.0, 62.0], [41.0, 43.0]])
    v = torch.tensor([[0.8, -0.6]]).expand(3, 2)
    assert c.direction(rows, v, max_degrees=45.0, template="").tolist() == pytest.approx([15, 18, 7], abs=1e-5)


def test_product_and_weights_as_exponents() -> None:
    rows = torch.tensor([[0.5, 4.0], [-1.0, 2.0]])
    assert c.product(rows, torch.tensor([1.0, 1.0])).tolist() == [2, -2]
    assert c.product(rows, torch.tensor([1.0, 0.5])).tolist() == pytest.approx([1, -math.sqrt(2)])


def advantages(score: Tensor, ddof: int = 1) -> list[float]:
    group = torch.zeros(len(score), dtype=torch.int64)
    mask = torch.ones(len(score), 1, dtype=torch.bool)
    return group_norm(score, mask, group, scale="std", ddof=ddof, eps=0.0).advantage[:, 0].tolist()


def test_sum_then_normalise_by_hand_and_its_invariance() -> None:
    parts = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    w = ONES[:2]
    # sums 1, 1, 2: mean 4/3, std sqrt(1/3): -.5774, -.5774, 1.1547
    assert advantages(c.weighted_sum(parts, w)) == pytest.approx([-0.5774, -0.5774, 1.1547], abs=1e-4)
    assert advantages(c.weighted_sum(parts, 7 * w)) == pytest.approx(advantages(c.weighted_sum(parts, w)))
    alone = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert advantages(c.weighted_sum(parts, alone)) == pytest.approx(advantages(parts[:, 0]))


def test_normalising_before_or_after_the_sum_differs() -> None:
    # r1 = 0, 1, 1 and r2 = 100, 0, 50: after, r2 rules; before, both have a say
    parts = torch.tensor([[0.0, 100.0], [1.0, 0.0], [1.0, 50.0]], dtype=torch.float64)
    group = torch.zeros(3, dtype=torch.int64)
    before = c.normalise_then_sum(parts, ONES[:2], group, ddof=1, eps=0.0, whiten=False)
    z1, z2 = advantages(parts[:, 0]), advantages(parts[:, 1])
    assert before.tolist() == pytest.approx([a + b for a, b in zip(z1, z2, strict=True)])
    after = advantages(c.weighted_sum(parts, ONES[:2]))
    assert before.argmax() == 2 and max(range(3), key=after.__getitem__) == 0
    pair = torch.tensor([[0.0, 0.0], [1.0, 100.0]], dtype=torch.float64)
    two = torch.zeros(2, dtype=torch.int64)
    # of two rows every source gives -+ 1 / sqrt(2): their sum -+ sqrt(2), where sum-then-normalise gives -+ 1 / sqrt(2)
    assert c.normalise_then_sum(pair, ONES[:2], two, ddof=1, eps=0.0, whiten=False).tolist() == pytest.approx(
        [-math.sqrt(2), math.sqrt(2)]
    )
    assert advantages(c.weighted_sum(pair, ONES[:2])) == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])


def test_a_flat_source_adds_exactly_nothing_and_whitening_scales() -> None:
    parts = torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 4.0]])
    out = c.normalise_then_sum(parts, torch.ones(2), torch.zeros(3, dtype=torch.int64), ddof=1, eps=1e-4, whiten=False)
    only = c.normalise_then_sum(
        parts[:, 1:], torch.ones(1), torch.zeros(3, dtype=torch.int64), ddof=1, eps=1e-4, whiten=False
    )
    assert torch.equal(out, only)
    white = c.normalise_then_sum(parts, torch.ones(2), torch.tensor([0, 0, 1]), ddof=1, eps=1e-4, whiten=True)
    assert float(white.mean()) == pytest.approx(0, abs=1e-6) and float(white.std()) == pytest.approx(1, abs=1e-5)


def test_lagrangian_climbs_while_the_constraint_is_broken_and_never_below_zero() -> None:
    rule = c.Lagrangian(thresholds={"safe": 0.5}, initial=1.0, lr=0.5, largest=1.2, normalise=True)
    rule.names = ["help", "safe"]
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.2]])
    # (r + 1 (s - .5)) / 2
    assert rule(rows, torch.ones(2)).tolist() == pytest.approx([0.25, 1.35])
    rule.learn(rows)  # mean .1: 1 + .5 * .4 = 1.2
    assert rule.multipliers["safe"] == pytest.approx(1.2) and rule.stats == {"lambda/safe": pytest.approx(1.2)}
    rule.learn(rows)
    assert rule.multipliers["safe"] == 1.2, "bounded"
    other = c.Lagrangian(thresholds={"safe": 0.5}, initial=0.0, lr=0.5, largest=1.2, normalise=True)
    other.load_state_dict(rule.state_dict())
    assert other.multipliers == rule.multipliers
    for _ in range(9):
        rule.learn(torch.tensor([[0.0, 1.0]]))
    assert rule.multipliers["safe"] == 0.0, "projected"
    assert rule(rows, torch.ones(2)).tolist() == [1, 3]


def test_a_row_that_lacks_a_member_is_missing_and_leaves_no_trace() -> None:
    rows = torch.tensor([[1.0, 0.0], [NAN, 5.0], [0.0, 0.6]])
    out = by_rule(partial(c.maxmin, temperature=0.0), rows, torch.ones(2), {})
    assert out.isnan().tolist() == [False, True, False] and out[[0, 2]].tolist() == pytest.approx([0, 0.6])
