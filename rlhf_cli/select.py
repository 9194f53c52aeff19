"""Which rows of a step go on, and which pairs they form. What a rule drops, it counts.

Groups are ragged: rows may have been dropped before. A tie or a group of one score makes no pair and is never repaired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def drop_zero_variance(score: Tensor, group: Tensor, components: Mapping[str, Tensor], *, metric: str) -> Selection:
    """Drop the groups whose scores, or whose values of the task's metric, are all equal.

    The filter of dynamic sampling, without the resampling: Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning
    System at Scale", arXiv:2503.14476, section 3.2.

    Args:
        score: score of each row before shaping, [N]
        group: rows of one prompt share it, [N] int64
        components: the rewards by name, [N] each
        metric: the reward, or REWARD/PART, that is judged, e.g. an accuracy beside a format; empty: the score
    """
    g = grouped(components[metric] if metric else score, group)
    keep = (~g.flat)[g.index].nonzero().squeeze(-1)
    kept_groups = len((~g.flat).nonzero())
    return Selection(keep, None, _dropped(len(score) - len(keep), len(g.size) - kept_groups))


def drop_skewed(score: Tensor, group: Tensor, *, most: float) -> Selection:
    """Drop the groups with |sum of scores| / K > most: their pivot is an outlier, everybody beats it or nobody does.

    The filter of BRPO: Jia et al., "Writing-Zero: Bridge the Gap Between Non-verifiable Tasks and Verifiable Rewards",
    arXiv:2506.00103. Meant for scores of +1, 0 and -1.

    Args:
        score: comparison of each row with its group's pivot, [N]
        group: rows of one prompt share it, [N] int64
        most: largest |mean score| kept
    """
    g = grouped(score, group)
    total = score.new_zeros(len(g.size)).index_add(0, g.index, score)
    stays = total.abs() <= most * g.size + 1e-6  # sums of whole numbers: an exact boundary stays
    keep = stays[g.index].nonzero().squeeze(-1)
    return Selection(keep, None, _dropped(len(score) - len(keep), len((~stays).nonzero())))


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
def drop_zero_variance_mask_truncated(
    score: Tensor, group: Tensor, mask: Tensor, truncated: Tensor, components: Mapping[str, Tensor], *, metric: str
) -> Narrowed:
    """`drop_zero_variance`, and `mask_truncated` on what stays.

    Args:
        score: score of each row before shaping, [N]
        group: rows of one prompt share it, [N] int64
        mask: trained tokens, [N, T] bool
        truncated: reached the token limit before EOS or a stop, [N] bool
        components: the rewards by name, [N] each
        metric: the reward, or REWARD/PART, that is judged; empty: the score
    """
    dropped, masked = drop_zero_variance(score, group, components, metric=metric), mask_truncated(mask, truncated)
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
