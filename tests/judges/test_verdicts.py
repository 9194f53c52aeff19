"""Rewards of policies that judge, by hand-computed tables; and the pure functions of their papers."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial
from typing import Any

import pytest
import torch
from test_rewards import Fake, by, reply

from rlhf_cli.compose import compose
from rlhf_cli.credit import identity, reward_to_go, reward_to_go_filtered
from rlhf_cli.objectives import ppo_clip, pre_clip
from rlhf_cli.reduce import sequence_mean
from rlhf_cli.rewards.judge_pairs import JudgePairwise
from rlhf_cli.rewards.pair_verdict import PairVerdict
from rlhf_cli.rewards.verdicts import RankingVerdict, ScoresVerdict, list_format, pair_order
from rlhf_cli.select import drop_skewed
from rlhf_cli.shaping import token_kl
from rlhf_cli.shaping.place import at_end
from rlhf_cli.types import Sample, Scores

NAMES = ("A", "B", "C")
GOLD = {"A": 5, "B": 3, "C": 1}


def only(response: str, meta: dict[str, Any], reward: Any) -> Scores:
    return reward([Sample("p", response, meta=meta)], torch.zeros(1, dtype=torch.int64))


# -- RewardAnything ----------------------------------------------------------------------------------------------------


def test_the_order_of_pairs() -> None:
    # Weights 3, 5, 3; A = B is a tie that gold does not have (1.5), A < C (5) and B < C (3) are reversed: 1 - 9.5 / 11.
    assert pair_order({"A": 4, "B": 4, "C": 5}, GOLD) == pytest.approx(0.136364, abs=1e-6)
    assert pair_order({"A": 5, "B": 3, "C": 1}, GOLD) == 1.0 and pair_order({"A": 1, "B": 3, "C": 5}, GOLD) == 0.0
    assert pair_order({"A": 2, "B": 2, "C": 2}, GOLD) == 0.5
    assert pair_order({"A": 4, "B": 1}, {"A": 2, "B": 2}) == 1.0, "a gold tie costs nothing"
    # Weights 3, 5, 3: of A and B scored the pairs with C are lost, 1 - 8 / 11; of one or no name all are.
    assert pair_order({"A": 5, "B": 3}, GOLD) == pytest.approx(3 / 11)
    assert pair_order({"A": 4}, GOLD) == pair_order({}, GOLD) == 0.0
    for said in ({"A": 5, "B": 3}, {"A": 4}, {}):
        assert pair_order(said, GOLD, "left_out") == 1.0, "as the authors' code"


def answer(scores: dict[str, Any], best: list[str]) -> str:
    return json.dumps({"scores": scores, "best-to-worst": best})


def test_the_format() -> None:
    thought = "<think>" + "x" * 60 + "</think>"
    full = thought + answer(GOLD, ["A", "B", "C"])
    assert list_format(full, NAMES) == (pytest.approx(1.0), GOLD)
    for text, worth in {
        "": 0.0,
        "<think>x": 0.05,
        "<think>x</think>": 0.15,
        thought: 0.2,
        answer(GOLD, ["A", "B", "C"]): 0.8,
        "So: " + answer(GOLD, ["A", "B", "C"]) + " done": 0.75,
        answer(GOLD, ["C", "B", "A"]): 0.6,  # against its own scores
        answer({"A": 5, "B": 3}, ["A", "B"]): 0.2 + 0.2 + 0.2 * 2 / 3 + 0.2,
        '{"scores": {}}': 0.3,
    }.items():
        assert list_format(text, NAMES)[0] == pytest.approx(worth), text


def test_an_order_is_worth_something_where_the_scores_allow_it() -> None:
    """Of all scores 1..3 and all orders of three names: 0.2 more exactly where nobody stands above a higher score."""
    for scores in itertools.product((1, 2, 3), repeat=3):
        said = dict(zip(NAMES, scores, strict=True))
        for best in itertools.permutations(NAMES):
            allowed = all(said[a] >= said[b] for a, b in itertools.combinations(best, 2))
            assert list_format(answer(said, list(best)), NAMES)[0] == pytest.approx(0.8 if allowed else 0.6)


def test_format_and_order_together() -> None:
    found = only(
        answer({"A": 4, "B": 4, "C": 5}, ["C", "A", "B"]),
        {"gold": GOLD},
        RankingVerdict(format_weight=0.2, unscored="lost"),
    )
    assert found.value.tolist() == pytest.approx([0.2 * 0.8 + 0.8 * 0.136364], abs=1e-6)
    assert "meta.gold" in only("x", {}, RankingVerdict(format_weight=0.2, unscored="lost")).reasons[0]


# -- Writing-Zero ------------------------------------------------------------------------------------------------------


def scored_pair(a: float, b: float) -> str:
    return json.dumps({"principles": "", "critique": "", "score_A": a, "score_B": b})


@pytest.mark.parametrize(
    ("text", "better", "value"),
    [
        (scored_pair(7, 6), "A", 0.75),  # margin 1 of 2
        (scored_pair(9, 2), "A", 1.0),
        (scored_pair(9, 2), "B", 0.0),
        (scored_pair(5, 5), "A", 0.0),
        (scored_pair(11, 2), "A", -1.0),
        (scored_pair(10**400, 2), "A", -1.0),  # no float holds it
        ("A is better", "A", -1.0),
    ],
)
def test_scores_of_a_generative_reward_model(text: str, better: str, value: float) -> None:
    assert only(text, {"better": better}, ScoresVerdict(full=2.0)).value.tolist() == [value]


def test_a_group_stays_where_its_pivot_is_no_outlier() -> None:
    # K = 16 with a pivot at 0: kept for 3..12 wins of 15. 12 wins: (12 - 3) / 16 = 0.5625; 13: (13 - 2) / 16 = 0.6875.
    def kept(wins: int, k: int = 16) -> bool:
        score = torch.tensor([0.0] + [1.0] * wins + [-1.0] * (k - 1 - wins))
        keep = drop_skewed(score, torch.zeros(k, dtype=torch.int64), most=0.6).keep
        return keep is not None and len(keep) == k

    assert [w for w in range(16) if kept(w)] == list(range(3, 13))
    assert kept(2, 4) and not kept(3, 4)  # (0, 1, -1, 1): 0.25; (0, 1, 1, 1): 0.75
    both = drop_skewed(torch.tensor([0.0, 1, 1, 0, 1, -1]), torch.tensor([7, 7, 7, 9, 9, 9]), most=0.6)
    assert both.keep is not None and both.keep.tolist() == [3, 4, 5]
    assert both.stats == {"dropped_rows": 3.0, "dropped_groups": 1.0}


def test_an_exact_boundary_stays() -> None:
    score = torch.tensor([0.0, 1, 1, 1, 0])  # 3 / 5 = 0.6
    keep = drop_skewed(score, torch.zeros(5, dtype=torch.int64), most=0.6).keep
    assert keep is not None and len(keep) == 5


def test_a_comparison_without_winner_is_a_loss_unless_told_otherwise() -> None:
    assert compose("train", ["experiment=writing_zero"], None).reward.judge_pivot.inconsistent == "loss"


@pytest.mark.parametrize(("inconsistent", "others", "stays"), [("loss", -1.0, False), ("tie", 0.0, True)])
def test_a_judge_of_the_place_drops_every_group_or_teaches_nothing(
    inconsistent: str, others: float, stays: bool
) -> None:
    # It says "the first" in both orders, so nobody wins. As losses: all -1 but the pivot, 3 / 4 is beyond 0.6; as ties: all 0.
    reward = JudgePairwise(
        rubric="r", against="pivot", answer="verdict", rule="strict", scale="sign", inconsistent=inconsistent, votes=1,  # type: ignore[arg-type]
    )  # fmt: skip
    reward.connect(by(Fake(lambda ask: reply(rationale="", better="A"))))
    samples, group = [Sample("p", t, uid="u") for t in "abcd"], torch.zeros(4, dtype=torch.int64)
    value = reward(samples, group).value
    assert sorted(value.tolist()) == sorted([0.0, *[others] * 3])
    keep = drop_skewed(value, group, most=0.6).keep
    assert keep is not None and len(keep) == (4 if stays else 0)
    assert not identity(value, torch.ones(4, 2, dtype=torch.bool)).advantage[keep].any()


def test_the_score_is_the_advantage() -> None:
    found = identity(torch.tensor([1.0, 0.0, -1.0]), torch.tensor([[True, True], [True, False], [False, True]]))
    assert found.advantage.tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, -1.0]]


# -- StableReinforce ---------------------------------------------------------------------------------------------------


RIGHT = "<think>The first names the city.\nSo it is better.</think><answer>1</answer>"


@pytest.mark.parametrize(
    ("text", "agrees", "value"),
    [
        (RIGHT, "yes", 2.0),
        (RIGHT, "no", 1.0),
        (RIGHT.replace(">1<", ">2<"), "yes", 0.5),  # wrong, in the format
        ("<answer>1</answer>", "yes", 0.0),
        ("1", "yes", 0.0),
        (RIGHT.replace(">1<", ">3<"), "yes", 0.0),
        (RIGHT + RIGHT, "yes", 0.0),  # one verdict, not two
    ],
)
def test_the_table_of_values(text: str, agrees: str, value: float) -> None:
    reward = PairVerdict(disagreement=-1)
    reward.connect(by(Fake(lambda ask: reply(agree=agrees))))
    assert only(text, {"better": 1}, reward).value.tolist() == [value]


def test_disagreement_may_cost_nothing_and_only_right_verdicts_are_checked() -> None:
    backend = Fake(lambda ask: reply(agree="no"))
    reward = PairVerdict(disagreement=0)
    reward.connect(by(backend))
    samples = [Sample("p", t, meta={"better": 1}) for t in (RIGHT, "1", RIGHT.replace(">1<", ">2<"))]
    assert reward(samples, torch.zeros(3, dtype=torch.int64)).value.tolist() == [1.5, 0.0, 0.5]
    assert len(backend.asked) == 1 and "So it is better." in backend.asked[0].user


def test_a_judge_without_an_answer_is_missing_and_never_one() -> None:
    reward = PairVerdict(disagreement=-1)
    reward.connect(by(Fake(lambda ask: Reply_error())))
    scores = only(RIGHT, {"better": 1}, reward)
    assert scores.missing is not None and scores.missing.tolist() == [True] and scores.reasons == {0: "gone"}
    assert "meta.better" in only(RIGHT, {}, reward).reasons[0]


def Reply_error() -> Any:
    from rlhf_cli.judges.ask import Reply

    return Reply(error="gone")


def one(x: float, **more: Any) -> torch.Tensor:
    return torch.tensor([[x]], **more)


PRE = {"bound": 1000.0, "eps_low": 0.2, "eps_high": 0.2}


def test_the_ratio_is_bounded_before_the_exponential() -> None:
    # log-ratio 10, A = -1: without a bound the loss is e^10 = 22026.47; with it 1000, and no gradient.
    logp = one(10.0, dtype=torch.float64, requires_grad=True)
    zero, minus = one(0.0, dtype=torch.float64), one(-1.0, dtype=torch.float64)
    loss = pre_clip(logp, zero, minus, **PRE)
    assert loss.item() == pytest.approx(1000.0)
    loss.sum().backward()
    assert logp.grad is not None and logp.grad.item() == 0.0
    free = ppo_clip(logp.detach(), zero, minus, eps_low=0.2, eps_high=0.2, dual_clip=None)
    assert free.item() == pytest.approx(math.exp(10))
    far = one(100.0, requires_grad=True)
    loss = pre_clip(far, one(0.0), one(0.0), **PRE)
    loss.sum().backward()
    assert loss.item() == 0.0 and far.grad is not None and far.grad.item() == 0.0


def test_within_the_bound_it_is_ppo() -> None:
    g = torch.Generator().manual_seed(0)
    logp, old, a = (torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(3))
    plain = ppo_clip(logp, old, a, eps_low=0.2, eps_high=0.2, dual_clip=None)
    assert torch.allclose(pre_clip(logp, old, a, **PRE), plain)


def test_without_bounds_it_is_reinforce_pp() -> None:
    """No bound on the ratio, no filter, verdicts never checked: the tensors of REINFORCE++ with this reduction, gradient included."""
    g = torch.Generator().manual_seed(0)
    n, t = 6, 5
    mask = torch.arange(t) < torch.tensor([5, 3, 1, 4, 2, 5])[:, None]
    score = torch.randn(n, generator=g)
    old, start = torch.randn(n, t, generator=g), torch.randn(n, t, generator=g) / 4
    reward = token_kl(old, old + 0.1, mask, beta=1e-3, kind="k1") + at_end(score, mask)
    plain = reward_to_go(reward, mask, gamma=1.0, whiten=True)
    free = reward_to_go_filtered(reward, mask, gamma=1.0, sigmas=math.inf)
    assert torch.equal(plain.advantage, free.advantage) and torch.equal(plain.returns, free.returns)  # type: ignore[arg-type]
    found = []
    for objective in (
        partial(ppo_clip, eps_low=0.2, eps_high=0.2, dual_clip=None),
        partial(pre_clip, bound=math.inf, eps_low=0.2, eps_high=0.2),
    ):
        logp = (old + start).requires_grad_()
        values = objective(logp, old, free.advantage)
        (values * sequence_mean(mask)).sum().backward()
        found.append((values.detach(), logp.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][1] is not None and found[0][1].abs().sum() > 0


def test_an_advantage_beyond_three_sigma_becomes_zero() -> None:
    # 19 zeros and a one: mean 0.05, std sqrt(0.05 * 0.95) = 0.217945; z = 4.358899 and -0.229416.
    reward, mask = torch.zeros(20, 1, dtype=torch.float64), torch.ones(20, 1, dtype=torch.bool)
    reward[3] = 1.0
    found = reward_to_go_filtered(reward, mask, gamma=1.0, sigmas=3.0).advantage
    assert found[3].item() == 0.0 and found[0].item() == pytest.approx(-0.229416, abs=1e-6)
    kept = reward_to_go_filtered(reward, mask, gamma=1.0, sigmas=5.0).advantage
    assert kept[3].item() == pytest.approx(4.358899, abs=1e-6) and torch.equal(kept[0], found[0])
