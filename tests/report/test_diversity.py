"""How varied responses are, by hand."""

import math

import pytest

from rlhf_cli.report.diversity import diversity, segments
from rlhf_cli.report.evaluate import summarise


def rows(*texts: str, uid: str = "p") -> list[dict[str, object]]:
    return [{"uid": uid, "response": t} for t in texts]


def test_n_grams_are_pooled() -> None:
    # a b a b and a b c d: words a 3, b 3, c, d of 8; bigrams ab ba ab | ab bc cd: 4 different of 6
    found = diversity(rows("A b a b", "a, b c d!"))
    assert found["distinct_1"] == 4 / 8 and found["distinct_2"] == 4 / 6 and found["vocabulary"] == 4
    wanted = 2 * 3 / 8 * math.log2(8 / 3) + 2 * 1 / 8 * 3
    assert found["entropy_1"] == pytest.approx(wanted)
    # bigrams: ab 3, ba, bc, cd
    assert found["entropy_2"] == pytest.approx(0.5 * 1 + 3 / 6 * math.log2(6))
    assert "msttr" not in found, "there is no window of 100 words"


def test_equal_responses_are_one_and_others_none() -> None:
    assert diversity(rows(*["the cat sat on the mat"] * 3))["self_bleu"] == pytest.approx(1)
    assert diversity(rows("one two three four five", "six seven eight nine ten"))["self_bleu"] < 0.1
    assert "self_bleu" not in diversity(rows("one") + rows("two", uid="q"))


def test_the_ratio_is_of_whole_windows() -> None:
    words = [str(i % 50) for i in range(100)] + ["x"] * 100 + ["y"] * 99
    assert segments(words) == pytest.approx((0.5 + 0.01) / 2)


def test_nothing_said_is_no_error_and_it_is_off_unless_asked() -> None:
    assert diversity(rows("", "!?")) == {"self_bleu": pytest.approx(0, abs=1)}
    some = [{**r, "tokens": 1, "truncated": False, "score": 1.0} for r in rows("a b", "a c")]
    assert not any(k.startswith("diversity/") for k in summarise(some, 10))
    assert summarise(some, 10, True)["diversity/distinct_1"] == 3 / 4
