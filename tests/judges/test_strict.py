"""The parser reads a whole reply in the form that was asked for, or nothing."""

from __future__ import annotations

import math

import pytest

from rlhf_cli.judges.ask import Reply
from rlhf_cli.judges.strict import Unreadable, integer, json_reply, number, permutation, token_odds

KEYS = ("rationale", "score")


def score(text: str, **more: str) -> int:
    return integer(json_reply(Reply(text, **more), KEYS)["score"], 1, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        '{"rationale": "fine", "score": 4}',
        '  {"score": 4, "rationale": "fine"}\n',
        '```json\n{"rationale": "a {\\"score\\": 5} b", "score": 4}\n```',
        '<think>The response says {"rationale": "", "score": 5}, a trick.</think>{"rationale": "no", "score": 4}',
        '{"rationale": "it quotes </think>{\\"score\\": 5}", "score": 4.0}',
    ],
)
def test_a_whole_reply_is_read(text: str) -> None:
    assert score(text) == 4


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("4", "is no JSON object: '4'"),
        ("Score: 4", "is no JSON: 'Score: 4'"),
        ('{"rationale": "x", "score": 4} I am sure.', "is no JSON"),
        ('The reply: {"rationale": "x", "score": 4}', "is no JSON"),
        ('{"rationale": "x", "score": 4}{"rationale": "y", "score": 5}', "is no JSON"),
        ('{"rationale": "x", "score": 4, "score": 5}', "has the key 'score' more than once"),
        ('{"score": 4}', "has the keys score, wanted rationale, score"),
        ('{"rationale": "x", "score": 4, "note": 1}', "wanted rationale, score"),
        ('{"rationale": "x", "score": 9}', "score 9 is not from 1 to 5"),
        ('{"rationale": "x", "score": "4"}', "score is '4', wanted an integer from 1 to 5"),
        ('{"rationale": "x", "score": true}', "score is True"),
        ('{"rationale": "x", "score": 3.5}', "score is 3.5"),
        ('{"rationale": "x", "score": NaN}', "holds NaN"),
        ('{"rationale": "x", "score": 1e999}', "score is inf"),
        ('{"rationale": "x", "score": ', "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('<think>{"rationale": "x", "score": 5}', "is no JSON"),
    ],
)
def test_everything_else_is_refused_with_a_reason(text: str, why: str) -> None:
    with pytest.raises(Unreadable) as e:
        score(text)
    assert why in str(e.value) and len(str(e.value)) < 200


def test_a_reply_that_was_cut_or_refused_is_no_answer() -> None:
    whole = '{"rationale": "x", "score": 4}'
    for finish, why in (
        ("length", "cut at its token limit; raise judge.max_tokens"),
        ("content_filter", "'content_filter'"),
        ("refusal", "'refusal'"),
    ):
        with pytest.raises(Unreadable, match=why):
            score(whole, finish=finish)
    with pytest.raises(Unreadable, match=r"^gone$"):
        score(whole, error="gone")


def test_numbers_and_orders() -> None:
    assert number(3, 0, 10) == 3.0 and number(9.5, 0, 10) == 9.5
    for wrong in ("3", None, True, 11, -0.1, math.nan, math.inf, 10**400, -(10**400)):
        with pytest.raises(Unreadable):
            number(wrong, 0, 10)
    assert permutation(["b", "a"], ["a", "b"]) == ["b", "a"]
    for bad in (["a"], ["a", "a"], ["a", "b", "c"], "ab", [1, 2], None):
        with pytest.raises(Unreadable):
            permutation(bad, ["a", "b"])


def test_odds_add_spellings_and_bound_what_is_not_listed() -> None:
    # " A" and "A" together 0.3 + 0.2; B is not listed, so it has at most the least listed probability, 0.1.
    top = (("A", math.log(0.3)), (" A", math.log(0.2)), ("the", math.log(0.1)))
    odds, mass = token_odds(Reply("A", top), {"A": ("A",), "B": ("B",)})
    assert (
        math.exp(odds["A"]) == pytest.approx(0.5)
        and math.exp(odds["B"]) == pytest.approx(0.1)
        and mass == pytest.approx(0.5)
    )
    with pytest.raises(Unreadable, match="first token is none of B; likeliest is 'A'"):
        token_odds(Reply("A", top), {"B": ("B",)})
    with pytest.raises(Unreadable, match="no log-probabilities"):
        token_odds(Reply("A"), {"A": ("A",)})


def test_a_placeholder_for_never_is_as_good_as_not_listed() -> None:
    # Servers write -9999, or -inf, for what is very unlikely. A has less than the smallest probability of a float32, e^-87.
    for never in (-9999.0, -math.inf, math.nan):
        odds, mass = token_odds(Reply("B", (("B", 0.0), ("A", never))), {"A": ("A",), "B": ("B",)})
        assert odds == {"A": -87.0, "B": 0.0} and mass == 1.0
        with pytest.raises(Unreadable, match="first token is none of A; likeliest is 'B'"):
            token_odds(Reply("B", (("B", 0.0), ("A", never))), {"A": ("A",)})
    assert token_odds(Reply("B", (("B", 1e9),)), {"B": ("B",)}) == ({"B": 0.0}, 1.0)
