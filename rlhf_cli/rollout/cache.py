"""A key-value cache of fixed slots, one row each, and the attention that reads it.

Token t of a row lies at place t of its slot, whatever its neighbours do: no row is padded to another's length, a
finished row's slot serves the next row, and a row's numbers do not depend on who shares its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "rlhf_slots"


def span(tokens: int) -> int:
    """How many places a forward reads when the longest row has `tokens`.

    Multiples of 32 up to 256, then of 512: CPU attention kernels give bit-identical rows at all these sizes, not at
    others.
    """
    grain = 32 if tokens <= 256 else 512
    return -(-tokens // grain) * grain


class Board:
    """What the layers of one cache share: `slots` rows of `places` tokens, and where a forward writes and reads."""

    def __init__(self, slots: int, places: int) -> None:
        self.slots = slots
        self.places = span(places)
        self.span = 0
        self.flat: Tensor | None = None

    def aim(self, positions: Tensor, longest: int) -> None:
        """Write the next forward's token of slot i at positions[i] [slots]; read places below `span(longest)`."""
        self.span = span(longest)
        self.flat = torch.arange(self.slots, device=positions.device) * self.places + positions


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, places, heads, head_dim], so that a token is one contiguous write."""

    is_sliding = False

    def __init__(self, board: Board) -> None:
        super().__init__()
        self.board = board

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states [rows, heads, tokens, head_dim]. Zeros: a masked place must still be finite."""
        shape = (self.board.slots, self.board.places)
        self.keys = key_states.new_zeros(*shape, key_states.shape[1], key_states.shape[3])
        self.values = value_states.new_zeros(*shape, value_states.shape[1], value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store one token per slot; return every slot's first `span` places as [slots, heads, span, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.board.flat is not None
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            store.view(-1, *store.shape[2:]).index_copy_(0, self.board.flat, new[:, :, 0])
        return self.keys[:, : self.board.span].transpose(1, 2), self.values[:, : self.board.span].transpose(1, 2)

    def fill(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Copy a prompt's keys and values [heads, tokens, head_dim] into `slots`."""
        if not self.is_initialized:
            self.lazy_initialization(keys[None], values[None])
        self.keys[slots, : keys.shape[1]] = keys.transpose(0, 1)
        self.values[slots, : values.shape[1]] = values.transpose(0, 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.board.span, 0

    def get_seq_length(self) -> int:
        return self.board.span

    def get_max_length(self) -> int:
        return self.board.places


def slot_cache(board: Board) -> Cache:
    """An empty cache whose layers share `board`; layers appear when first filled or written."""
    return Cache(layer_class_to_replicate=partial(SlotLayer, board))


def fill(cache: Cache, slots: Tensor, prompt: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy a prompt, one (keys, values) per layer, into `slots` [n]."""
    while len(cache.layers) < len(prompt):
        cache.layers.append(cache.layer_class_to_replicate())
    for layer, (keys, values) in zip(cache.layers, prompt, strict=True):
        layer.fill(slots, keys, values)


def slot_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of one new token per row: query heads that share a key head become its queries; keys are never
    repeated.

    query [n, H, 1, D], key and value [n, H_kv, S, D], mask [n, 1, 1, S] -> [n, 1, H, D]. Prompts go the usual way.
    """
    n, heads, tokens, width = query.shape
    if tokens > 1 or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    grouped = query.reshape(n, key.shape[1], heads // key.shape[1], width)
    mask = attention_mask.to(query.dtype)
    out = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=kwargs.get("scaling"))
    return out.reshape(n, 1, heads, value.shape[-1]), None


AttentionInterface.register(ATTENTION, slot_attention)


@contextmanager
def attending(config: Any) -> Iterator[None]:
    """Let the model of `config` use `slot_attention` meanwhile; eager attention stays (it may cap its logits)."""
    usual = config._attn_implementation
    if usual != "eager":
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = usual
