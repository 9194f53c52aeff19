"""Objectives on (winner, loser) pairs of responses, unreduced [M].

h(y) = sum over mask tokens of (logp - ref_logp); D = h(winner) - h(loser); beta D is the difference of implicit
rewards. Pairs couple rows, so none of these is rowwise.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus


def dpo(logp: Tensor, ref_logp: Tensor, mask: Tensor, pairs: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Direct preference optimization: -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D), [M].

    See Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    arXiv:2305.18290, eq. 7. label_smoothing > 0 is the conservative DPO of Mitchell, 2023, whose finite optimum is beta
    D = log((1 - e) / e).

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        ref_logp: the same under the reference, [N, T] nats
        mask: trained tokens, [N, T] bool
        pairs: (winner, loser) rows, [M, 2] int64
        beta: strength of the implicit KL penalty, reward per nat
        label_smoothing: probability e that a label is wrong, in [0, 0.5)
    """
    h = _log_ratio(logp, ref_logp, mask)
    return smoothed_logistic(beta * gap(h, pairs), label_smoothing)


def ipo(
    logp: Tensor, ref_logp: Tensor, mask: Tensor, pairs: Tensor, *, tau: float, level: Literal["seq_sum", "seq_mean"]
) -> Tensor:
    """Identity preference optimization: (D - 1 / (2 tau))^2, [M].

    See Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences", arXiv:2310.12036,
    eq. 17. seq_mean divides h by the row's length, the form that its authors confirmed for practice.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        ref_logp: the same under the reference, [N, T] nats
        mask: trained tokens, [N, T] bool
        pairs: (winner, loser) rows, [M, 2] int64
        tau: strength of the KL penalty; the log-ratio gap aims at 1 / (2 tau)
        level: seq_sum (h as it is) or seq_mean (h per token)
    """
    h = _log_ratio(logp, ref_logp, mask)
    if level == "seq_mean":
        h = h / mask.sum(-1).clamp(min=1)
    return (gap(h, pairs) - 1 / (2 * tau)).square()


def hinge(logp: Tensor, ref_logp: Tensor, mask: Tensor, pairs: Tensor, *, beta: float) -> Tensor:
    """Hinge on the implicit reward: max(0, 1 - beta D), [M].

    See Liu et al., "Statistical Rejection Sampling Improves Preference Optimization", arXiv:2309.06657
    (hinge-norm; Zhao et al., "SLiC-HF", arXiv:2305.10425, without a reference).

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        ref_logp: the same under the reference, [N, T] nats
        mask: trained tokens, [N, T] bool
        pairs: (winner, loser) rows, [M, 2] int64
        beta: inverse margin: the log-ratio gap aims at 1 / beta
    """
    h = _log_ratio(logp, ref_logp, mask)
    return relu(1 - beta * gap(h, pairs))


def gap(x: Tensor, pairs: Tensor) -> Tensor:
    """x of the winner minus x of the loser, [M]."""
    return x[pairs[:, 0]] - x[pairs[:, 1]]


def smoothed_logistic(z: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z) = softplus(-z) + e z, elementwise."""
    return softplus(-z) + label_smoothing * z


def _log_ratio(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, logp - ref_logp, 0.0).sum(-1)  # [N]
