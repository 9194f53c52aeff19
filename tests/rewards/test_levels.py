"""The four levels, on the number format and on Knights and Knaves."""

import pytest
import torch

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.levels import Levels
from rlhf_cli.types import Sample

FORMAT = r"<think>.*?</think>\s*<answer>(.*?)</answer>"
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
KNIGHTS = r"(\w+) is a (knight|knave)"


def level(response: str, reference: str, answer: str = NUMBER) -> float:
    scores = Levels(format=FORMAT, answer=answer)([Sample("p", response, references=(reference,))], torch.zeros(1))
    assert scores.missing is not None and not scores.missing.any()
    assert scores.components["best"].tolist() == [float(scores.value == -1)]
    return float(scores.value)


@pytest.mark.parametrize(
    ("response", "wanted"),
    [
        ("<think>6 x 7</think>\n<answer>The result is 1,042.</answer>", -1),
        ("<think>6 x 7</think> <answer>41</answer>", -2),
        ("<think>6 x 7</think> <answer>many</answer>", -3),
        ("<think>6 x 7</think> <answer>41 or 1042</answer>", -3),  # two numbers where the reference has one
        ("<answer>1042</answer>", -4),
        ("<think>a</think> <answer>1042</answer> or so", -4),
        ("", -4),
    ],
)
def test_levels_of_a_number(response: str, wanted: float) -> None:
    assert level(response, "1042") == wanted


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("(1) Zoey is a knave (2) Oliver is a knight", -1),
        ("Oliver is a  KNIGHT, Zoey is a knave", -1),
        ("Zoey is a knight, Oliver is a knight", -2),
        ("Zoey is a knave", -3),
        ("nobody knows", -3),
    ],
)
def test_levels_of_knights_and_knaves(answer: str, wanted: float) -> None:
    response = f"<think>she lies</think><answer>{answer}</answer>"
    assert level(response, "(1) Zoey is a knave (2) Oliver is a knight", KNIGHTS) == wanted


def test_a_reference_without_an_answer_is_missing() -> None:
    scores = Levels(format=FORMAT, answer=NUMBER)([Sample("p", "x", references=("none",))], torch.zeros(1))
    assert scores.missing is not None and scores.missing.tolist() == [True]
    assert scores.reasons == {0: "no reference holds an answer"}


def test_patterns_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"^reward\.levels\.format='x' has no group; put the answer in parentheses$"):
        Levels(format="x", answer=NUMBER)
    with pytest.raises(ConfigError, match=r"^reward\.levels\.answer='\(' is no regular expression"):
        Levels(format=FORMAT, answer="(")
