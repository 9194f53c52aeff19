"""The rewards that ask a judge, with judges whose opinion is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.ask import Ask, Reply, Sampling
from rlhf_cli.judges.cache import Cache
from rlhf_cli.judges.judge import Judge as Asked
from rlhf_cli.judges.rule import RULES, Rule, done
from rlhf_cli.rewards.judge import Judge, JudgeListwise, reading
from rlhf_cli.rewards.judge_pairs import JudgeAnchor, JudgePairwise, Verdict, pivot_of
from rlhf_cli.types import Sample, Scores

PAIR: dict[str, Any] = {
    "rubric": "r", "against": "group", "answer": "verdict", "rule": "strict", "scale": "rate", "inconsistent": "tie", "votes": 1,
}  # fmt: skip


class Fake:
    """A backend that answers by a function of the question."""

    early = False

    def __init__(self, answer: Callable[[Ask], Reply]) -> None:
        self.answer = answer
        self.asked: list[Ask] = []

    def name(self, ask: Ask) -> str:
        return "fake"

    def start(self, asks: Sequence[Ask]) -> list[Future[Reply]]:
        self.asked += asks
        return [done(self.answer(a)) for a in asks]

    def check(self, asks: Sequence[Ask]) -> None:
        pass


def by(backend: Any) -> Asked:
    return Asked(backend, Sampling(0.0, 64, True, {}), Cache(None))


def by_length() -> Asked:
    return by(Rule("length"))


def group(texts: Sequence[str], **more: Any) -> list[Sample]:
    return [Sample("p", t, uid="u", **more) for t in texts]


def run(reward: Any, judge: Asked, samples: Sequence[Sample], groups: Sequence[int] | None = None) -> Scores:
    reward.connect(judge)
    return reward(samples, torch.tensor(groups if groups is not None else [0] * len(samples)))


def reply(**found: Any) -> Reply:
    return Reply(json.dumps(found))


def shown(ask: Ask) -> list[str]:
    """The responses in a question, in order."""
    blocks = ask.user.split("\n\n[")[1:]
    return [b.partition("]\n")[2].rpartition("\n[end")[0] for b in blocks]


# -- one response ------------------------------------------------------------------------------------------------------


def absolute(**more: Any) -> Judge:
    return Judge(**{"rubric": "Be long.", "low": 1, "high": 5, "read": "reply", "votes": 1, **more})


def test_the_rule_by_length_places_quality_on_the_scale() -> None:
    # n / (n + 64): 0 -> 0, 64 -> 1/2, 192 -> 3/4; times 5 scores from 1: 1 + floor(0, 2.5, 3.75).
    scores = run(absolute(), by_length(), group(["", "x" * 64, "x" * 192]))
    assert scores.value.tolist() == [1.0, 3.0, 4.0] and scores.timing["calls"] == 3


def test_the_rubric_and_the_response_are_in_the_question() -> None:
    backend = Fake(lambda ask: reply(rationale="", score=2))
    run(
        absolute(rubric="Count the owls."),
        by(backend),
        [Sample("Name owls.", "barn", meta={"messages": [{"role": "user", "content": "Name owls."}]})],
    )
    ask = backend.asked[0]
    assert "Count the owls." in ask.system and shown(ask) == ["barn"] and "Name owls." in ask.user
    assert ask.schema is not None and list(ask.schema["properties"]) == ["rationale", "score"], "reasons come first"


def test_a_rubric_may_be_a_file(tmp_path: Any) -> None:
    (tmp_path / "r.txt").write_text("From a file.")
    assert absolute(rubric=f"@{tmp_path}/r.txt").question.rubric == "From a file."
    with pytest.raises(ConfigError, match=r"^reward\.judge\.rubric=@no: no such file; give a text, or @FILE$"):
        absolute(rubric="@no")


def test_the_expectation_over_legal_score_tokens() -> None:
    # p(4) = 0.6 (two spellings), p(2) = 0.2, "maybe" does not count: (4 * 0.6 + 2 * 0.2) / 0.8 = 3.5, mass 0.8.
    top = (("4", math.log(0.5)), (" 4", math.log(0.1)), ("2", math.log(0.2)), ("maybe", math.log(0.2)))
    scores = run(absolute(read="logits"), by(Fake(lambda ask: Reply("4", top))), group(["a"]))
    assert scores.value.tolist() == pytest.approx([3.5]) and scores.components["mass"].tolist() == pytest.approx([0.8])
    # The rule's quality q gives low + q (high - low): 1 + 0.5 * 4.
    assert run(absolute(read="logits"), by_length(), group(["x" * 64])).value.tolist() == pytest.approx([3.0])


def test_score_tokens_without_any_probability_are_no_score() -> None:
    never = by(Fake(lambda ask: Reply("The", (("The", 0.0), ("4", -9999.0)))))
    scores = run(absolute(read="logits"), never, group(["a"]))
    assert scores.reasons == {0: "the judge's first token is none of 1, 2, 3, 4, 5; likeliest is 'The'"}


def test_a_reply_that_breaks_the_arithmetic_is_missing() -> None:
    assert reading(lambda r: 1 / len(r.text), Reply("")) == (
        None, "the numbers of the judge's reply cannot be computed with (ZeroDivisionError)",
    )  # fmt: skip


def test_what_was_begun_and_never_asked_is_forgotten() -> None:
    backend = Fake(lambda ask: reply(rationale="", score=2))
    backend.early = True
    judge, reward = by(backend), absolute()
    reward.connect(judge)
    one, two = group(["a"]), group(["b"])  # another rank may score what this one drew
    reward.begin(one)
    reward.begin(two)
    assert len(judge._early) == 2 and reward(two, torch.tensor([0])).value.tolist() == [2.0]
    assert not judge._early and len(backend.asked) == 2


def test_scores_of_one_token_have_one_digit() -> None:
    with pytest.raises(
        ConfigError, match=r"reads one token, so scores have one digit; type reward\.judge\.low=0 reward\.judge\.high=9"
    ):
        absolute(read="logits", high=10)
    with pytest.raises(ConfigError, match=r"^reward\.judge\.high=1: must be above reward\.judge\.low=1$"):
        absolute(high=1)


def test_votes_are_averaged_over_those_that_can_be_read() -> None:
    said = {0: reply(rationale="", score=5), 1: Reply("no idea"), 2: reply(rationale="", score=2)}
    scores = run(absolute(votes=3), by(Fake(lambda ask: said[ask.draw])), group(["a"]))
    assert scores.value.tolist() == [3.5] and not scores.reasons
    lost = run(absolute(votes=2), by(Fake(lambda ask: Reply("no idea"))), group(["a", "b"]))
    assert lost.missing is not None and lost.missing.tolist() == [True, True]
    assert lost.reasons[0] == "the judge's reply is no JSON: 'no idea'"


# -- pairs -------------------------------------------------------------------------------------------------------------


def first_wins(ask: Ask) -> Reply:
    """A judge of the place alone."""
    if ask.top:
        return Reply("A", (("A", math.log(0.9)), ("B", math.log(0.1))))
    return reply(rationale="", better="A")


def test_win_rates_follow_the_order_of_the_judge() -> None:
    scores = run(JudgePairwise(**PAIR), by_length(), group(["xx", "xxxx", "x", "xxx"]))
    assert scores.value.tolist() == pytest.approx([1 / 3, 1.0, 0.0, 2 / 3])
    assert scores.components["position_inconsistency"].tolist() == [0.0] * 4 and scores.timing["calls"] == 12


def test_a_judge_of_the_place_gives_ties_only_under_the_strict_rule() -> None:
    samples = group(["a", "bb", "ccc"])
    for rule in ("strict", "mean"):
        scores = run(JudgePairwise(**PAIR | {"rule": rule}), by(Fake(first_wins)), samples)
        assert scores.value.tolist() == [0.5] * 3 and scores.components["position_inconsistency"].tolist() == [1.0] * 3
    sign = run(JudgePairwise(**PAIR | {"scale": "sign"}), by(Fake(first_wins)), samples)
    assert sign.value.tolist() == [0.0] * 3
    loss = run(JudgePairwise(**PAIR | {"scale": "sign", "inconsistent": "loss"}), by(Fake(first_wins)), samples)
    assert loss.value.tolist() == [-1.0] * 3


def test_log_odds_cancel_an_opinion_of_the_place() -> None:
    scores = run(JudgePairwise(**PAIR | {"answer": "logits", "rule": "mean"}), by(Fake(first_wins)), group(["a", "b"]))
    assert scores.value.tolist() == pytest.approx([0.5, 0.5])


def test_two_scores_of_a_generative_reward_model() -> None:
    samples = group(["x", "xxx", "xx"])
    scores = run(JudgePairwise(**PAIR | {"answer": "scores"}), by_length(), samples)
    assert scores.value.tolist() == [0.0, 1.0, 0.5]
    wrong = by(Fake(lambda ask: reply(principles="", critique="", score_A=11, score_B=0)))
    lost = run(JudgePairwise(**PAIR | {"answer": "scores"}), wrong, samples)
    assert lost.reasons[0] == "the judge's score_A 11 is not from 0 to 10"


def test_a_pair_that_cannot_be_read_leaves_the_others() -> None:
    def answer(ask: Ask) -> Reply:
        return Reply("?") if set(shown(ask)) == {"x", "xx"} else ask.stand_in(RULES["length"])

    scores = run(JudgePairwise(**PAIR), by(Fake(answer)), group(["x", "xx", "xxx"]))
    assert scores.value.tolist() == [0.0, 0.0, 1.0] and not scores.reasons  # each of the first two lost to the third
    alone = run(JudgePairwise(**PAIR), by_length(), group(["x"]))
    assert alone.reasons == {0: "it has no other response to compare with"}


def test_every_group_on_its_own() -> None:
    both = run(JudgePairwise(**PAIR), by_length(), [*group(["x", "xx"]), *group(["xxx", "xxxx"])], [0, 0, 1, 1])
    assert both.value.tolist() == [0.0, 1.0, 0.0, 1.0]


# -- one pivot ---------------------------------------------------------------------------------------------------------


PIVOT = PAIR | {"against": "pivot", "scale": "sign"}


def with_pivot(k: int, pivot: int) -> list[Sample]:
    """A group of lengths 1..k whose texts draw the member `pivot`."""
    for n in range(10_000):
        samples = [Sample("p", "x" * (i + 1), uid=f"u{n}") for i in range(k)]
        if pivot_of(samples) == pivot:
            return samples
    raise AssertionError("the pivot is not uniform")


def test_against_a_pivot() -> None:
    # Lengths 1, 2, 3, 4. Pivot of length 2: (-1, 0, 1, 1); of length 1: (0, 1, 1, 1).
    assert run(JudgePairwise(**PIVOT), by_length(), with_pivot(4, 1)).value.tolist() == [-1.0, 0.0, 1.0, 1.0]
    found = run(JudgePairwise(**PIVOT), by_length(), with_pivot(4, 0))
    assert found.value.tolist() == [0.0, 1.0, 1.0, 1.0] and found.timing["calls"] == 6


def test_advantages_sum_to_zero_over_a_uniform_pivot() -> None:
    total = sum(run(JudgePairwise(**PIVOT), by_length(), with_pivot(5, p)).value for p in range(5))
    assert total.tolist() == [-4.0, -2.0, 0.0, 2.0, 4.0]  # (below - above) of each member


def test_the_pivot_is_uniform_and_the_same_for_the_same_texts() -> None:
    drawn = [pivot_of([Sample("p", str(i), uid=f"u{n}") for i in range(4)]) for n in range(2000)]
    counts = [drawn.count(i) for i in range(4)]
    assert sum(counts) == 2000 and all(400 < c < 600 for c in counts)  # 500 +- 5 standard deviations of 19.4
    assert pivot_of(group(["a", "b"])) == pivot_of(group(["a", "b"]))


# -- the recorded response ---------------------------------------------------------------------------------------------

ANCHOR: dict[str, Any] = {"rubric": "r", "answer": "logits", "scale": "prob", "votes": 1}


def bradley_terry(strength: dict[str, float], place: float = 0.0) -> Asked:
    """A comparator with log-odds r(first) - r(second) + place."""

    def answer(ask: Ask) -> Reply:
        first, second = (strength[t] for t in shown(ask))
        x = first - second + place
        return Reply("A", (("A", -math.log1p(math.exp(-x))), ("B", -math.log1p(math.exp(x)))))

    return by(Fake(answer))


R = {"a": 0.0, "y": 1.0, "z": -2.0}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_with_a_bradley_terry_judge_it_is_the_centred_reward() -> None:
    samples = group(["y", "z", "a"], references=("a",))
    prob = run(JudgeAnchor(**ANCHOR), bradley_terry(R), samples)
    assert prob.value.tolist() == pytest.approx([sigmoid(1.0), sigmoid(-2.0), 0.5], abs=1e-6)
    logit = run(JudgeAnchor(**ANCHOR | {"scale": "logit"}), bradley_terry(R), samples)
    assert logit.value.tolist() == pytest.approx([1.0, -2.0, 0.0], abs=1e-6)


def test_a_biased_comparator_cancels_in_the_logit_and_is_symmetric_in_the_probability() -> None:
    samples = group(["y", "a"], references=("a",))
    logit = run(JudgeAnchor(**ANCHOR | {"scale": "logit"}), bradley_terry(R, place=0.7), samples)
    assert logit.value.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    one = run(JudgeAnchor(**ANCHOR), bradley_terry(R, place=0.7), group(["y"], references=("a",))).value
    other = run(JudgeAnchor(**ANCHOR), bradley_terry(R, place=0.7), group(["a"], references=("y",))).value
    assert float(one) == pytest.approx((sigmoid(1.7) + sigmoid(0.3)) / 2, abs=1e-6)
    assert float(one + other) == pytest.approx(1.0, abs=1e-6)  # score(y, a) + score(a, y)


@pytest.mark.parametrize(("scale", "value"), [("prob", 0.5), ("logit", 0.0)])
def test_a_judge_that_is_sure_of_a_place_is_heard(scale: str, value: float) -> None:
    never = by(Fake(lambda ask: Reply("B", (("B", 0.0), ("A", -9999.0)))))  # as servers write probability 0
    scores = run(JudgeAnchor(**ANCHOR | {"scale": scale}), never, group(["y"], references=("a",)))
    assert scores.value.tolist() == [value] and scores.components["position_inconsistency"].tolist() == [1.0]


def test_probabilities_at_any_log_odds() -> None:
    # 0.5 [P(i | i, j) + 1 - P(j | j, i)]: sigmoid(-1000) = 0, sigmoid(0) = 1/2, sigmoid(800) = 1.
    assert Verdict([-1000.0], [-9999.0]).probability() == 0.0
    assert Verdict([800.0], [0.0]).probability() == 0.75 and Verdict([1.0], [-1.0]).probability() == 0.5


def test_an_anchor_is_needed_and_log_odds_need_logits() -> None:
    assert run(JudgeAnchor(**ANCHOR), by_length(), group(["y"])).reasons == {0: "it has no reference"}
    with pytest.raises(
        ConfigError, match=r"^reward\.judge_anchor\.scale=logit needs log-odds, and answer=verdict gives none"
    ):
        JudgeAnchor(**ANCHOR | {"scale": "logit", "answer": "verdict"})
    said = run(
        JudgeAnchor(**ANCHOR | {"answer": "verdict"}), by_length(), group(["x", "xxx", "xx"], references=("xx",))
    )
    assert said.value.tolist() == [0.0, 1.0, 0.5]


def test_inconsistency_counts_votes_whose_orders_disagree() -> None:
    assert Verdict([1.0, 1.0, -1.0, 0.0], [1.0, -1.0, -1.0, 1.0]).inconsistent == 0.5


# -- a whole group -----------------------------------------------------------------------------------------------------


def listwise(**more: Any) -> JudgeListwise:
    return JudgeListwise(**{"principle": "Long is good.", "low": 1, "high": 5, "tie_break": 0.5, **more})


def test_a_whole_group_in_one_question_back_in_its_own_order() -> None:
    # Qualities n / (n + 64) of 16, 64, 192: 0.2, 0.5, 0.75 -> scores 2, 3, 4; places 2, 1, 0 of 3: minus 0.5 * place / 2.
    texts = ["x" * 64, "x" * 192, "x" * 16]
    scores = run(listwise(), by_length(), group(texts))
    assert scores.value.tolist() == [3 - 0.25, 4.0, 2 - 0.5] and scores.timing["calls"] == 1
    assert scores.components["consistent"].tolist() == [1.0] * 3 and scores.components["place"].tolist() == [
        1.0,
        0.0,
        2.0,
    ]


def test_names_are_masked_and_the_order_depends_on_the_group() -> None:
    orders = {tuple(listwise().question.order([Sample("p", t, uid=f"u{n}") for t in "abcd"])) for n in range(200)}
    assert len(orders) == 24, "every order of four occurs"
    backend = Fake(lambda ask: ask.stand_in(RULES["length"]))
    run(listwise(), by(backend), group(["one", "two"]))
    assert "model-1" in backend.asked[0].user and set(shown(backend.asked[0])) == {"one", "two"}


@pytest.mark.parametrize(
    ("scores", "best", "why"),
    [
        ({"model-1": 3}, ["model-1", "model-2"], "scores do not name each of model-1, model-2 once"),
        ({"model-1": 3, "model-2": 6}, ["model-1", "model-2"], "score of model-2 6 is not from 1 to 5"),
        ({"model-1": 3, "model-2": 3}, ["model-1", "model-1"], "ranking does not name each of model-1, model-2 once"),
        ({"model-1": 3, "model-2": 3, "model-3": 5}, ["model-1", "model-2"], "scores do not name"),
    ],
)
def test_a_list_that_names_others_is_missing_for_all(scores: dict[str, int], best: list[str], why: str) -> None:
    answer = Reply(json.dumps({"rationale": "", "scores": scores, "best-to-worst": best}))
    found = run(listwise(), by(Fake(lambda ask: answer)), group(["a", "b"]))
    assert found.missing is not None and found.missing.all() and why in found.reasons[1]


def test_an_order_against_the_scores_is_told() -> None:
    answer = Reply(
        json.dumps({"rationale": "", "scores": {"model-1": 2, "model-2": 5}, "best-to-worst": ["model-1", "model-2"]})
    )
    found = run(listwise(), by(Fake(lambda ask: answer)), group(["a", "b"]))
    assert found.components["consistent"].tolist() == [0.0, 0.0] and sorted(found.value.tolist()) == [2.0, 4.5]
