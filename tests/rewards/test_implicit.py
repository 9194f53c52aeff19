"""The implicit reward of two tiny language models, its token terms, and models with several outputs."""

import math
from functools import partial

import pytest
import torch

from rlhf_cli.combine import nominal_robust
from rlhf_cli.errors import ConfigError
from rlhf_cli.models.tiny import tiny_causal, tiny_tokenizer
from rlhf_cli.rewards.attributes import Attributes
from rlhf_cli.rewards.combine import Combined
from rlhf_cli.rewards.implicit import Implicit
from rlhf_cli.rewards.model import Model
from rlhf_cli.types import Sample

SAMPLES = [Sample("hi", "a cat"), Sample("hi", ""), Sample("what is up", "né € 👩‍🚀"), Sample("hi", "x" * 90)]
GROUP = torch.zeros(4, dtype=torch.int64)
RUN = {"batch_size": 2, "max_tokens": 80, "device": "cpu", "dtype": "fp32"}


def make(**changes) -> Implicit:
    settings = {"path": "tiny:1", "reference": "tiny:2", "beta": 0.5, "token_level": False}
    return Implicit(**RUN | settings | changes)


def by_hand(seed: int, prompt: str, response: str) -> list[float]:
    """Log-probabilities of the response's tokens and its end, one row alone."""
    tok, model = tiny_tokenizer(), tiny_causal(seed, torch.float32)
    head = tok.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
    a = tok(head, add_special_tokens=False)["input_ids"]
    b = [*tok(response, add_special_tokens=False)["input_ids"], tok.eos_token_id]
    with torch.no_grad():
        logp = model(torch.tensor([a + b])).logits[0].double().log_softmax(-1)
    return [float(logp[len(a) + t - 1, x]) for t, x in enumerate(b)]


def test_beta_times_the_summed_log_ratio() -> None:
    got = make()(SAMPLES, GROUP)
    for i in (0, 1, 2):
        want = 0.5 * (
            sum(by_hand(1, SAMPLES[i].prompt, SAMPLES[i].response))
            - sum(by_hand(2, SAMPLES[i].prompt, SAMPLES[i].response))
        )
        assert got.value[i].item() == pytest.approx(want, abs=1e-4)
    assert got.missing is not None and got.missing.tolist() == [False, False, False, True]
    assert got.reasons == {3: "it is longer than 80 tokens"} and got.spans is None


def test_equal_models_imply_no_reward() -> None:
    assert make(reference="tiny:1")(SAMPLES[:3], GROUP[:3]).value.eq(0).all()


def test_without_reference_it_is_the_mean_log_probability() -> None:
    logp = by_hand(1, "hi", "a cat")
    assert make(reference="none")(SAMPLES[:1], GROUP[:1]).value.item() == pytest.approx(
        0.5 * sum(logp) / len(logp), abs=1e-5
    )


def test_token_terms_telescope_to_the_value_and_fall_on_their_characters() -> None:
    got = make(token_level=True)(SAMPLES, GROUP)
    assert got.spans is not None
    for i in (0, 1, 2):
        own = [s for s in got.spans if s[0] == i]
        text = SAMPLES[i].response
        assert "".join(text[a:b] for _, a, b, _ in own) == text, "every character once, in order"
        end = 0.5 * (by_hand(1, SAMPLES[i].prompt, text)[-1] - by_hand(2, SAMPLES[i].prompt, text)[-1])
        assert sum(x for *_, x in own) + end == pytest.approx(got.value[i].item(), abs=1e-4)
    a, b = by_hand(1, "hi", "a cat"), by_hand(2, "hi", "a cat")
    assert [x for i, *_, x in got.spans if i == 0] == pytest.approx(
        [0.5 * (x - y) for x, y in zip(a[:-1], b[:-1], strict=True)], abs=1e-4
    )


def test_a_text_that_its_tokens_do_not_say_is_missing() -> None:
    scorer = make(token_level=True)
    scorer.load()
    plain = scorer.tokenizer.decode
    scorer.tokenizer.decode = lambda ids, **more: plain(ids, **more).replace("cat", "Cat")  # a decoder that normalises
    got = scorer(SAMPLES[:2], GROUP[:2])
    assert got.missing is not None and got.missing.tolist() == [True, False] and got.spans == []
    assert got.reasons == {
        0: "the tokenizer of reward.implicit does not give its text back, so its characters have no tokens"
    }


def test_both_models_must_be_named() -> None:
    for name in ("path", "reference"):
        with pytest.raises(
            ConfigError, match=rf"^reward\.implicit\.{name} is empty; type reward\.implicit\.{name}=RUN"
        ):
            make(**{name: ""})


HEADS = {"kind": 1, "short": 0, "safe": 2}


def test_outputs_are_parts_by_number() -> None:
    got = Attributes(path="tiny:3", heads=HEADS, render="turn", **RUN)(SAMPLES, GROUP)
    assert set(got.components) == set(HEADS)
    parts = torch.stack([got.components[n] for n in ("short", "kind", "safe")])
    assert torch.allclose(got.value[:3], parts[:, :3].mean(0), atol=1e-6)
    assert got.components["safe"].isnan().tolist() == [False, False, False, True] and got.reasons == {
        3: "it is longer than 80 tokens"
    }
    model = Attributes(path="tiny:3", heads=HEADS, render="turn", **RUN)
    model.load()
    model.model.score.weight.data[1] = 0.0
    assert model(SAMPLES[:1], GROUP[:1]).components["kind"].item() == 0, "kind is output 1"


def test_heads_number_the_outputs() -> None:
    with pytest.raises(ConfigError, match=r"^heads: .* must number the model's outputs from 0, each once"):
        Attributes(path="tiny:3", heads={"a": 0, "b": 2}, render="turn", **RUN)
    with pytest.raises(ConfigError, match=r"^heads: \{'a': 'x'\} must number"):
        Attributes(path="tiny:3", heads={"a": "x"}, render="turn", **RUN)  # type: ignore[dict-item]


def test_one_output_is_what_a_reward_model_has() -> None:
    one = Model(path="tiny:3", render="turn", **RUN)(SAMPLES[:1], GROUP[:1]).value.item()
    assert math.isfinite(one) and Model(path="tiny:3", render="turn", **RUN).values(SAMPLES[:1], GROUP[:1]) == [[one]]


def test_a_sigma_is_a_part_and_no_attribute() -> None:
    heads = {"a": 0, "a/sigma": 1, "b": 2, "b/sigma": 3}
    got = Attributes(path="tiny:1", heads=heads, render="turn", **RUN)(SAMPLES[:2], GROUP[:2])  # type: ignore[arg-type]
    assert torch.allclose(got.value, (got.components["a"] + got.components["b"]) / 2, atol=1e-6)
    scorer = Combined(
        {"heads": (1.0, lambda samples, group: got)}, {"heads/a": 1.0, "heads/b": 1.0}, partial(nominal_robust, lam=1.0)
    )
    sure = got.components["a/sigma"] < got.components["b/sigma"]
    want = torch.where(sure, got.components["a"], got.components["b"])
    assert torch.equal(scorer(SAMPLES[:2], GROUP[:2]).value, want), "the nominal reward is that of the surest head"
    with pytest.raises(ConfigError, match=r"^heads: b/sigma belongs to no attribute"):
        Attributes(path="tiny:1", heads={"a": 0, "b/sigma": 1}, render="turn", **RUN)  # type: ignore[arg-type]
