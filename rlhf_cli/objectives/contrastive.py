"""Objectives that contrast the responses to one prompt by their scores, without critic or advantage.

u = sum over mask tokens of (logp - ref_logp). Scores are constants, after shaping. All of these couple rows.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlhf_cli.inject import per_row
from rlhf_cli.kl import bounded_exp
from rlhf_cli.objectives.preference import gap


def p3o(
    logp: Tensor,
    old_logp: Tensor,
    score: Tensor,
    mask: Tensor,
    pairs: Tensor,
    *,
    level: Literal["seq_sum", "seq_mean"],
    eps_low: float,
    eps_high: float,
) -> Tensor:
    """Pairwise policy gradient, each response clipped by its own ratio: -(1/2) sum_i min(r_i D_i, clip(r_i) D_i), [M].

    D_1 = score_1 - score_2 = -D_2, and r_i = exp(sum_t (logp - old_logp)). Two rows a group make it RLOO with one ratio per
    response. See Wu et al., "Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM Alignment",
    arXiv:2310.00212 (P3O-V1).

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        old_logp: the same at the start of the step, [N, T] nats
        score: reward of each row, its KL penalty included, [N]
        mask: trained tokens, [N, T] bool
        pairs: two rows of a group, in either order, [M, 2] int64
        level: seq_sum (ratio of the responses) or seq_mean (its length-th root, which leaves the clip range later)
        eps_low: how far a ratio may fall below 1
        eps_high: how far a ratio may rise above 1
    """
    ratio = bounded_exp(_per_row(logp - old_logp, mask, level))  # [N]
    d = gap(score, pairs)
    d = torch.stack([d, -d], -1)  # [M, 2]
    near = ratio.clamp(1 - eps_low, 1 + eps_high)
    return -torch.minimum(ratio[pairs] * d, near[pairs] * d).sum(-1) / 2


def p3o_joint(
    logp: Tensor,
    old_logp: Tensor,
    score: Tensor,
    mask: Tensor,
    pairs: Tensor,
    *,
    level: Literal["seq_sum", "seq_mean"],
    eps: float,
) -> Tensor:
    """Pairwise policy gradient, the pair clipped together: -(1/2) min(w D l, w D clip(l, l_old - eps, l_old + eps)), [M].

    l = log pi(y_1) - log pi(y_2), D = score_1 - score_2, and w = r_1 r_2 is constant: the importance of the pair. See Wu et al.,
    "Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM Alignment", arXiv:2310.00212 (P3O-V2).

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        old_logp: the same at the start of the step, [N, T] nats
        score: reward of each row, its KL penalty included, [N]
        mask: trained tokens, [N, T] bool
        pairs: two rows of a group, in either order, [M, 2] int64
        level: seq_sum (log-probs of the responses) or seq_mean (per token)
        eps: how far the log-ratio of the pair may move, nats
    """
    now, old = _per_row(logp, mask, level), _per_row(old_logp, mask, level)  # [N]
    weight = bounded_exp((now - old)[pairs].sum(-1)).detach() * gap(score, pairs)  # [M]
    contrast, before = gap(now, pairs), gap(old, pairs)
    near = before + (contrast - before).clamp(-eps, eps)
    return -torch.minimum(weight * contrast, weight * near) / 2


@per_row
def trpa(
    logp: Tensor,
    ref_logp: Tensor,
    score: Tensor,
    best: Tensor,
    mask: Tensor,
    group: Tensor,
    *,
    beta: float,
    boost: float,
    level: Literal["seq_mean", "seq_sum"],
    per_response: bool,
) -> Tensor:
    """Preference loss of every pair of a group with different scores, each winner's share, [N]; its mean is that over all pairs.

    -log sigmoid(h), h = a beta (u_w - u_l), u the row's mean log-ratio to the reference, and a = `boost` where the winner is of the
    best level. Where no group of the batch has two levels: -log sigmoid(u) for rows of the best level, -log sigmoid(-u) for
    others. See Su et al., "Trust Region Preference Approximation: A simple and stable reinforcement learning algorithm for LLM
    reasoning", arXiv:2504.04524, and its authors' code, whose form this is; `per_response` with seq_sum is the paper's
    h = beta(y_w) u_w - beta(y_l) u_l.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        ref_logp: the same under the reference, [N, T] nats
        score: level of each row, higher is better; only its order counts, [N]
        best: 1 where the row is of the best level, else 0, [N]
        mask: trained tokens, [N, T] bool
        group: rows of one prompt share it, [N] int64
        beta: strength of the implicit KL penalty, reward per nat
        boost: factor a of a winner of the best level
        level: seq_mean (log-ratio per token) or seq_sum (of whole responses)
        per_response: a scales each response of the best level rather than the pair
    """
    there = mask.any(-1)
    u = _per_row(logp - ref_logp, mask, level)  # [N]
    top = best > 0
    strength = torch.where(top, boost * beta, beta).to(u.dtype)  # [N]
    beats = (group[:, None] == group) & (score[:, None] > score) & there[:, None] & there  # [N, N], winner by loser
    scaled = strength * u
    h = scaled[:, None] - scaled if per_response else strength[:, None] * (u[:, None] - u)
    share = torch.where(beats, softplus(-h), 0.0).sum(-1) * (there.sum() / beats.sum().clamp(min=1))
    return torch.where(beats.any(), share, softplus(torch.where(top, -u, u)))


@per_row
def copg(
    logp: Tensor, ref_logp: Tensor, score: Tensor, mask: Tensor, group: Tensor, *, beta: float, per_beta: bool
) -> Tensor:
    """Squared difference of KL-regularised scores of a group's responses, each row's share, [N].

    S = score - beta u, the gradient flows through u. The mean over rows is the mean over groups of
    sum_{i > j} (S_i - S_j)^2 / (K - 1); its gradient is -2 beta sum_i (S_i - mean_{j != i} S_j) grad log pi(y_i): RLOO on S, for
    responses from any distribution. It is 0 exactly at pi proportional to ref exp(score / beta). See Flet-Berliac et al.,
    "Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a supervised-friendly fashion", arXiv:2406.19185.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        ref_logp: the same under the reference, [N, T] nats
        score: reward of each row, [N]
        mask: trained tokens, [N, T] bool
        group: rows of one prompt share it, [N] int64
        beta: strength of the KL penalty, reward per nat
        per_beta: divide by 2 beta, so that steps are as long as RLOO's
    """
    there = mask.any(-1)
    s = score - beta * _per_row(logp - ref_logp, mask, "seq_sum")  # [N]
    together = (group[:, None] == group) & there[:, None] & there  # [N, N]
    size = together.sum(-1)  # [N], K of the row's group
    squares = torch.where(together, (s[:, None] - s).square(), 0.0).sum(-1) / 2  # each pair counts half for either row
    groups = torch.where(there, 1.0 / size.clamp(min=1), 0.0).sum().clamp(min=1)
    loss = squares / (size - 1).clamp(min=1) * (there.sum() / groups)
    return loss / (2 * beta) if per_beta else loss


@per_row
def copg_labels(
    logp: Tensor, ref_logp: Tensor, label: Tensor, mask: Tensor, group: Tensor, *, beta: float, per_beta: bool
) -> Tensor:
    """`copg` on recorded responses, scored by what the dataset says of them, [N].

    See Flet-Berliac et al., "Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a supervised-friendly
    fashion", arXiv:2406.19185.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        ref_logp: the same under the reference, [N, T] nats
        label: recorded score of each row, [N]
        mask: trained tokens, [N, T] bool
        group: rows of one prompt share it, [N] int64
        beta: strength of the KL penalty, score units per nat
        per_beta: divide by 2 beta, so that steps are as long as RLOO's
    """
    return copg(logp, ref_logp, label, mask, group, beta=beta, per_beta=per_beta)


def _per_row(x: Tensor, mask: Tensor, level: str) -> Tensor:
    """Sum, or mean, of x over each row's mask tokens, [N]."""
    total = torch.where(mask, x, 0.0).sum(-1)
    return total / mask.sum(-1).clamp(min=1) if level == "seq_mean" else total
