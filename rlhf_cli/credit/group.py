"""Credit from the scores of a group: one number per row, the same for all its tokens.

A group of one row, or of equal scores, gets exactly 0: nothing distinguishes its rows.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_cli.credit.to_go import discounted_sum, whitened
from rlhf_cli.select import Groups, gives, grouped
from rlhf_cli.shaping.place import at_end
from rlhf_cli.types import Credit


@gives("advantage")
def group_norm(
    score: Tensor, mask: Tensor, group: Tensor, *, scale: Literal["std", "none"], ddof: int, eps: float
) -> Credit:
    """Score relative to its group: A = (R - mean) / (std + eps), or R - mean.

    std: Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    arXiv:2402.03300, section 4.1. none: Liu et al., "Understanding R1-Zero-Like Training: A Critical Perspective",
    arXiv:2503.20783 (Dr. GRPO).

    Args:
        score: reward of each row, [N]
        mask: trained tokens, [N, T] bool
        group: rows of one prompt share it, [N] int64
        scale: std (divide by the group's standard deviation) or none
        ddof: 1 for the sample standard deviation, 0 for the population's
        eps: added to the standard deviation, score units
    """
    return Credit(_spread(_normalised(score, group, scale, ddof, eps), mask))


@gives("advantage")
def identity(score: Tensor, mask: Tensor) -> Credit:
    """The score itself as the advantage of every token, [N, T]: for scores that are comparisons already.

    See Jia et al., "Writing-Zero: Bridge the Gap Between Non-verifiable Tasks and Verifiable Rewards", arXiv:2506.00103
    (BRPO): +1 or -1 against a member of the group, no mean, no standard deviation.

    Args:
        score: reward of each row, [N]
        mask: trained tokens, [N, T] bool
    """
    return Credit(_spread(score, mask))


@gives("advantage")
def leave_one_out(score: Tensor, mask: Tensor, group: Tensor) -> Credit:
    """Score minus the mean of the group's *other* rows: A_i = R_i - mean_{j != i} R_j = K / (K - 1) (R_i - mean).

    See Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
    LLMs", arXiv:2402.14740; Kool et al., "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019.

    Args:
        score: reward of each row, [N]
        mask: trained tokens, [N, T] bool
        group: rows of one prompt share it, [N] int64
    """
    g = grouped(score, group)
    size = g.size[g.index]
    return Credit(_spread(_centred(score, g) * size / (size - 1).clamp(min=1), mask))


@gives("advantage")
def group_norm_to_go(
    score: Tensor,
    reward: Tensor,
    mask: Tensor,
    group: Tensor,
    *,
    scale: Literal["std", "none"],
    ddof: int,
    eps: float,
) -> Credit:
    """`group_norm` of the score, plus the sum of the token rewards (a KL penalty, say) from each token on.

    A_t = norm(R) + sum_{s >= t} (r_s - [s = last] R): the baseline sees the score only, as in OpenRLHF; put the penalty
    into the score (`sequence_kl`) to have the baseline see both.

    Args:
        score: reward of each row, [N]
        reward: reward of each token, the score at the last one included, [N, T]
        mask: trained tokens, [N, T] bool
        group: rows of one prompt share it, [N] int64
        scale: std (divide by the group's standard deviation) or none
        ddof: 1 for the sample standard deviation, 0 for the population's
        eps: added to the standard deviation, score units
    """
    normalised = _normalised(score, group, scale, ddof, eps)
    to_go = discounted_sum(reward - at_end(score, mask), mask, gamma=1.0)
    return Credit(_spread(normalised, mask) + to_go)


@gives("advantage")
def group_norm_at_token(
    score: Tensor,
    reward: Tensor,
    mask: Tensor,
    group: Tensor,
    *,
    scale: Literal["std", "none"],
    ddof: int,
    eps: float,
) -> Credit:
    """`group_norm` of the score, plus each token's own reward (a KL penalty, say), not summed: A_t = norm(R) + r_t.

    The form of NeMo-RL's REINFORCE++. A token is not charged for what follows it, so with a KL penalty this is k2 in the
    loss and not the optimum of the penalised reward; see Hu, arXiv:2501.03262, for the summed form.

    Args:
        score: reward of each row, [N]
        reward: reward of each token, the score at the last one included, [N, T]
        mask: trained tokens, [N, T] bool
        group: rows of one prompt share it, [N] int64
        scale: std (divide by the group's standard deviation) or none
        ddof: 1 for the sample standard deviation, 0 for the population's
        eps: added to the standard deviation, score units
    """
    normalised = _normalised(score, group, scale, ddof, eps)
    return Credit(torch.where(mask, _spread(normalised, mask) + reward - at_end(score, mask), 0.0))


@gives("advantage")
def group_whitened(score: Tensor, mask: Tensor, group: Tensor) -> Credit:
    """Score minus the group's mean, then scaled to unit variance over the tokens of the batch (biased variance).

    The baseline form of Hu, "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage
    Normalization", arXiv:2501.03262.

    Args:
        score: reward of each row, [N]
        mask: trained tokens, [N, T] bool
        group: rows of one prompt share it, [N] int64
    """
    return Credit(whitened(_spread(_centred(score, grouped(score, group)), mask), mask, ddof=0))


@gives("advantage", "returns")
def greedy_baseline(reward: Tensor, baseline: Tensor, mask: Tensor) -> Credit:
    """Sum of the rewards from each token on, minus the score of the prompt's greedy response: A_t = sum_{s >= t} r_s - b.

    See Li et al., "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language
    Models", arXiv:2310.10505. Token rewards (a KL penalty) count in the sum and not in b. Returns are the sum.

    Args:
        reward: reward of each token, the score at the last one included, [N, T]
        baseline: score of the greedy response to the row's prompt, [N]
        mask: trained tokens, [N, T] bool
    """
    returns = discounted_sum(reward, mask, gamma=1.0)
    return Credit(torch.where(mask, returns - baseline[:, None], 0.0), returns)


@gives("advantage")
def batch_mean(score: Tensor, mask: Tensor) -> Credit:
    """Score minus the mean score of the batch; works with one response per prompt.

    REINFORCE with a baseline: Williams, Machine Learning 8, 1992. The mean includes the row itself: a bias of 1/N.

    Args:
        score: reward of each row, [N]
        mask: trained tokens, [N, T] bool
    """
    from_first = score - score[:1]  # so that equal scores give exactly 0
    return Credit(_spread(from_first - from_first.sum() / max(len(score), 1), mask))


@gives("advantage")
def batch_leave_one_out(score: Tensor, mask: Tensor) -> Credit:
    """Score minus the mean score of the batch's *other* rows, N / (N - 1) (R_i - mean): unbiased, one response per prompt is enough.

    REINFORCE with a baseline, which must not depend on the row's own reward. A batch of one row has none. See Williams, "Simple
    statistical gradient-following algorithms for connectionist reinforcement learning", Machine Learning 8, 1992.

    Args:
        score: reward of each row, [N]
        mask: trained tokens, [N, T] bool
    """
    if len(score) < 2:
        return Credit(_spread(score, mask))
    return Credit(batch_mean(score, mask).advantage * (len(score) / (len(score) - 1)))


def _normalised(score: Tensor, group: Tensor, scale: str, ddof: int, eps: float) -> Tensor:
    g = grouped(score, group)
    centred = _centred(score, g)
    if scale == "none":
        return centred
    square_sum = _sum(centred.square(), g)
    std = (square_sum / (g.size - ddof).clamp(min=1)).sqrt()
    # where, not division alone: a flat group must give 0 at eps = 0 too
    return torch.where(g.flat[g.index], 0.0, centred / (std + eps)[g.index])


def _centred(score: Tensor, g: Groups) -> Tensor:
    """Score minus the group's mean, [N]; exactly 0 in flat groups, where rounding would leave a remainder."""
    mean = _sum(score, g) / g.size
    return torch.where(g.flat[g.index], 0.0, score - mean[g.index])


def _sum(x: Tensor, g: Groups) -> Tensor:
    return x.new_zeros(len(g.size)).index_add(0, g.index, x)


def _spread(row: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, row[:, None], 0.0)
