"""A text classifier as reward, on random tiny ones: which label, which text, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.models.loading import tiny_reward_model
from rlhf_cli.models.tiny import tiny_tokenizer
from rlhf_cli.rewards.classifier import Classifier
from rlhf_cli.rewards.make import make_scorer
from rlhf_cli.types import Sample

SAMPLES = [Sample("a film", "I liked it", meta={"intent": 2}), Sample("a film", "", meta={"intent": 4})]
GROUP = torch.zeros(2, dtype=torch.int64)


def make(**changes: Any) -> Classifier:
    settings: dict[str, Any] = {
        "path": "tiny:3", "label": "1", "first": 0, "value": "probability", "reads": "both", "batch_size": 8, "max_tokens": 64, "device": "cpu",
    }  # fmt: skip
    return Classifier(**(settings | changes))


def alone(text: str) -> torch.Tensor:
    """[labels] probabilities by the model itself, one row at a time, read at the last token."""
    model, ids = tiny_reward_model(3, torch.float32, 4), torch.tensor([tiny_tokenizer()(text)["input_ids"]])
    hidden = model.base_model(input_ids=ids).last_hidden_state[0, -1]
    return model.score(hidden).double().softmax(-1).detach()


def test_the_probability_of_the_label_on_prompt_and_response() -> None:
    p = alone("a film I liked it")
    assert make()(SAMPLES, GROUP).value[0] == pytest.approx(float(p[1]), abs=1e-5)
    assert make(label="4", first=1)(SAMPLES, GROUP).value[0] == pytest.approx(float(p[3]), abs=1e-5)
    of_response = make(reads="response")(SAMPLES, GROUP)
    assert of_response.value[0] == pytest.approx(float(alone("I liked it")[1]), abs=1e-5)
    parts = [make(label=str(i))(SAMPLES, GROUP).value for i in range(4)]
    assert torch.allclose(sum(parts), torch.ones(2), atol=1e-6)


def test_the_record_s_own_label_matches_or_not() -> None:
    top = int(alone("a film I liked it").argmax())
    for intent in range(1, 5):  # counted from 1
        sample = Sample("a film", "I liked it", meta={"intent": intent})
        found = make(label="meta.intent", first=1, value="match")([sample], GROUP[:1])
        assert found.value.tolist() == [float(intent - 1 == top)]


def test_a_long_text_loses_its_beginning() -> None:
    long = Sample("x" * 200, "the end")
    kept = make(max_tokens=10, reads="both")
    kept.load()
    assert bytes(kept._ids(long)[-7:]) == b"the end" and len(kept._ids(long)) == 10


def test_refusals() -> None:
    with pytest.raises(ConfigError) as e:
        make(label="positive")(SAMPLES, GROUP)
    assert str(e.value).startswith("label: tiny:3 has no label 'positive'; it has ")
    found = make(label="meta.mood")([Sample("a", "b")], GROUP[:1])
    assert found.missing is not None and found.missing.tolist() == [True]
    assert found.reasons == {0: "its record has no mood: map it with dataset.columns.meta.mood"}


def test_the_rewards_of_grue_compose() -> None:
    words = [
        "reward=[intent,meteor]",
        "reward.intent.path=tiny:1",
        "reward.intent.weight=0.75",
        "reward.meteor.weight=0.25",
    ]
    both = make_scorer(compose("train", words, None))
    assert both is not None and both.weights == {"intent": 0.75, "meteor": 0.25}
    scores = both([Sample("hi", "a cat", references=("a cat",), meta={"intent": 1})], GROUP[:1])
    # METEOR of two words that match in one piece: 1 - 0.5 (1 / 2)^3 = 0.9375
    assert float(scores.value) == pytest.approx(0.75 * float(scores.components["intent"]) + 0.25 * 0.9375, abs=1e-6)
    watched = make_scorer(compose("train", ["reward=[grue,meteor]"], None))
    assert watched is not None and watched.weights == {"meteor": 1.0}
    # a copy of the reference is the best of each: 1 - 0.5 / 3^3 for METEOR of three words
    sample = Sample("p", "the black cat", references=("the black cat",))
    parts = {k: float(v) for k, v in watched([sample], GROUP[:1]).components.items() if "/" not in k}
    wanted = {"meteor": 1 - 0.5 / 27, "rouge1": 1, "rouge2": 1, "rougeL": 1, "bleu": 1, "chrf": 1, "ter": 1}
    assert parts == pytest.approx(wanted, abs=1e-6)
