"""How rows become one model call: every prompt once per group, no padding, and the only next-token shift in the project.

Rows of a group share their longest common prefix. A pack is one flat sequence: for each group its prefix, then every row's own
suffix. A suffix token sees the prefix and its own row up to itself, which is what the row alone would have seen, so log-probs are
those of the flat rows (up to rounding). Linear layers run on real tokens only; attention runs group by group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION = "rlhf_packed"


@dataclass(frozen=True)
class Segment:
    """One group inside a pack: a prefix of `prefix` tokens at `start`, then K suffixes padded to S in `suffix`."""

    start: int
    prefix: int
    suffix: Tensor  # [K, S] flat positions, padded with the group's first
    real: Tensor  # [K, S] bool
    visible: Tensor  # [S, prefix + S] bool: what a suffix token may see


@dataclass(frozen=True)
class Pack:
    """N rows as one flat sequence of L tokens."""

    ids: Tensor  # [1, L]
    positions: Tensor  # [1, L]
    place: Tensor  # [N, T] flat position of every row's token; 0 on padding
    segments: tuple[Segment, ...]


def pack(ids: Tensor, attention: Tensor, group: Tensor) -> Pack:
    """Lay out rows `ids` [N, T] with `attention` [N, T]; rows with equal `group` [N] share their common prefix."""
    flat: list[Tensor] = []
    positions: list[Tensor] = []
    place = torch.zeros_like(ids)
    segments: list[Segment] = []
    cursor = 0
    lengths = attention.sum(-1)
    for g in torch.unique(group).tolist():
        rows = (group == g).nonzero().flatten()
        n = lengths[rows]
        prefix = _common_prefix(ids[rows], int(n.min()))
        own = n - prefix  # [K]
        s = int(own.max())
        starts = cursor + prefix + own.cumsum(0) - own  # [K]
        step = torch.arange(s)
        real = step < own[:, None]  # [K, S]
        suffix = torch.where(real, starts[:, None] + step, cursor)
        visible = torch.cat([torch.ones(s, prefix, dtype=torch.bool), torch.ones(s, s, dtype=torch.bool).tril()], 1)
        segments.append(Segment(cursor, prefix, suffix, real, visible))
        place[rows, :prefix] = cursor + torch.arange(prefix)
        place[rows[:, None].expand_as(real)[real], (prefix + step).expand_as(real)[real]] = suffix[real]
        flat += [ids[rows[0], :prefix], ids[rows, prefix : prefix + s][real]]
        positions += [torch.arange(prefix), (prefix + step).expand_as(real)[real]]
        cursor += prefix + int(own.sum())
    return Pack(torch.cat(flat)[None], torch.cat(positions)[None], place, tuple(segments))


def _common_prefix(ids: Tensor, shortest: int) -> int:
    """Longest common prefix of rows [K, T], at most `shortest` tokens."""
    same = (ids[:, :shortest] == ids[:1, :shortest]).all(0)
    return int(same.int().cumprod(0).sum())


def packed_size(ids: Tensor, attention: Tensor) -> int:
    """Tokens that the rows of one group cost in a pack."""
    n = attention.sum(-1)
    prefix = _common_prefix(ids, int(n.min()))
    return prefix + int((n - prefix).sum())


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Pack | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Attention of a pack, or plain SDPA when no `layout` is given. query [B, Hq, L, D], key and value [B, Hk, L, D]; returns [B, L, Hq, D]."""
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **extra)
    repeat = query.shape[1] // key.shape[1]
    key, value = (x[0].repeat_interleave(repeat, 0) if repeat > 1 else x[0] for x in (key, value))  # [H, L, D]
    query = query[0]
    parts: list[Tensor] = []
    for seg in layout.segments:
        a, b = seg.start, seg.start + seg.prefix
        if seg.prefix:
            q, k, v = (x[None, :, a:b] for x in (query, key, value))
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)[0].transpose(0, 1))
        if seg.suffix.shape[1]:
            parts.append(_suffix_attention(seg, query, key, value, scaling))
    return torch.cat(parts)[None], None  # [1, L, H, D]


def _suffix_attention(seg: Segment, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Attention of one group's suffixes over prefix and own tokens; [own tokens, H, D]."""
    k_rows = len(seg.suffix)
    prefix = slice(seg.start, seg.start + seg.prefix)

    def rows(x: Tensor) -> Tensor:  # [H, L, D] -> [K, H, S, D]
        return x[:, seg.suffix].transpose(0, 1)

    def full(x: Tensor) -> Tensor:  # [K, H, prefix + S, D]
        shared = x[None, :, prefix].expand(k_rows, -1, -1, -1)
        return torch.cat([shared, rows(x)], 2)

    out = F.scaled_dot_product_attention(rows(query), full(key), full(value), attn_mask=seg.visible, scale=scaling)
    return out.transpose(1, 2)[seg.real]


def register() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers. Without a layout it is plain SDPA, masks included."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def to_device(layout: Pack, device: torch.device) -> Pack:
    """The pack with its tensors on `device`."""
    if device.type == "cpu":
        return layout
    segments = tuple(
        Segment(s.start, s.prefix, s.suffix.to(device), s.real.to(device), s.visible.to(device)) for s in layout.segments
    )
    return Pack(layout.ids.to(device), layout.positions.to(device), layout.place.to(device), segments)


def shifted(place: Tensor) -> Tensor:
    """[N, T] flat position of the hidden state that predicts each token: the one next-token shift. Column 0 has no predictor."""
    return F.pad(place[:, :-1], (1, 0))


Outputs = Mapping[str, Tensor]
