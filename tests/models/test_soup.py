"""The weight average of two models, and `rlhf merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_cli import cli
from rlhf_cli.config import LoraSection, ModelSection
from rlhf_cli.errors import ConfigError
from rlhf_cli.models import soup
from rlhf_cli.models.export import export
from rlhf_cli.models.loading import load_causal
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.tiny import tiny_causal, tiny_config, tiny_tokenizer


def mixed(weight: float, first: str = "tiny:1", other: str = "tiny:2") -> dict[str, torch.Tensor]:
    sections = [ModelSection(path=p) for p in (first, other)]
    return soup.averaged(*sections, weight, dtype=torch.float32, seed=0).state_dict()


def states() -> list[dict[str, torch.Tensor]]:
    return [tiny_causal(s, torch.float32).state_dict() for s in (1, 2)]


def folder(tmp_path: Path, name: str, model: Any, tokenizer: Any = None, **more: Any) -> str:
    export(model, tokenizer or tiny_tokenizer(), tmp_path / name, merge=False, **more)
    return str(tmp_path / name)


def llama(seed: int, **changes: Any) -> Any:
    from transformers import LlamaForCausalLM

    config = tiny_config()
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def test_every_weight_is_averaged() -> None:
    a, b = states()
    found = mixed(0.25)
    assert found.keys() == a.keys()
    assert all(torch.allclose(found[k], 0.75 * a[k] + 0.25 * b[k], atol=1e-6) for k in a)


def test_a_weight_of_nothing_and_an_average_of_equals_change_no_bit() -> None:
    a, b = states()
    for found, wanted in ((mixed(0.0), a), (mixed(1.0), b), (mixed(0.3, "tiny:1", "tiny:1"), a)):
        assert all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_swapping_the_models_swaps_the_weight() -> None:
    one, other = mixed(0.3), mixed(0.7, "tiny:2", "tiny:1")
    assert all(torch.allclose(one[k], other[k], atol=1e-6) for k in one)


def test_the_soup_of_two_linear_policies_is_their_geometric_mean() -> None:
    # logits (2, 0) and (0, 2) average to (1, 1): uniform, as sqrt(p q) normalised is.
    # KL(p || uniform) with p = softmax(2, 0): ln 2 - H(p) = 0.327813
    class Table(torch.nn.Module):
        def __init__(self, z: list[float]) -> None:
            super().__init__()
            self.z = torch.nn.Parameter(torch.tensor(z, dtype=torch.float64))

    a, b = Table([2.0, 0.0]), Table([0.0, 2.0])
    p, q = (m.z.detach().softmax(-1) for m in (a, b))
    soup.average(("a", "b"), a, b, 0.5)
    mean = a.z.detach().softmax(-1)
    geometric = (p * q).sqrt() / (p * q).sqrt().sum()
    assert torch.allclose(mean, geometric)
    assert float((p * (p / mean).log()).sum()) == pytest.approx(0.327813, abs=1e-6)


def test_a_tied_weight_is_averaged_once(tmp_path: Path) -> None:
    one, other = (llama(s, tie_word_embeddings=True) for s in (0, 1))
    paths = [folder(tmp_path, n, m) for n, m in (("a", one), ("b", other))]
    made = soup.averaged(*(ModelSection(path=p) for p in paths), 0.5, dtype=torch.float32, seed=0)
    wanted = (one.lm_head.weight + other.lm_head.weight) / 2
    assert torch.allclose(made.lm_head.weight, wanted, atol=1e-6)
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_adapters_are_merged_before(tmp_path: Path) -> None:
    base = folder(tmp_path, "base", llama(0))
    products, paths = [], []
    for seed in (1, 2):
        model = add_lora(load_causal(ModelSection(path=base), dtype=torch.float32, seed=0), LoraSection(r=2), seed)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        torch.nn.init.normal_(layer.lora_B["default"].weight, generator=torch.Generator().manual_seed(seed))
        product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        products.append(product.detach())
        model.peft_config["default"].base_model_name_or_path = base
        paths.append(folder(tmp_path, f"adapter{seed}", model))
        assert not (tmp_path / f"adapter{seed}" / "config.json").exists()
    made = soup.averaged(*(ModelSection(path=p) for p in paths), 0.5, dtype=torch.float32, seed=0)
    plain = load_causal(ModelSection(path=base), dtype=torch.float32, seed=0)
    moved = made.model.layers[0].self_attn.q_proj.weight - plain.model.layers[0].self_attn.q_proj.weight
    assert torch.allclose(moved, sum(products) / 2, atol=1e-5)


def refusal(tmp_path: Path, other: Any, tokenizer: Any = None) -> str:
    a, b = folder(tmp_path, "a", llama(0)), folder(tmp_path, "b", other, tokenizer)
    with pytest.raises(ConfigError) as e:
        soup.averaged(ModelSection(path=a), ModelSection(path=b), 0.5, dtype=torch.float32, seed=0)
    assert "\n" not in str(e.value)
    return str(e.value).replace(f"{tmp_path}/", "")


def test_models_that_differ_in_more_than_weights_are_refused(tmp_path: Path) -> None:
    grown = llama(1)
    grown.resize_token_embeddings(264)
    assert refusal(tmp_path, grown) == (
        "model.embed_tokens.weight is [259, 64] in a and [264, 64] in b; an average needs fine-tunes of one base model, embeddings not resized"
    )
    assert refusal(tmp_path, llama(1, num_hidden_layers=3)).endswith(
        "is in b only; only models with the same weights average"
    )
    assert refusal(tmp_path, llama(1, rms_norm_eps=1e-5)) == (
        "config.json: rms_norm_eps is 1e-06 in a and 1e-05 in b; they do not average"
    )


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<x>"])
    assert refusal(tmp_path, llama(1), tokenizer) == "the tokenizers differ: '<x>' is None in a and 259 in b"


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = llama(1)
    broken.lm_head.weight.data[0, 0] = float("nan")
    assert refusal(tmp_path, broken) == "lm_head.weight holds numbers that are not finite in a or b"


def test_merge_writes_a_folder_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "soup"
    assert cli.main(["merge", "tiny:1", "tiny:2", "--weight", "0.25", f"--output={out}"]) == 0
    assert capsys.readouterr().out.startswith(f"0.75 x tiny:1 + 0.25 x tiny:2 is in {out} (fp32)")
    a, b = states()
    found = load_file(out / "model.safetensors")
    assert all(torch.allclose(found[k], 0.75 * a[k] + 0.25 * b[k], atol=1e-6) for k in found)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert load_causal(ModelSection(path=str(out)), dtype=torch.float32, seed=0) is not None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["tiny:1"],
            "merge: takes two models, got 1; type rlhf merge A B --output DIR [--weight 0.5] [--dtype fp32|bf16]",
        ),
        (
            ["tiny:1", "tiny:2", "--weight", "2", "--output", "x"],
            "merge: --weight 2: B's share is a number from 0 to 1",
        ),
        (["tiny:1", "tiny:2", "--weigth=1"], "merge: --weigth=1: no such option; type rlhf merge"),
        (["tiny:1", "tiny:2", "--output"], "merge: --output needs a value; type rlhf merge"),
        (["tiny:1", "tiny:2"], "merge: where to? type rlhf merge"),
        (["tiny:1", "tiny:2", "--output=x", "--dtype=int8"], "merge: --dtype int8: choose one of fp32, bf16"),
        (["./none", "tiny:2", "--output=x"], "merge: no folder './none', and it is no Hub id (OWNER/NAME)"),
    ],
)
def test_merge_refuses_in_one_line(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["merge", *words]) == 2
    assert capsys.readouterr().err.startswith(f"rlhf: error: {text}")


def test_merge_never_writes_over_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept").write_text("x")
    assert cli.main(["merge", "tiny:1", "tiny:2", f"--output={tmp_path}"]) == 2
    assert "exists and is not empty; choose another folder, or remove it" in capsys.readouterr().err
