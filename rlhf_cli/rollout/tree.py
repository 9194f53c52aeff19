"""Where one new token per row attends: over a slot that holds the whole row, or over a prompt that rows share and then their own tokens.

The second reads a prompt's keys once for all its responses, whose queries meet them in one matrix product. Two attentions over
parts of the keys, with the logarithms a and b of their sums of exponentials, make that over all: the first weighs
exp(a) / (exp(a) + exp(b)).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_cli.rollout.cache import Board, SlotLayer, span

KeysValues = Sequence[tuple[Tensor, Tensor]]  # of a prompt, per layer: [heads, tokens, head_dim] each


class Memory(Protocol):
    """Keys and values of all rows, and attention over them."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Store k, v [slots, heads, head_dim], and attend with q [slots, heads, queries, head_dim], which is also the result's shape."""
        ...


class Slots:
    """Whole rows, one slot each: the cache that the model itself writes. `mask` [slots, 1, 1, span] is added to scores."""

    def __init__(self, board: Board, layers: list[SlotLayer], mask: Tensor) -> None:
        self.board, self.layers, self.mask = board, layers, mask

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        store = self.layers[layer]
        assert self.board.flat is not None
        for kept, new in ((store.keys, k), (store.values, v)):
            kept.view(-1, *kept.shape[2:]).index_copy_(0, self.board.flat, new)
        keys, values = (s[:, : self.board.span].transpose(1, 2) for s in (store.keys, store.values))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask, scale=scale)


class Tree:
    """Prompts that rows share, and the rows' own tokens; all rows begin together, `each` to a prompt, prompt by prompt.

    Args:
        prompts: keys and values of every prompt without its last token, which is the first of the rows' own; None where that is all.
        slots: rows of a forward, a multiple of `each`; those beyond the prompts' are idle.
        each: rows of a prompt.
        tokens: most tokens that a row adds.
    """

    def __init__(self, prompts: Sequence[KeysValues | None], slots: int, each: int, tokens: int) -> None:
        self.step, self.each = 0, each
        some = next(p for p in prompts if p is not None)
        like = some[0][0]
        lengths = torch.tensor([0 if p is None else p[0][0].shape[1] for p in prompts])
        groups, width = slots // each, span(int(lengths.max()))
        self.prompts, self.own = [], []
        for layer in range(len(some)):
            shared = like.new_zeros(2, groups, like.shape[0], width, like.shape[2])
            for g, p in ((g, p) for g, p in enumerate(prompts) if p is not None):
                for part, x in zip(shared, p[layer], strict=True):
                    part[g, :, : x.shape[1]] = x
            self.prompts.append(shared)
            self.own.append(like.new_zeros(2, slots, like.shape[0], span(tokens), like.shape[2]))
        lengths = F.pad(lengths, (0, groups - len(prompts)))
        self.mask = _additive(torch.arange(width) < lengths.clamp(min=1)[:, None], like)
        self.none = (lengths == 0).repeat_interleave(each)[:, None, None]  # of these the first part must not count

    def aim(self, step: int) -> None:
        """The next forward is that of every row's token `step`."""
        self.step = step
        self.seen = _additive(torch.arange(span(step + 1))[None] <= step, self.own[0])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        own, (n, heads, queries, width) = self.own[layer], q.shape
        for kept, new in zip(own, (k, v), strict=True):
            kept[:, :, self.step] = new
        folded = (
            q.view(-1, self.each, heads, queries, width).transpose(1, 2).reshape(-1, heads, self.each * queries, width)
        )
        first, a = _attention(folded, *self.prompts[layer], self.mask, scale)
        second, b = _attention(q, *own[..., : self.seen.shape[-1], :], self.seen, scale)
        back = (-1, heads, self.each, queries)
        first, a = (
            x.reshape(*back, *x.shape[3:]).transpose(1, 2).reshape(n, heads, queries, *x.shape[3:]) for x in (first, a)
        )
        share = torch.sigmoid(a.masked_fill(self.none, float("-inf")) - b)
        return torch.lerp(second, first, share[..., None].to(second.dtype))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention on a CPU [n, heads, queries, head_dim], and the logarithm of its sums of exponentials [n, heads, queries]."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)


def _additive(seen: Tensor, like: Tensor) -> Tensor:
    """[n, 1, 1, places] of the type of `like`: 0 where a place is seen."""
    return torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, float("-inf"))[:, None, None]
