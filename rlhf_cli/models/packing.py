"""How rows become one model call: every prompt once per group, no padding, and the only next-token shift in the project.

Rows of a group share their longest common prefix. A pack is one flat sequence: for each group its prefix, then every row's own
suffix. A suffix token sees the prefix and its own row up to itself, which is what the row alone would have seen, so log-probs are
those of the flat rows (up to rounding). Linear layers run on real tokens only; attention runs group by group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_cli.models.saving import cheap

ATTENTION = "rlhf_packed"
SMALL = 1 << 16  # entries of a score matrix up to which explicit attention is faster


@dataclass(frozen=True)
class Pack:
    """N rows as one flat sequence of L tokens: the prefixes of G groups and the suffixes of R rows that have one."""

    ids: Tensor  # [1, L]
    positions: Tensor  # [1, L]
    place: Tensor  # [N, T] flat position of every row's token; 0 on padding
    prefix: Tensor  # [G, P] flat positions, padded with 0
    prefix_real: Tensor  # [G, P] bool
    suffix: Tensor  # [R, S] flat positions, padded with 0
    suffix_real: Tensor  # [R, S] bool
    owner: Tensor  # [R] the group of every suffix
    order: Tensor  # [L] where the flat sequence lies in the padded prefixes [G * P] followed by the padded suffixes [R * S]
    masks: dict[str, Tensor] = field(default_factory=dict)  # made once, used by every layer


def pack(ids: Tensor, attention: Tensor, group: Tensor) -> Pack:
    """Lay out rows `ids` [N, T] with `attention` [N, T]; rows with equal `group` [N] share their common prefix."""
    names, which = torch.unique(group, return_inverse=True)
    lengths = attention.sum(-1)
    at = torch.arange(ids.shape[1])
    members = [(which == g).nonzero().flatten() for g in range(len(names))]
    shared = torch.tensor([_common_prefix(ids[rows], int(lengths[rows].min())) for rows in members])  # [G]
    own = lengths - shared[which]  # [N]
    first = torch.stack([rows[0] for rows in members])
    prefix_real = at < shared[:, None]  # [G, T]
    suffix_real = attention & (at >= shared[which, None])  # [N, T]
    # Flat order: group by group, its prefix and then its rows' suffixes.
    size = shared + torch.zeros_like(shared).index_add(0, which, own)
    start = size.cumsum(0) - size  # [G]
    begin = torch.empty_like(own)
    for g, rows in enumerate(members):
        begin[rows] = start[g] + shared[g] + own[rows].cumsum(0) - own[rows]
    prefix_at = start[:, None] + at
    suffix_at = begin[:, None] + at - shared[which, None]
    place = torch.where(at < shared[which, None], prefix_at[which], suffix_at).where(attention, torch.zeros(()).long())
    order = torch.cat([prefix_at[prefix_real], suffix_at[suffix_real]]).argsort()
    flat_ids = torch.cat([ids[first][prefix_real], ids[suffix_real]])[order]
    positions = torch.cat([at.expand_as(prefix_real)[prefix_real], at.expand_as(suffix_real)[suffix_real]])[order]
    rows = (own > 0).nonzero().flatten()
    p, s = int(shared.max()), int(own.max())
    step = torch.arange(s)
    real = step < own[rows, None]
    padded = torch.cat([prefix_real[:, :p].flatten(), real.flatten()]).nonzero().flatten()
    return Pack(
        ids=flat_ids[None],
        positions=positions[None],
        place=place,
        prefix=prefix_at[:, :p].where(prefix_real[:, :p], torch.zeros(()).long()),
        prefix_real=prefix_real[:, :p],
        suffix=(begin[rows, None] + step).where(real, torch.zeros(()).long()),
        suffix_real=real,
        owner=which[rows],
        order=padded[order],
    )


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
    """Attention of a pack, or plain SDPA when no `layout` is given.

    query [B, Hq, L, D], key and value [B, Hk, L, D]; returns [B, L, Hq, D].
    """
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **extra
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    flat = [x[0].transpose(0, 1) for x in (query, key, value)]  # [L, H, D]
    (g, p), (r, s) = layout.prefix.shape, layout.suffix.shape
    there, real = (
        torch.cat([a.flatten(), b.flatten()])
        for a, b in ((layout.prefix, layout.suffix), (layout.prefix_real, layout.suffix_real))
    )
    spread = [Moved.apply(x, there, real, layout.order, None).split([g * p, r * s]) for x in flat]
    heads = [x.view(g, p, *x.shape[1:]).transpose(1, 2) for x, _ in spread]  # [G, H, P, D]
    parts = []
    if p:
        parts.append(_attend(*heads, layout, "prefix", scale))
    if r:
        q, k, v = (x.view(r, s, *x.shape[1:]).transpose(1, 2) for _, x in spread)  # [R, H, S, D]
        k, v = (
            torch.cat([shared.index_select(0, layout.owner), mine], 2)
            for shared, mine in ((heads[1], k), (heads[2], v))
        )
        parts.append(_attend(q, k, v, layout, "suffix", scale))
    out = Moved.apply(_rows(parts), layout.order, None, there, real)[None]  # [1, L, H, D]
    kept = [x.detach() for x in parts]  # which attention saves as well
    return cheap(out, lambda: _rows(kept).index_select(0, layout.order)[None]), None


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """[n, S, H, D] each, as rows [sum of n * S, H, D]."""
    return torch.cat([x.flatten(0, 1) for x in parts])


class Moved(torch.autograd.Function):
    """x[take], zero where not `real`, of rows that `take` names once each; the gradient is g[back], zero where not `back_real`.

    Autograd's own gradient of x[take] adds row by row, since rows might be named twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, take: Tensor, real: Tensor | None, back: Tensor, back_real: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(back, back_real)
        return _taken(x, take, real)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return _taken(grad, *ctx.saved_tensors), None, None, None, None


def _taken(x: Tensor, index: Tensor, real: Tensor | None) -> Tensor:
    found = x.index_select(0, index)
    return found if real is None else found.mul_(real.view(-1, *[1] * (x.ndim - 1)))


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: Pack, part: str, scale: float) -> Tensor:
    """q [n, Hq, S, D], k and v [n, Hk, M, D] -> [n, S, Hq, D]. Query heads that share a key head become its queries."""
    n, heads, s, d = q.shape
    groups = heads // k.shape[1]
    folded = q.reshape(n, k.shape[1], groups * s, d)
    mask = _mask(layout, part, groups, torch.float32 if q.dtype == torch.bfloat16 else q.dtype)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and s * k.shape[2] <= SMALL:
        # The CPU kernel's bf16 backward pass is slow on short rows (17.8 ms against 9.7 for this with 12 rows of 64 after 40 tokens),
        # and this on long ones (82 ms against 50 with 8 rows of 128 after 300); scores are in fp32 in both.
        out = Explicit.apply(folded, k, v, mask, scale)
    else:
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask.to(q.dtype), scale=scale)
    return out.reshape(n, heads, s, d).transpose(1, 2)


class Explicit(torch.autograd.Function):
    """softmax(scale q k' + mask) v of low-precision q [n, H, S, D], k and v [n, H, M, D], with fp32 scores. Saves probabilities as rounded for v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        scores = torch.matmul(q.float().mul_(scale), k.float().transpose(-1, -2)).add_(mask)
        p = scores.softmax(-1).to(v.dtype)
        out = torch.matmul(p, v)
        ctx.save_for_backward(q, k, v, p, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        q, k, v, p, out = ctx.saved_tensors
        along = (grad.float() * out.float()).sum(-1, keepdim=True)
        s = torch.matmul(grad, v.transpose(-1, -2)).float().sub_(along).mul_(p).mul_(ctx.scale).to(q.dtype)
        return (
            torch.matmul(s, k),
            torch.matmul(s.transpose(-1, -2), q),
            torch.matmul(p.transpose(-1, -2), grad),
            None,
            None,
        )


def _mask(layout: Pack, part: str, groups: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [n or 1, 1, groups * S, M]: a prefix is causal; a suffix sees its group's real prefix, and itself causally."""
    key = f"{part} {groups} {dtype}"
    if key not in layout.masks:
        device = layout.ids.device
        if part == "prefix":
            p = layout.prefix.shape[1]
            seen = torch.ones(1, p, p, dtype=torch.bool, device=device).tril()
        else:
            r, s = layout.suffix.shape
            causal = torch.ones(s, s, dtype=torch.bool, device=device).tril().expand(r, s, s)
            prefix = layout.prefix_real[layout.owner][:, None].expand(r, s, layout.prefix.shape[1])
            seen = torch.cat([prefix, causal], 2)
        bias = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
        layout.masks[key] = bias.repeat(1, groups, 1)[:, None]
    return layout.masks[key]


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
    return replace(
        layout, masks={}, **{f.name: getattr(layout, f.name).to(device) for f in fields(layout) if f.name != "masks"}
    )


def shifted(place: Tensor) -> Tensor:
    """[N, T] flat position of the hidden state that predicts each token: the one next-token shift. Column 0 has no predictor."""
    return F.pad(place[:, :-1], (1, 0))
