"""Shapers in a row, and the reference responses that pass through the same ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_cli.inject import call, needs
from rlhf_cli.types import Experience

Shaper = Callable[..., Tensor]


def apply(
    shapers: Sequence[Shaper], exp: Experience, *, keep_references: bool, after: Callable[[Shaper], None]
) -> tuple[Experience, Tensor]:
    """The experience with its score shaped, and the sum of the token rewards [N, T].

    Where a later shaper compares with `ref_scores` (or `keep_references`), the reference responses take the same steps, so that
    both stay in the same units; so does the canned answer (`canned_score`). `after` gets each shaper after its call.
    """
    dense = torch.zeros(exp.ids.shape)
    for i, fn in enumerate(shapers):
        later = keep_references or any("ref_scores" in needs(f) for f in shapers[i + 1 :])
        canned = keep_references or any("canned_score" in needs(f) for f in shapers[i + 1 :])
        out = call(fn, exp)
        after(fn)
        if out.ndim == 2:
            dense = dense + out
            continue
        carried = {"ref_scores": carry(fn, exp)} if later and exp.ref_scores is not None else {}
        if canned and exp.canned_score is not None:
            same = replace(exp, score=exp.canned_score)
            carried["canned_score"] = call(getattr(fn, "frozen", fn), same).to(exp.canned_score.dtype)
        exp = replace(exp, score=out, **carried)
    return exp, dense


def carry(fn: Shaper, exp: Experience) -> Tensor:
    """`ref_scores` [N, R] after the shaper, each reference response as a row of its own; missing ones stay NaN.

    Running statistics are read, not moved: `fn.frozen`, where there is one, is the shaper without its memory of new rows.
    """
    first, index = firsts(exp.group)
    flat = as_rows(exp, first)
    present = (~flat.score.isnan()).nonzero().flatten()
    shaped = torch.full_like(flat.score, float("nan"))
    shaped[present] = call(getattr(fn, "frozen", fn), flat.rows(present)).to(shaped.dtype)
    return shaped.view(len(first), -1)[index]


def as_rows(exp: Experience, first: Tensor) -> Experience:
    """The reference responses of the rows `first` as an experience of len(first) x R rows: score, mask, group, ref_scores."""
    scores, length = exp.ref_scores[first], exp.ref_length[first]
    r = scores.shape[1]
    width = max(int(length.max()), 1)
    mask = torch.arange(width) < length.reshape(-1, 1)
    return Experience(
        ids=torch.zeros(mask.shape, dtype=torch.int64),
        attention=mask,
        mask=mask,
        group=torch.arange(len(first)).repeat_interleave(r),
        score=scores.reshape(-1),
        ref_scores=scores.repeat_interleave(r, 0),
        ref_length=length.repeat_interleave(r, 0),
    )


def firsts(group: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each group [P], and each row's group number [N]."""
    label, index = torch.unique(group, return_inverse=True)
    at = torch.arange(len(group))
    first = torch.full((len(label),), len(group)).scatter_reduce(0, index, at, "amin")
    return first, index
