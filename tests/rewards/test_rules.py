"""Length, regular expression, exact match and final numbers."""

import threading
from fractions import Fraction

import pytest
import torch

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.math_answer import MathAnswer, final_number, last_boxed
from rlhf_cli.rewards.rules import ExactMatch, Length, Regex
from rlhf_cli.types import Sample


def values(scorer, *responses, references=()):
    scores = scorer([Sample("p", r, references) for r in responses], torch.zeros(len(responses), dtype=torch.int64))
    return scores.value.tolist()


def test_length_falls_linearly_on_both_sides():
    # Target 4, slack 1: 3..5 words score 1; 2 words are 1 too short: 1 - 1/4; 7 are 2 too long: 1 - 2/4; 0: 1 - 3/4.
    length = Length(unit="words", target=4, slack=1)
    assert values(length, "a b c", "a b c d e", "a b", "a b c d e f g", "", "a " * 50) == [1, 1, 0.75, 0.5, 0.25, 0]
    assert values(Length(unit="characters", target=4, slack=0), "abcd", "abc", "ab cd") == [1, 0.75, 0.75]


def test_length_refuses_settings_without_a_meaning():
    with pytest.raises(ConfigError, match=r"reward\.length: target=0, slack=0 are not allowed; target starts at 1"):
        Length(unit="words", target=0, slack=0)


def regex(pattern, mode="fullmatch", **on):
    flags = {"ignore_case": False, "dotall": False, "multiline": False} | on
    return Regex(pattern=pattern, mode=mode, **flags)


def test_regex_modes_and_flags():
    assert values(regex(r"yes|no"), "yes", "yes!", "") == [1, 0, 0]
    assert values(regex(r"yes|no", "search"), "oh yes!", "YES") == [1, 0]
    assert values(regex(r"yes", ignore_case=True), "YES") == [1]
    assert values(regex(r"a.b"), "a\nb") == [0] and values(regex(r"a.b", dotall=True), "a\nb") == [1]
    assert values(regex(r"^b$", "search"), "a\nb") == [0] and values(
        regex(r"^b$", "search", multiline=True), "a\nb"
    ) == [1]


def test_regex_errors():
    with pytest.raises(ConfigError, match=r"reward\.regex\.pattern: '\(' is not a regular expression: missing \)"):
        regex("(")
    with pytest.raises(ConfigError, match=r"reward\.regex\.pattern is empty; type reward\.regex\.pattern="):
        regex("")


def exact(case=True, punctuation=True, articles=True):
    return ExactMatch(ignore_case=case, ignore_punctuation=punctuation, ignore_articles=articles)


def test_exact_match_normalisation():
    refs = ("The Eiffel Tower!", "Tour  Eiffel")
    assert values(exact(), "eiffel tower", "a tour eiffel.", "eiffel", "", references=refs) == [1, 1, 0, 0]
    assert values(exact(case=False), "eiffel tower", references=refs) == [0]
    assert values(exact(punctuation=False), "the eiffel tower", references=refs) == [0]
    assert values(exact(articles=False), "eiffel tower", references=refs) == [0]
    # A reference of nothing but ignored characters is not matched by the empty response.
    assert values(exact(), "", "!", "?", references=("!",)) == [0, 1, 0]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("so 48+24 = <<48+24=72>>72 clips.\n#### 72", "72"),
        ("#### 1,234.50", "2469/2"),
        ("#### $-5", "-5"),
        ("#### 3\n#### 4", "4"),
        ("#### 2. Add them\nThe answer is 7", "7"),  # a heading
        ("#### Step 2\n\\boxed{8}", "8"),
        ("\\boxed{3} wait, \\boxed{4} and 9", "4"),
        ("\\boxed{\\frac{3}{4}}", "3/4"),
        ("\\boxed{-\\dfrac12}", "-1/2"),
        ("\\boxed{x = 42\\text{ km}^2}", "42"),
        ("\\boxed{nothing} 5", None),
        ("cut off \\boxed{12", "12"),
        ("That costs $1,000.", "1000"),
        ("\\$1{,}000", "1000"),
        ("It is 50%.", "50"),
        ("= 10-5", "5"),
        ("x is -5.", "-5"),
        ("\u22125", "-5"),
        ("2 1/2 cups", "5/2"),
        ("2\\frac{1}{2}", "5/2"),
        ("42 cm^2, or cm^{2}, of H2O", "42"),
        ("1e3", "1000"),
        (".5", "1/2"),
        ("1,2345", "2345"),
        ("3/0", None),
        ("9" * 5000, None),
        ("no number", None),
        ("", None),
    ],
)
def test_final_number(text, expected):
    assert final_number(text, "any") == (None if expected is None else Fraction(expected))


def test_final_number_marked_ignores_bare_numbers():
    assert final_number("the answer is 7", "marked") is None
    assert final_number("the answer is \\boxed{7}", "marked") == 7
    assert last_boxed("\\boxed{a{b}c} d") == "a{b}c"


def test_math_answer_scores_by_value():
    scorer = MathAnswer(method="number", extract="any", tolerance=0.0)
    got = scorer([Sample("p", r, ("... #### 0.75",)) for r in ("3/4", "0.750", "0.7", "none")], torch.zeros(4))
    assert got.value.tolist() == [1, 1, 0, 0]
    assert got.components["found"].tolist() == [1, 1, 1, 0]
    assert values(scorer, "2", references=("#### 1", "#### 2")) == [1]
    # |0.667 - 2/3| = 0.000333 <= 0.001
    assert values(
        MathAnswer(method="number", extract="any", tolerance=0.001), "0.667", "0.67", references=("2/3",)
    ) == [1, 0]
    with pytest.raises(ConfigError, match=r"reward\.math_answer\.tolerance: -1 is not allowed"):
        MathAnswer(method="number", extract="any", tolerance=-1)


def test_math_answer_without_a_number_in_the_reference_is_missing():
    got = MathAnswer(method="number", extract="any", tolerance=0.0)([Sample("p", "7", ("seven",))], torch.zeros(1))
    assert got.missing.tolist() == [True] and got.value.isnan().all()


def test_math_answer_works_in_any_thread_and_on_hostile_text():
    hostile = "1 " * 5000 + "9" * 20000 + "- " * 5000 + "####" * 5000 + "\\boxed{" * 5000
    done = []
    thread = threading.Thread(target=lambda: done.append(final_number(hostile, "any")))
    thread.start()
    thread.join(timeout=5)
    assert done == [None]
