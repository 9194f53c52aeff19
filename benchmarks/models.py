"""Model folders that a benchmark can name: the packaged SmolLM2-135M, random models of a given size, or any folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Llama layouts: width, layers, query heads, key heads, feed-forward width.
RANDOM: dict[str, tuple[int, int, int, int, int]] = {
    "random-tiny": (64, 2, 4, 2, 128),
    "random-0.5b": (1024, 24, 16, 4, 4096),
    "random-1b": (2048, 16, 32, 8, 8192),
}


def folder_of(model: str, work: Path, dtype: str) -> Path:
    """Where the weights lie; a random model is written into `work` in the given dtype (fp32, bf16)."""
    if model == "smollm2":
        from rlhf_cli.models.smollm2 import smollm2

        return smollm2()
    if model not in RANDOM:
        return Path(model)
    folder = work / f"{model}-{dtype}"
    if not (folder / "config.json").exists():
        build(RANDOM[model], folder, dtype)
    return folder


def build(layout: tuple[int, int, int, int, int], folder: Path, dtype: str) -> None:
    """A Llama of random weights (normal, 0.02; seed 0) with SmolLM2's tokenizer and a vocabulary of its size."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from rlhf_cli.models.smollm2 import smollm2

    source = smollm2()
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    hidden, layers, heads, key_heads, ffn = layout
    original = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        intermediate_size=ffn, vocab_size=original["vocab_size"], max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
