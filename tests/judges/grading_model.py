"""A tiny policy that writes `Score: N`, N from 0 to 5, so that it can be its own judge. Trained here, in seconds, to its format alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_cli.data.text import render
from rlhf_cli.models.tiny import tiny_config, tiny_tokenizer

STEPS, ROWS = 120, 8
END, PAD = 257, 258


def save(folder: Path) -> Path:
    """Train it, and write it where model.path finds it. Its heads have a size that vLLM's attention takes."""
    model = _model()
    g = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        ids, labels = _batch(g)
        logits = model(input_ids=ids).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _model() -> Any:
    from transformers import LlamaForCausalLM

    config = tiny_config()
    config.hidden_size, config.head_dim, config.tie_word_embeddings = 128, 32, True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for p in model.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
    model.generation_config.eos_token_id = [END]
    return model


def _batch(g: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of random letters and their answers, [ROWS, T] each; only answers are learnt."""
    rows = []
    for _ in range(ROWS):
        text = "".join(chr(g.randrange(32, 127)) for _ in range(g.randrange(2, 40)))
        prompt = render([{"role": "user", "content": text}], tiny_tokenizer(), True)
        rows.append((prompt, [*f"Score: {g.randrange(6)}".encode(), END]))
    length = max(len(p) + len(a) for p, a in rows)
    ids, labels = torch.full((ROWS, length), PAD), torch.full((ROWS, length), -100)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels
