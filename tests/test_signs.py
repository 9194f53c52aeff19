"""Signs that read texts, judges and a second reward: numbers by hand, and every limit stops a run."""

import json
import math
from typing import Any

import pytest
import torch

from rlhf_cli import signs
from rlhf_cli.compose import compose
from rlhf_cli.config import DetectorsSection
from rlhf_cli.detectors import ADVICE, LEAST, Detectors
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.plan import validate
from rlhf_cli.rewards.stage import held
from rlhf_cli.types import Experience, Sample

ANSWER = DetectorsSection().answer


def step(*texts: str, group: Any = None, score: Any = None, **more: Any) -> Experience:
    """A row of three response tokens a text."""
    n = len(texts)
    columns: dict[str, Any] = {
        "samples": tuple(Sample("p", t) for t in texts), "ids": torch.arange(4).repeat(n, 1),
        "attention": torch.ones(n, 4, dtype=torch.bool), "mask": torch.tensor([[False, True, True, True]]).expand(n, 4),
        "group": torch.arange(n) if group is None else torch.tensor(group),
        "score": torch.arange(float(n)) if score is None else torch.tensor(score),
    }  # fmt: skip
    return Experience(**columns | more)


# -- the same answer to different prompts ------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 5])
def test_equal_texts_of_m_words_are_alike_up_to_meteors_own_penalty(m: int) -> None:
    # one chunk of m matches: F = 1, penalty 0.5 (1/m)^3
    text = " ".join(f"w{i}" for i in range(m))
    assert signs.similar([text] * 4, [0, 1, 2, 3], 100) == pytest.approx(1 - 0.5 / m**3)


def test_only_different_prompts_are_compared_and_words_lie_between_blanks() -> None:
    # rows 0 and 1 answer one prompt. Pairs with row 2: "a b" and "a b." share one word of two in each direction: F = 1/2, penalty 1/2.
    assert signs.similar(["a b", "z", "a b."], [7, 7, 9], 100) == pytest.approx((0.25 + 0 + 0.25 + 0) / 4)
    assert math.isnan(signs.similar(["a", "b"], [0, 0], 100)) and math.isnan(signs.similar(["a", "b"], [0, 1], 0))
    # the reference comes first: of "a" against "a b c d" precision 1, recall 1/4: 10 P R / (R + 9 P) = 0.27027; the other way 0.76923
    f = [10 * p * r / (r + 9 * p) for p, r in ((1, 0.25), (0.25, 1))]
    assert signs.similar(["a", "a b c d"], [0, 1], 2) == pytest.approx(0.5 * sum(f) / 2)


def test_drawn_pairs_are_the_same_every_time() -> None:
    texts, group = [f"w{i % 3} x y{i % 5}" for i in range(40)], [i // 4 for i in range(40)]
    assert signs.similar(texts, group, 16) == signs.similar(texts, group, 16)
    everything = signs.similar(texts, group, 10**6)
    assert abs(signs.similar(texts, group, 1200) - everything) < 0.02, "a draw estimates the mean over all pairs"


# -- behind the answer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("<answer>4</answer>", 0.0),
        ("<answer>4</answer> this is right because", 4 / 5),
        (r"so \boxed{4} I checked", 2 / 4),
        (r"\boxed{3} no, \boxed{4}", 0.0),
        ("work\n#### 4\nthank you", 2 / 5),
    ],
)
def test_words_behind_the_answer(text: str, share: float) -> None:
    assert signs.tail([text, "no answer at all"], ANSWER) == pytest.approx(share)


def test_without_any_answer_there_is_no_number() -> None:
    assert math.isnan(signs.tail(["hello", ""], ANSWER))


# -- judges, sampling --------------------------------------------------------------------------------------------------


def test_the_judge_that_goes_by_place_most_is_told() -> None:
    parts = {
        "a/position_inconsistency": torch.tensor([0.0, 1.0, math.nan]),
        "b/position_inconsistency": torch.tensor([0.25]),
    }
    assert signs.inconsistent(parts) == 0.5 and math.isnan(signs.inconsistent({"a": torch.ones(1)}))


def test_entropy_is_that_of_a_known_distribution() -> None:
    # half of the tokens drawn at 1/2, half at 1/4: (ln 2 + ln 4) / 2
    logp = torch.tensor(
        [[9.0, -math.log(2), -math.log(4), -math.log(2)], [9.0, -math.log(4), -math.log(2), -math.log(4)]]
    )
    assert signs.entropy(step("a", "b", behavior_logp=logp)) == pytest.approx(1.5 * math.log(2))
    assert math.isnan(signs.entropy(step("a")))


# -- gold --------------------------------------------------------------------------------------------------------------


def with_gold(score: float, gold: float) -> Experience:
    """Two rows a unit apart around each mean: deviations 1/2."""
    pair = torch.tensor([-0.5, 0.5])
    return step("a", "b", score=(score + pair).tolist(), components={"gold": gold + pair})


def test_gold_by_hand() -> None:
    gold = signs.Gold("gold", 4)
    # from (1, 1), in units of 1/2: reward +0.5 a step, gold +0, +0.5, 0, -0.5
    values = [gold(with_gold(1 + 0.5 * i, 1 + g)) for i, g in enumerate((0.0, 0.5, 0.0, -0.5))]
    assert [v["gold_gap"] for v in values] == pytest.approx([0, 0, 2, 4])
    # halves: reward (0 + 1) / 2 to (2 + 3) / 2, up 2; gold (0 + 1) / 2 to (0 - 1) / 2, down 1
    assert [v.get("gold_falls") for v in values] == [None, None, None, pytest.approx(1.0)]


def test_gold_that_rises_too_is_no_fall_and_a_step_without_it_is_left_out() -> None:
    gold = signs.Gold("gold", 2)
    gold(with_gold(0, 0))
    assert gold(with_gold(1, 1)) == {"gold_gap": pytest.approx(0.0), "gold_falls": 0.0}
    assert gold(step("a", "b", components={"gold": torch.full((2,), math.nan)})) == {}
    assert signs.Gold("gold", 2)(step("a", "b", score=[1.0, 1.0], components={"gold": torch.zeros(2)})) == {}, (
        "no spread yet"
    )


def test_a_part_that_nobody_gives_is_told() -> None:
    with pytest.raises(GateError, match=r"^detectors\.gold=bleu/no: no such part; there are gold$"):
        signs.Gold("bleu/no", 2)(with_gold(0, 0))


def test_it_goes_on_from_its_state() -> None:
    detect = Detectors(DetectorsSection(gold="gold", window=4, gold_falls=0.5, steps=1), {"x": 1.0}, {})
    for i in range(3):
        detect(with_gold(i, -i))
    again = Detectors(DetectorsSection(gold="gold", window=4, gold_falls=0.5, steps=1), {"x": 1.0}, {})
    again.load_state_dict(json.loads(json.dumps(detect.state_dict())))
    with pytest.raises(
        GateError,
        match=r"^hack/gold_falls is 4, beyond detectors\.gold_falls=0\.5 for 1 steps .* the reward rises while",
    ):
        again(with_gold(3, -3))
    old = {"streaks": {"gold_falls": 1}}  # of a run before there was gold
    again.load_state_dict(old)


# -- every limit stops -------------------------------------------------------------------------------------------------

LOW, FAR = torch.full((2, 4), -0.01), torch.full((2, 4), -3.0)
STOPS: dict[str, tuple[float, Experience, dict[str, float]]] = {
    "length_corr": (0.9, step("a", "b", "c", mask=torch.arange(4) < torch.tensor([[1], [2], [3]])), {}),
    "length_corr_within": (0.9, step("a", "b", "c", group=[0, 0, 0], mask=torch.arange(4) < torch.tensor([[1], [2], [3]])), {}),
    "repeated": (0.5, step("a", ids=torch.full((1, 9), 5), mask=torch.ones(1, 9, dtype=torch.bool), attention=torch.ones(1, 9, dtype=torch.bool)), {}),
    "copied": (0.5, step("a", ids=torch.full((1, 4), 5), mask=torch.arange(4)[None] == 3), {}),
    "alike": (0.4, step("a", "b", group=[0, 0]), {}),
    "zero_variance": (0.5, step("a", "b", group=[0, 0], score=[1.0, 1.0]), {}),
    "format_share": (0.5, step("a", components={"f": torch.ones(1), "x": torch.zeros(1)}), {}),
    "truncated": (0.5, step("a", truncated=torch.tensor([True])), {}),
    "similar": (0.5, step("a b c", "a b c"), {}),
    "tail": (0.5, step(r"\boxed{1} and so on"), {}),
    "inconsistent": (0.3, step("a", components={"j/position_inconsistency": torch.ones(1)}), {}),
    "ensemble_std": (1.0, step("a"), {"ensemble_std": 2.0}),
    "entropy": (0.5, step("a", "b", behavior_logp=LOW), {}),
    "kl": (5.0, step("a", "b", behavior_logp=LOW, ref_logp=FAR), {}),
    "gold_gap": (1.0, with_gold(9, 0), {}),
    "gold_falls": (1.0, with_gold(9, -9), {}),
}  # fmt: skip


def test_the_table_is_whole() -> None:
    assert set(STOPS) == set(ADVICE) and {n for n in ADVICE if hasattr(DetectorsSection(), n)} == set(ADVICE)


@pytest.mark.parametrize("name", STOPS)
def test_every_limit_stops_after_its_steps_and_not_before(name: str) -> None:
    limit, exp, told = STOPS[name]
    gold = {"gold": "gold", "window": 2} if name.startswith("gold") else {}

    def detectors(value: float) -> Detectors:
        made = Detectors(
            DetectorsSection(steps=2, **{name: value}, **gold),
            {"x": 1.0, "f": 1.0},
            {"f": 1.0} if name == "format_share" else {},
        )
        if gold:
            made(with_gold(0, 0))
        return made

    def look(detect: Detectors) -> None:
        told_more = detect(exp, told)
        held(lambda e: e, detect)(exp)
        assert name in told_more or name in ("kl", "ensemble_std"), "what has a limit is logged"

    if name == "gold_falls":  # a trend of two steps: from the one before to this one, so the second look sees no rise
        made = Detectors(DetectorsSection(steps=1, gold_falls=limit, **gold), {"x": 1.0}, {})
        made(with_gold(0, 0))
        with pytest.raises(GateError, match=r"^hack/gold_falls is"):
            made(exp)
        return
    stops = detectors(limit)
    look(stops)
    where = "reward/ensemble_std" if name == "ensemble_std" else f"hack/{name}"
    how = "below" if name in LEAST else "beyond"
    with pytest.raises(GateError, match=rf"^{where} is .*, {how} detectors\.{name}={limit:g} for 2 steps"):
        look(stops)
    fine = detectors(limit / 100 if name in LEAST else limit * 100)
    for _ in range(4):
        look(fine)


def test_gold_must_be_a_reward_of_the_run() -> None:
    def plan(*words: str) -> None:
        validate(compose("train", list(words), None))

    plan("reward=[bleu,length]", "reward.length.weight=0", "detectors.gold=length", "detectors.gold_falls=1")
    with pytest.raises(
        ConfigError, match=r"^detectors\.gold=rouge: no such reward; there are bleu; one that is only logged: reward="
    ):
        plan("detectors.gold=rouge")
    with pytest.raises(
        ConfigError,
        match=r"^detectors\.gold_gap compares with detectors\.gold, which is empty; type detectors\.gold=REWARD$",
    ):
        plan("detectors.gold_gap=1")
    with pytest.raises(
        ConfigError, match=r"^detectors\.window=3: its halves are compared; type an even number of steps$"
    ):
        plan("reward=[bleu,length]", "detectors.gold=length", "detectors.window=3")
    with pytest.raises(ConfigError, match=r"^detectors\.pairs=-1: must be at least 0$"):
        plan("detectors.pairs=-1")
    with pytest.raises(ConfigError, match=r"^detectors\.answer: '\(' is no regular expression: missing \)"):
        plan("detectors.answer='('")
