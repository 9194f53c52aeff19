"""Which rows of a step go on, and which pairs they form. What a rule drops, it counts.

Groups are ragged: rows may have been dropped before. A tie or a group of one score makes no pair and is never repaired.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_cli.types import Narrowed, Selection


def gives(*columns: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare the columns that a function produces, as literals, so that a plan can read them from source."""

    def mark(fn: Callable[..., Any]) -> Callable[..., Any]:
        fn.gives = columns  # type: ignore[attr-defined]
        return fn

    return mark


class Groups(NamedTuple):
    """Statistics of a score over groups, by dense group number p = index[i]."""

    index: Tensor  # [N] int64
    size: Tensor  # [P] int64
    low: Tensor  # [P]
    high: Tensor  # [P]

    @property
    def flat(self) -> Tensor:
        """Groups whose scores are all equal (groups of one too), [P] bool."""
        return self.low == self.high


def grouped(score: Tensor, group: Tensor) -> Groups:
    """Number the groups densely, in ascending order of their label, and take each one's size and extremes."""
    label, index, size = torch.unique(group, return_inverse=True, return_counts=True)
    empty = score.new_zeros(len(label))
    low = empty.scatter_reduce(0, index, score, "amin", include_self=False)
    high = empty.scatter_reduce(0, index, score, "amax", include_self=False)
    return Groups(index, size, low, high)


def keep_all() -> Selection:
    """Keep every row, and the pairs that the source brought."""
    return Selection()


def drop_zero_variance(score: Tensor, group: Tensor) -> Selection:
    """Drop the groups whose scores are all equal: they carry no group advantage.

    The filter of dynamic sampling, without the resampling: Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning
    System at Scale", arXiv:2503.14476, section 3.2.

    Args:
        score: task score of each row, [N]
        group: rows of one prompt share it, [N] int64
    """
    g = grouped(score, group)
    keep = (~g.flat)[g.index].nonzero().squeeze(-1)
    kept_groups = len((~g.flat).nonzero())
    return Selection(keep, None, _dropped(len(score) - len(keep), len(g.size) - kept_groups))


@gives("mask")
def mask_truncated(mask: Tensor, truncated: Tensor) -> Narrowed:
    """Keep every row in its group's statistics, and take the truncated ones out of the loss: overlong filtering.

    See Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv:2503.14476, section 3.4.

    Args:
        mask: trained tokens, [N, T] bool
        truncated: reached the token limit before EOS or a stop, [N] bool
    """
    return Narrowed(mask & ~truncated[:, None], stats={"masked_rows": float(truncated.sum())})


@gives("mask")
def drop_zero_variance_mask_truncated(score: Tensor, group: Tensor, mask: Tensor, truncated: Tensor) -> Narrowed:
    """`drop_zero_variance`, and `mask_truncated` on what stays.

    Args:
        score: task score of each row, [N]
        group: rows of one prompt share it, [N] int64
        mask: trained tokens, [N, T] bool
        truncated: reached the token limit before EOS or a stop, [N] bool
    """
    dropped, masked = drop_zero_variance(score, group), mask_truncated(mask, truncated)
    return Narrowed(masked.mask, dropped.keep, stats={**dropped.stats, **masked.stats})


def best_of_n(score: Tensor, group: Tensor) -> Selection:
    """Keep the best row of each group, the first one of equals.

    See Dong et al., "RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment", arXiv:2304.06767.

    Args:
        score: score of each row, [N]
        group: rows of one prompt share it, [N] int64
    """
    g = grouped(score, group)
    keep = _first(score == g.high[g.index], g).sort().values
    return Selection(keep, None, _dropped(len(score) - len(keep), 0))


@gives("pairs")
def best_vs_worst(score: Tensor, group: Tensor) -> Selection:
    """One pair per group, (best, worst), the first of equals; keeps these rows. Groups of equal scores are dropped.

    See Pace et al., "West-of-N: Synthetic Preference Generation for Improved Reward Modeling", arXiv:2401.12086.

    Args:
        score: score of each row, [N]
        group: rows of one prompt share it, [N] int64
    """
    g = grouped(score, group)
    best = _first(score == g.high[g.index], g)
    worst = _first(score == g.low[g.index], g)
    return _paired(torch.stack([best, worst], -1)[~g.flat], g)


@gives("pairs")
def all_pairs(score: Tensor, group: Tensor) -> Selection:
    """Every pair of rows of a group with different scores, (higher, lower); keeps rows in a pair.

    See Ouyang et al., "Training language models to follow instructions with human feedback", arXiv:2203.02155, section
    3.5.

    Args:
        score: score of each row, [N]
        group: rows of one prompt share it, [N] int64
    """
    beats = (group[:, None] == group) & (score[:, None] > score)  # [N, N]
    return _paired(beats.nonzero(), grouped(score, group))


@gives("pairs")
def group_pairs(score: Tensor, group: Tensor) -> Selection:
    """Every two rows of a group, each couple once, the higher score first (of equals the earlier row); keeps every row.

    See Wu et al., "Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM Alignment", arXiv:2310.00212.

    Args:
        score: score of each row, [N]
        group: rows of one prompt share it, [N] int64
    """
    place = torch.arange(len(group), device=group.device)
    before = (score[:, None] > score) | ((score[:, None] == score) & (place[:, None] < place))
    return Selection(None, ((group[:, None] == group) & before).nonzero())


def _first(candidate: Tensor, g: Groups) -> Tensor:
    """The first candidate row of each group, [P] int64."""
    rows = len(candidate)
    place = torch.arange(rows, device=candidate.device).masked_fill(~candidate, rows)
    return place.new_zeros(len(g.size)).scatter_reduce(0, g.index, place, "amin", include_self=False)


def _paired(edges: Tensor, g: Groups) -> Selection:
    """The rows that have an edge, in order, and the edges over them."""
    keep = edges.flatten().unique()
    dropped_groups = len(g.flat.nonzero())
    return Selection(
        keep, torch.searchsorted(keep, edges.contiguous()), _dropped(len(g.index) - len(keep), dropped_groups)
    )


def _dropped(rows: int, groups: int) -> dict[str, float]:
    return {"dropped_rows": float(rows), "dropped_groups": float(groups)}
