"""1 - TER by hand: edits over the words of the reference."""

import pytest
import torch

from rlhf_cli.rewards.ter import Ter
from rlhf_cli.types import Sample


def score(response: str, *references: str, lowercase: bool = True, punctuation: bool = True) -> float:
    made = Ter(lowercase=lowercase, punctuation=punctuation)
    return float(made([Sample("p", response, references=references)], torch.zeros(1)).value)


@pytest.mark.parametrize(
    ("response", "references", "wanted"),
    [
        ("the cat sat on the mat", ["the cat sat on the mat"], 1.0),
        ("the cat sat", ["the cat sat on mat"], 1 - 2 / 5),  # two words are missing
        ("on the mat the cat sat", ["the cat sat on the mat"], 1 - 1 / 6),  # one phrase is shifted
        ("a dog", ["the cat sat on mat", "a dog ran"], 1 - 1 / 3),  # the best reference counts
        ("", ["a b"], 0.0),
        ("x y z", ["a"], -2.0),  # one substitution, two words too many
    ],
)
def test_edits_over_words(response: str, references: list[str], wanted: float) -> None:
    assert score(response, *references) == pytest.approx(wanted, abs=1e-6)


def test_case_counts_where_asked() -> None:
    assert score("The cat", "the cat") == 1.0 and score("The cat", "the cat", lowercase=False) == 0.5


def test_without_reference_it_is_missing() -> None:
    found = Ter(lowercase=True, punctuation=True)([Sample("p", "x")], torch.zeros(1))
    assert found.missing is not None and found.missing.tolist() == [True]
