"""The written-out decoding step against the model's own forward."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlhf_cli.config import LoraSection
from rlhf_cli.models.lora import add_lora
from rlhf_cli.rollout import decoder
from rlhf_cli.rollout.decoder import Decoder, agree, readable
from tests.rollout.test_sampler import PROMPTS, family, llama, sampler, seeds


def test_it_is_used_and_draws_what_the_model_draws() -> None:
    fast, slow = sampler(llama()), sampler(llama())
    slow.written_out = False
    one, other = (s.sample(PROMPTS, 2, seeds(8)) for s in (fast, slow))
    assert fast.written_out
    assert one.ids == other.ids
    torch.testing.assert_close(one.logp, other.logp, rtol=0, atol=1e-5)


def test_bf16_with_packed_weights_agrees_and_follows_the_weights() -> None:
    model = llama().bfloat16()
    s = sampler(model)
    before = s.sample(PROMPTS, 2, seeds(8))
    assert s.written_out
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert s.sample(PROMPTS, 2, seeds(8)).ids != before.ids  # weights are packed anew at every call


def test_a_model_that_only_looks_alike_decodes_by_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sampler(llama())
    expected.written_out = False
    monkeypatch.setattr(decoder, "_turned", lambda x, cos, sin: x)  # as if the model placed its tokens otherwise
    s, said = sampler(llama()), []
    s.note = said.append
    found, own = (x.sample(PROMPTS, 2, seeds(8)) for x in (s, expected))
    assert s.written_out is False
    assert said == [
        "sampler: the written-out decoding step differs from the model's own forward; the model's own is used"
    ]
    assert found.ids == own.ids and torch.equal(found.logp, own.logp)  # nothing of the other step is left in the cache


def test_other_adapters_other_norms_and_eager_attention_are_not_read() -> None:
    assert readable(llama())
    assert not readable(llama(attention="eager"))
    assert not readable(family("Gemma"))  # its norm has another form
    assert readable(add_lora(llama(), LoraSection(r=2), 0))
    for more in ({"use_dora": True}, {"lora_bias": True}):
        assert not readable(get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], **more)))
    merged = add_lora(llama(), LoraSection(r=2), 0)
    merged.merge_adapter()
    assert not readable(merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_added_as_the_model_adds_them(dtype: torch.dtype) -> None:
    model = add_lora(llama(), LoraSection(r=2, alpha=6), 0).to(dtype)
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.3, generator=generator)
    base = sampler(model)
    fast, slow = sampler(model), sampler(model)
    slow.written_out = False
    one, other = (s.sample(PROMPTS, 2, seeds(8)) for s in (fast, slow))
    assert fast.written_out
    if dtype == torch.float32:
        assert one.ids == other.ids
        torch.testing.assert_close(one.logp, other.logp, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert base.sample(PROMPTS, 2, seeds(8)).ids != one.ids and base.written_out


def test_agreement_is_relative_to_the_norm_and_nan_is_none() -> None:
    x = torch.ones(4)
    assert agree(x + 1e-6, x) and not agree(x + 1e-4, x) and not agree(x * float("nan"), x)


def test_one_process_alone_spins_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from rlhf_cli.launch.local import calm

    for alone, spins in ((True, "30000"), (False, "3000")):
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        calm(1, alone=alone)
        assert os.environ["GOMP_SPINCOUNT"] == spins


def test_weights_of_a_decoder_are_those_of_its_model() -> None:
    model = llama()
    d = Decoder(model, 4)
    x = torch.randn(4, model.config.hidden_size)
    torch.testing.assert_close(d.layers[0].gate(x), model.model.layers[0].mlp.gate_proj(x))
