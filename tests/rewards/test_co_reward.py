"""Cross-voting between two linked prompts: hand numbers, limits, ties, and how answers are read."""

import pytest
import torch

from rlhf_cli.rewards.co_reward import CoReward, vote
from rlhf_cli.types import Sample, Scores


def scores(*views: list[str], answer: str = "boxed", canonical: bool = True, ties: str = "missing") -> Scores:
    texts = [(g, t) for g, view in enumerate(views) for t in view]
    samples = [Sample("p", rf"so \boxed{{{t}}}" if t else "no idea", uid=str(g), link="q") for g, t in texts]
    scorer = CoReward(answer=answer, canonical=canonical, ties=ties)  # type: ignore[arg-type]
    return scorer(samples, torch.tensor([g for g, _ in texts]))


def rewards(*views: list[str], **settings: str) -> list[list[float]]:
    value = iter(scores(*views, **settings).value.tolist())  # type: ignore[arg-type]
    return [[next(value) for _ in view] for view in views]


def test_the_majority_of_one_wording_labels_the_other() -> None:
    # originals vote 4 (four of seven), rephrased vote 5 (five of eight); each is compared with the other's vote
    original, rephrased = ["4", "4", "5", "", "4", "7", "5", "4"], ["5", "5", "4", "5", "5", "4", "4", "5"]
    assert rewards(original, rephrased) == [[0, 0, 1, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 1, 1, 0]]
    # x: A A B C votes A, x': B B A B votes B
    assert rewards(["A", "A", "B", "C"], ["B", "B", "A", "B"]) == [[0, 0, 1, 0], [0, 0, 1, 0]]


def test_two_equal_views_are_majority_voting() -> None:
    view = ["4", "4", "5", "", "4", "7", "5", "4"]
    assert rewards(view, view) == [[1, 1, 0, 0, 1, 0, 0, 1]] * 2


def test_swapping_the_views_swaps_the_rewards() -> None:
    a, b = ["1", "2", "2", ""], ["1", "1", "2", "3"]
    assert rewards(a, b) == rewards(b, a)[::-1]


def test_views_that_agree_on_different_answers_get_nothing() -> None:
    assert rewards(["1"] * 4, ["2"] * 4) == [[0.0] * 4] * 2


def test_without_any_answer_the_other_view_gets_nothing() -> None:
    assert rewards(["", ""], ["3", "3"]) == [[0, 0], [0, 0]]


def test_a_tie_is_missing_or_goes_to_the_first_seen() -> None:
    tied, decided = ["1", "2"], ["2", "2"]
    found = scores(tied, decided)
    assert found.missing is not None and found.missing.tolist() == [False, False, True, True]
    assert found.value[:2].tolist() == [0, 1] and found.reasons[2] == "the vote on the linked prompt is a tie of 1, 2"
    assert found.components["label"].tolist() == [1, 1, 0, 0]
    assert rewards(tied, ["2", "1"], ties="first") == [[0, 1], [0, 1]]
    assert vote(["b", None, "a", "a", "b", "c"]) == ["b", "a"] and vote([None]) == []


def test_a_prompt_without_its_partner_is_missing() -> None:
    found = scores(["1", "1"])
    assert found.missing is not None and found.missing.all()
    assert found.reasons[0] == "link 'q' joins 1 prompt(s) of this step, wanted 2"


@pytest.mark.parametrize(
    ("answer", "canonical", "text", "read"),
    [
        ("boxed", True, r"\boxed{0.50}", "1/2"),
        ("boxed", True, r"\boxed{\frac{1}{2}}", "1/2"),
        ("boxed", True, r"first \boxed{3}, no: \boxed{1,000}", "1000"),
        ("boxed", True, r"\boxed{ Blue  Car }", "blue car"),
        ("boxed", True, r"\boxed{x = 3}", "x = 3"),
        *(
            ("boxed", True, rf"\boxed{{{t}}}", t)
            for t in (
                "2^{10}",
                "2^{5}",
                "2,3",
                "2,5",
                r"\{1, 2\}",
                r"\{1, 3\}",
                "1:2",
                "1:3",
                "3+4",
                "3-4",
                "2 \\cdot 3",
                "1/2/3",
                "5!",
                "1/0",
            )
        ),
        *(
            ("boxed", True, rf"\boxed{{{t}}}", n)
            for t, n in (
                ("-3", "-3"),
                ("+3", "3"),
                ("3.", "3"),
                (r"\$1,234.50", "2469/2"),
                ("50\\%", "50"),
                ("50 %", "50"),
                ("$7$", "7"),
                ("7 €", "7"),
                (r"-\dfrac{2}{4}", "-1/2"),
                (r"2\frac{1}{2}", "5/2"),
                ("2{,}000", "2000"),
                (r"12\,000", "12000"),
                ("1e3", "1000"),
                ("-$5", "-5"),
            )
        ),
        ("boxed", True, "the answer is 7", None),
        ("boxed", True, r"\boxed{ }", None),
        ("boxed", False, r"\boxed{0.50}", "0.50"),
        ("any", True, "it is 7 of 9", "9"),
        ("marked", True, "it is 7", None),
        ("marked", True, "#### 7.0", "7"),
    ],
)
def test_how_an_answer_is_read(answer: str, canonical: bool, text: str, read: str | None) -> None:
    assert CoReward(answer=answer, canonical=canonical, ties="first").read(text) == read  # type: ignore[arg-type]
