"""What a rollout may cost: the model's context, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf_cli.errors import ConfigError

ROWS = {"cuda": 256}  # rows decoded at a time where memory allows; elsewhere 64
SHARE = {"cuda": 0.4}  # of the device's whole memory; elsewhere 0.2


def check_context(config: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Refuse rows that the model cannot hold, and models whose state is not one key and value per token."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"rollout.backend=builtin cannot decode {config.model_type} ({', '.join(sorted(other))} layers)"
        )
    if any(len(p) == 0 for p in prompts):
        raise ConfigError("a prompt has no tokens; give it text, or dataset.chat=true")
    limit = context(config)
    longest = max(map(len, prompts), default=0)
    if longest + max_tokens > limit:
        raise ConfigError(
            f"a prompt of {longest} tokens with rollout.max_tokens={max_tokens} exceeds the model's {limit}; "
            "lower rollout.max_tokens or dataset.max_prompt_tokens"
        )


def context(config: Any) -> int:
    """Most tokens of a row, prompt and response together."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or 1 << 62
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    return (
        min(limit, window) if window and (not kinds or "sliding_attention" in kinds) else limit
    )  # below: full attention


def rows_at_a_time(
    model: Any, device: torch.device, rows: int, longest: int, wave: int = 0, beside: Sequence[Any] = ()
) -> int:
    """Slots of the cache: `rows`, or when that is 0 the device's usual number, halved until rows of `longest` tokens
    fit, with the caches of the models `beside` it, and no more than the `wave` of rows that a step wants of all processes.

    Counts the memory that the machine has, not what is free just now: the same run must decode the same way every time.
    """
    if rows > 0:
        return rows
    rows, each = ROWS.get(device.type, 64), sum(bytes_per_row(m, longest) for m in (model, *beside))
    while rows > 1 and rows * each > SHARE.get(device.type, 0.2) * _memory(device):
        rows //= 2
    return min(rows, wave) if wave else rows


def bytes_per_row(model: Any, longest: int) -> int:
    """Cache of one row of `longest` tokens, and its logits on the way to a token."""
    c = model.config.get_text_config()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return 2 * c.num_hidden_layers * heads * width * model.dtype.itemsize * longest + 4 * 4 * c.vocab_size


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().total
