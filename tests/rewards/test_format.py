"""Format tags, repetition, and lengths that depend on being right."""

import math

import pytest
import torch

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.cosine_length import CosineLength
from rlhf_cli.rewards.format import Format
from rlhf_cli.rewards.repetition import Repetition, repeated
from rlhf_cli.types import Sample


def scores(scorer, *responses, references=()):
    return scorer([Sample("p", r, references) for r in responses], torch.zeros(len(responses), dtype=torch.int64))


def values(scorer, *responses, references=()):
    return scores(scorer, *responses, references=references).value.tolist()


def test_format_wants_both_blocks_once_in_order_and_nothing_else():
    both = Format(tags=["think", "answer"], after=False, opened=False)
    good = "<think>a\nb</think>\n<answer>4</answer>\n"
    assert values(both, good, f"x {good}", f"{good} x", "<answer>4</answer><think>a</think>", "") == [1, 0, 0, 0, 0]
    # A second pair inside the first would match a lazy pattern; counting the tags refuses it.
    assert values(both, "<think>a</think><think>b</think><answer>4</answer>") == [0]
    # Three of the four tags stand once.
    assert scores(both, "<think>a</think><answer>4").components["tags"].tolist() == [0.75]


def test_format_after_and_opened():
    think = Format(tags=["think"], after=True, opened=False)
    assert values(think, "<think>a</think> so 4", "so 4", "<think>a</think> b </think>") == [1, 0, 0]
    # The template has written <think> already: the response starts inside, and a second one is one too many.
    opened = Format(tags=["think"], after=True, opened=True)
    assert values(opened, "a</think> so 4", "so 4") == [1, 0]


def test_format_refuses_tags_that_are_no_words():
    with pytest.raises(ConfigError, match=r"^reward\.format\.tags: \['a', 'a'\] is not allowed; give different words"):
        Format(tags=["a", "a"], after=False, opened=False)


def repetition(**settings):
    return Repetition(**{"n": 3, "penalty": 1.0, "unit": "words", "tokenizer": ""} | settings)


def test_repetition_by_hand():
    # [5,5,5,5,5], n=2: 4 bigrams, 1 distinct: -(1 - 1/4).
    assert repeated([5, 5, 5, 5, 5], 2) == 0.75
    # "a b c a b c a": 5 trigrams, 3 distinct: -0.4; half the penalty: -0.2; under n words: 0.
    assert values(repetition(), "a b c A b C a", "a b", "") == pytest.approx([-0.4, 0, 0])
    assert values(repetition(penalty=0.5), "a b c a b c a") == pytest.approx([-0.2])
    assert values(repetition(unit="characters", n=2), "aaaaa") == pytest.approx([-0.75])


def test_repetition_of_tokens(tmp_path):
    from rlhf_cli.models.tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path)  # a token per byte
    assert values(repetition(unit="tokens", n=2, tokenizer=str(tmp_path)), "aaaaa") == pytest.approx([-0.75])
    with pytest.raises(ConfigError, match=r"^reward\.repetition\.tokenizer: '' holds no tokenizer\.json; type"):
        repetition(unit="tokens")
    with pytest.raises(ConfigError, match=r"^reward\.repetition: n=0, penalty=1\.0 are not allowed"):
        repetition(n=0)


JUDGE = {
    "_target_": "rlhf_cli.rewards.rules.Regex",
    "pattern": "y",
    "mode": "search",
    "ignore_case": False,
    "dotall": True,
    "multiline": False,
}


def cosine(**settings):
    chosen = {
        "judge": JUDGE,
        "threshold": 1.0,
        "unit": "characters",
        "limit": 100,
        "right": [0.5, 1.0],
        "wrong": [-1.0, -0.5],
    }
    return CosineLength(**chosen | settings)


def test_cosine_length_by_hand():
    # At half the limit cos(pi/2) = 0: the middle of the bounds, 0.75 and -0.75; beyond the limit it stays.
    right, wrong = "y" * 50, "n" * 50
    assert values(cosine(), right, wrong, "y" * 100, "n" * 100, "y" * 300, "n" * 300, "") == pytest.approx(
        [0.75, -0.75, 0.5, -0.5, 0.5, -0.5, -1.0]
    )
    # One character: 0.5 + 0.25 (1 + cos(pi/100)).
    assert values(cosine(), "y") == pytest.approx([0.75 + 0.25 * math.cos(math.pi / 100)])


def test_cosine_length_is_missing_where_nothing_says_what_is_right():
    judge = {
        "_target_": "rlhf_cli.rewards.math_answer.MathAnswer",
        "method": "number",
        "extract": "any",
        "tolerance": 0.0,
    }
    got = scores(cosine(judge=judge), "4", references=("no number",))
    assert got.missing.tolist() == [True]
    with pytest.raises(ConfigError, match=r"^reward\.cosine_length: limit=0, .* are not allowed; limit starts at 1"):
        cosine(limit=0)
    with pytest.raises(
        ConfigError, match=r"^reward\.cosine_length\.judge: must be a reward that looks at one response"
    ):
        cosine(judge={"_target_": "rlhf_cli.rewards.rules.Length", "unit": "words", "target": 3, "slack": 0})
