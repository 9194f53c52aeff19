"""Exports, read back by plain transformers and peft."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from rlhf_cli.config import LoraSection, ModelSection
from rlhf_cli.engine.masters import MasterEngine
from rlhf_cli.errors import ConfigError
from rlhf_cli.models.export import export
from rlhf_cli.models.loading import load_causal, load_scalar, load_tokenizer
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.tiny import tiny_config, tiny_tokenizer

F32 = torch.float32
TINY = ModelSection(source="tiny")
IDS = torch.tensor([[256, *b"export me"]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def with_adapter(model: Any, r: int = 4) -> Any:
    """Adapters as after training: not zero."""
    adapted = add_lora(model, LoraSection(r=r, alpha=8), seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.2, generator=generator)
    return adapted


def tied() -> Any:
    config = tiny_config()
    config.tie_word_embeddings = True
    with torch.random.fork_rng(devices=[]):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("make", [lambda: load_causal(TINY, dtype=F32, seed=3), tied], ids=["untied", "tied"])
def test_plain_transformers_reads_it_back(make: Any, tmp_path: Path) -> None:
    model = make()
    export(model, tiny_tokenizer(), tmp_path / "export", merge=True)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(logits(back), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "export")("hi").input_ids == [104, 105]
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == tiny_tokenizer().chat_template
    assert [p.name for p in tmp_path.iterdir()] == ["export"], "nothing is left aside"
    assert not [p for p in (tmp_path / "export").iterdir() if p.suffix in (".bin", ".pt")]


@pytest.mark.parametrize("make", [lambda: load_causal(TINY, dtype=F32, seed=3), tied], ids=["untied", "tied"])
def test_weights_that_lie_in_one_tensor_are_all_written(make: Any, tmp_path: Path) -> None:
    model = make()
    MasterEngine(model, lambda p: torch.optim.SGD(p, lr=1.0), 0.0, 1)
    export(model, tiny_tokenizer(), tmp_path / "export", merge=True)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())
    with safe_open(tmp_path / "export" / "model.safetensors", "pt") as f:
        assert set(f.keys()) == {k for k, _ in model.named_parameters()}


def test_written_precision(tmp_path: Path) -> None:
    model = load_causal(TINY, dtype=F32, seed=3)
    export(model, tiny_tokenizer(), tmp_path / "half", merge=True, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert torch.equal(back.lm_head.weight, model.lm_head.weight.to(torch.bfloat16))
    assert model.dtype == F32


def test_replaces_an_older_export(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "leftover").write_text("old")
    model = load_causal(TINY, dtype=F32, seed=3)
    assert export(model, tiny_tokenizer(), folder, merge=True) == folder
    assert not (folder / "leftover").exists()
    assert torch.equal(logits(load_causal(ModelSection(path=str(folder)), dtype=F32, seed=0)), logits(model))
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("make", [lambda: load_causal(TINY, dtype=F32, seed=3), tied], ids=["untied", "tied"])
def test_merged_weights_compute_the_same(make: Any, tmp_path: Path) -> None:
    model = with_adapter(make())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export(model, tiny_tokenizer(), tmp_path / "export", merge=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the live model was changed"
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    torch.testing.assert_close(logits(back), logits(model), atol=1e-4, rtol=0)
    with model.disable_adapter():
        assert (logits(back) - logits(model)).abs().max() > 0.1
    assert (tmp_path / "export" / "config.json").exists() and not (tmp_path / "export" / "adapter_config.json").exists()


def test_state_of_a_sharded_model_is_taken_from_outside(tmp_path: Path) -> None:
    model = with_adapter(load_causal(TINY, dtype=F32, seed=3))
    wanted = logits(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for p in model.parameters():
        p.data.zero_()
    export(model, tiny_tokenizer(), tmp_path / "export", merge=True, state=state)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "export")), wanted, atol=1e-4, rtol=0
    )


def test_adapter_folder_is_pefts(tmp_path: Path) -> None:
    from peft import PeftModel

    load_causal(TINY, dtype=F32, seed=3).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = ModelSection(path=str(tmp_path / "base"))
    model = with_adapter(load_causal(base, dtype=F32, seed=0))
    export(model, tiny_tokenizer(), tmp_path / "export", merge=False)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "export").iterdir()}
    back = PeftModel.from_pretrained(load_causal(base, dtype=F32, seed=0), str(tmp_path / "export"))
    assert torch.equal(logits(back), logits(model))
    ours = ModelSection(path=str(tmp_path / "export"))
    torch.testing.assert_close(logits(load_causal(ours, dtype=F32, seed=0)), logits(model), atol=1e-4, rtol=0)
    assert load_tokenizer(ours)("hi").input_ids == [104, 105]
    with pytest.raises(ConfigError, match=r"holds a LoRA adapter only; export with model\.lora\.merge_export=true"):
        load_scalar(ours, dtype=F32, seed=0)


def test_adapter_without_a_base_is_refused(tmp_path: Path) -> None:
    export(with_adapter(load_causal(TINY, dtype=F32, seed=3)), tiny_tokenizer(), tmp_path / "export", merge=False)
    with pytest.raises(ConfigError, match="this adapter names no base model"):
        load_causal(ModelSection(path=str(tmp_path / "export")), dtype=F32, seed=0)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_scalar_model_keeps_its_head(lora: bool, tmp_path: Path) -> None:
    model = load_scalar(TINY, dtype=F32, seed=3)
    model = with_adapter(model) if lora else model
    for name, p in model.named_parameters():
        if "score" in name and p.requires_grad:
            p.data += 1
    export(model, tiny_tokenizer(), tmp_path / "export", merge=True)
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    torch.testing.assert_close(logits(back), logits(model), atol=1e-4, rtol=0)
    with safe_open(tmp_path / "export" / "model.safetensors", "pt") as f:
        assert set(f.keys()) == set(load_scalar(TINY, dtype=F32, seed=3).state_dict())
    again = load_scalar(ModelSection(path=str(tmp_path / "export")), dtype=F32, seed=99)
    assert torch.equal(again.score.weight, back.score.weight)


def test_a_tied_weight_is_written_once(tmp_path: Path) -> None:
    export(tied(), tiny_tokenizer(), tmp_path / "export", merge=True, dtype=torch.bfloat16)
    with safe_open(tmp_path / "export" / "model.safetensors", "pt") as f:
        assert "model.embed_tokens.weight" in f.keys() and "lm_head.weight" not in f.keys()  # noqa: SIM118
