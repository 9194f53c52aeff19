"""Mathematical answers through math-verify: what is read, what is equal, and that no alarm is needed."""

import threading

import pytest
import torch

from rlhf_cli.rewards.math_answer import MathAnswer, final_number
from rlhf_cli.types import Sample


def scores(reference, *responses, extract="any", tolerance=0.0):
    scorer = MathAnswer(method="verify", extract=extract, tolerance=tolerance)
    return scorer([Sample("p", r, (reference,)) for r in responses], torch.zeros(len(responses), dtype=torch.int64))


def values(reference, *responses, **settings):
    return scores(reference, *responses, **settings).value.tolist()


def test_equal_values_in_other_clothes():
    assert values("1/2", r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", "It is 1/2", r"\boxed{2}") == [1, 1, 1, 0]
    assert values("x^2+1", r"\boxed{1+x^2}", r"\boxed{x^2}") == [1, 0]
    assert values(r"\sqrt{8}", r"\boxed{2\sqrt{2}}") == [1]
    assert values("#### $1,234.50", "The answer is $1,234.5", "#### 1234.5") == [1, 1]
    assert values("50%", "50%", r"\boxed{50}", r"\boxed{50\%}") == [1, 1, 1]
    assert values("2 1/2", r"\boxed{2.5}") == [1] and values("12 cm", r"\boxed{12}") == [1]


def test_the_reference_comes_first_because_the_comparison_is_not_symmetric():
    assert values("$x<3$", r"\boxed{(-\infty,3)}") == [1]
    assert values(r"$(-\infty,3)$", r"\boxed{x<3}") == [0]


def test_only_the_last_box_counts():
    # The library alone would merge both boxes into the set {3, 4}, which matches neither.
    assert values("4", r"\boxed{3}. Wait, \boxed{4}") == [1] and values("3", r"\boxed{3}. Wait, \boxed{4}") == [0]
    assert values("3", r"\boxed{3} or \boxed{4", "#### 3") == [0, 1]


def test_a_heading_is_no_answer_and_the_later_mark_counts():
    steps = "#### Step 1: add\n2+2=4\n\n"
    assert (
        values(
            "4", steps + r"The answer is $\boxed{4}$", steps + "It is 4.", steps + "#### 4", "#### 2. Add\n2+2 is $4$"
        )
        == [1] * 4
    )
    assert (
        values(
            "4",
            "#### **Result**\nIt is 4",
            "\\boxed{4}\n\n#### Check\n5-1",
            "#### $4$\nSo it is, not 5.",
            "##### 5\n\\boxed{4}",
        )
        == [1] * 4
    )
    assert values("4", "#### 5\nNo: \\boxed{4}", "#### \\boxed{4}", "\\boxed{4}\n#### 5", "#### 5\n#### 4") == [
        1,
        1,
        0,
        1,
    ]
    assert values("blue", "So:\n#### blue") == [1] and scores(
        "4", steps + "It is 4.", extract="marked"
    ).value.tolist() == [0]


def test_a_mark_without_an_answer_is_none_and_a_line_that_is_an_answer_no_heading():
    assert values("4", "It is $\\boxed{4}$\n#### \nDone", "\\boxed{4}\n#### ") == [1, 1]
    assert values("$\\sqrt{2}$", "#### sqrt(2)\nThis is 3.") == [1]
    assert values("$\\frac{\\pi}{2}$", "#### pi/2\n\nDone.", "#### pi is known\nIt is $\\pi/2$") == [1, 1]
    assert values("5", "#### Answer: 5\nHope it is not 6", "#### Answer: 5", "#### Answer:\nIt is 5.") == [1, 1, 1]


def test_numbers_too_stand_at_the_later_mark():
    read = [
        final_number(t, "any")
        for t in ("#### 1 add\n\\boxed{4}", "\\boxed{3}\n#### 4", "#### 4\nThat is 5 - 1", "#### \\boxed{4}")
    ]
    assert read == [4] * 4


def test_marked_wants_a_mark():
    got = scores("42", "42", r"\boxed{42}", "#### 42", extract="marked")
    assert got.value.tolist() == [0, 1, 1] and got.components["found"].tolist() == [0, 1, 1]


def test_tolerance_of_numbers():
    # |0.667 - 2/3| = 0.00033 of 0.667
    assert values("0.667", r"\boxed{\frac{2}{3}}", tolerance=0.001) == [1]
    assert values("0.667", r"\boxed{\frac{2}{3}}") == [0]


def test_a_reference_without_an_answer_is_missing_and_not_wrong():
    got = scores("no answer is here, and this text is far too long to be one. " * 5, r"\boxed{4}")
    assert got.missing.tolist() == [True] and got.reasons == {0: "its references hold no answer"}


def test_it_works_in_a_thread():
    # The library's own time-outs are alarms, which only the main thread may set: elsewhere every score would be lost.
    found = []
    thread = threading.Thread(target=lambda: found.extend(values("1/2", r"\boxed{0.5}")))
    thread.start()
    thread.join()
    assert found == [1]


def test_the_library_needs_its_alarm_elsewhere():
    """Why time-outs are off: should the library change, they can come back."""
    import math_verify

    caught = []

    def parse():
        try:
            math_verify.parse(r"\boxed{1}", parsing_timeout=1, raise_on_error=True)
        except ValueError as e:
            caught.append(e)

    thread = threading.Thread(target=parse)
    thread.start()
    thread.join()
    assert caught


@pytest.mark.parametrize("response", ["", "\\boxed{}", "\\boxed{" + "(" * 3000, "9" * 5000, "\\frac{" * 500])
def test_odd_responses_are_wrong_and_not_errors(response):
    assert values("7", response) == [0]
