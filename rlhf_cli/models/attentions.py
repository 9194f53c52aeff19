"""Other kernels for the attention of a pack: the same sums as `packing.packed_attention`, chosen by `model.kernels`.

Each is registered with transformers under a name; without a layout it is plain SDPA, as the packed one is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rlhf_cli.models.packing import Pack, packed_attention

FLEX, FLASH = "rlhf_packed_flex", "rlhf_packed_varlen"  # transformers looks for "flash" in a name
Varlen = Callable[..., Tensor]  # flash_attn.flash_attn_varlen_func, or what has its arguments


# -- FlexAttention: one sequence and a mask ----------------------------------------------------------------------------


def seen_from(layout: Pack) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's `mask_mod` of a pack: a token sees its group's prefix and its own row, up to itself.

    In the flat order a group's prefix stands before its suffixes, so "up to itself" is a comparison of flat positions.
    """
    group, row = (torch.zeros_like(layout.ids[0]) for _ in range(2))
    for where, real, owner in (
        (layout.prefix, layout.prefix_real, torch.arange(len(layout.prefix), device=group.device)),
        (layout.suffix, layout.suffix_real, layout.owner),
    ):
        group[where[real]] = owner[:, None].expand_as(where)[real]
    row.fill_(-1)
    number = torch.arange(len(layout.suffix), device=row.device)
    row[layout.suffix[layout.suffix_real]] = number[:, None].expand_as(layout.suffix)[layout.suffix_real]

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (group[q] == group[k]) & ((row[k] < 0) | (row[k] == row[q]))

    return seen


def flex_attention(
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
    """query [B, Hq, L, D], key and value [B, Hk, L, D]; returns [B, L, Hq, D]."""
    if layout is None:
        return packed_attention(module, query, key, value, attention_mask, scaling, dropout, None, **extra)
    if "flex" not in layout.masks:
        layout.masks["flex"] = _block_mask(layout)  # made once, used by every layer
    attend = _flex(query.device.type)
    shared = query.shape[1] != key.shape[1]
    out = attend(query, key, value, block_mask=layout.masks["flex"], scale=scaling, enable_gqa=shared)
    return out.transpose(1, 2), None


def _block_mask(layout: Pack) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    size = layout.ids.shape[1]
    return create_block_mask(seen_from(layout), None, None, size, size, device=layout.ids.device)


@cache
def _flex(device: str) -> Callable[..., Any]:
    """Compiled on a GPU, where the kernel is made by the compiler; elsewhere its plain form."""
    from torch.nn.attention.flex_attention import flex_attention as attend

    return torch.compile(attend, dynamic=True) if device == "cuda" else attend


# -- FlashAttention: many sequences ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequences:
    """A pack as sequences of queries, and the keys that each sees: prefixes with themselves, suffixes with prefix and self."""

    queries: Tensor  # [L] flat positions, those of the prefixes first
    keys: Tensor  # [Tk] flat positions
    query_ends: Tensor  # [n + 1] int32, 0 first
    key_ends: Tensor  # [n + 1] int32, 0 first
    most_queries: int
    most_keys: int


def sequences(layout: Pack) -> Sequences:
    """The sequences of a pack. A causal mask aligned to the last query and the last key is then the pack's."""
    prefix, suffix = layout.prefix[layout.prefix_real], layout.suffix[layout.suffix_real]
    whole = torch.cat([layout.prefix[layout.owner], layout.suffix], 1)
    real = torch.cat([layout.prefix_real[layout.owner], layout.suffix_real], 1)
    own = layout.prefix_real.sum(-1)
    counts = [torch.cat([own, x.sum(-1)]) for x in (layout.suffix_real, real)]
    there = counts[0] > 0  # a group without a common prefix
    ends = [F.pad(n[there].cumsum(0), (1, 0)).int() for n in counts]
    return Sequences(
        torch.cat([prefix, suffix]), torch.cat([prefix, whole[real]]), *ends, *(int(n.max()) for n in counts)
    )


def flash_attention(varlen: Varlen | None = None) -> Callable[..., tuple[Tensor, None]]:
    """The attention of a pack by `varlen`, which is flash_attn's own where none is given."""

    def attend(
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
        """query [B, Hq, L, D], key and value [B, Hk, L, D]; returns [B, L, Hq, D]."""
        if layout is None:
            return packed_attention(module, query, key, value, attention_mask, scaling, dropout, None, **extra)
        if "flash" not in layout.masks:
            layout.masks["flash"] = sequences(layout)  # type: ignore[assignment]
        s: Any = layout.masks["flash"]
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [L, H, D]
        out = (varlen or _flash())(
            q[s.queries],
            k[s.keys],
            v[s.keys],
            cu_seqlens_q=s.query_ends,
            cu_seqlens_k=s.key_ends,
            max_seqlen_q=s.most_queries,
            max_seqlen_k=s.most_keys,
            softmax_scale=scaling,
            causal=True,
        )
        return torch.zeros_like(out).index_copy(0, s.queries, out)[None], None  # every flat position is a query once

    return attend


@cache
def _flash() -> Varlen:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    return flash_attn_varlen_func


for _name, _attend in ((FLEX, flex_attention), (FLASH, flash_attention())):
    AttentionInterface.register(_name, _attend)
    AttentionMaskInterface.register(_name, sdpa_mask)
