"""Importance correction: the sampler's distribution is not exactly the learner's, so its samples get weights.

With d = log pi_learner - log pi_sampler of a trained token, before the update, exp(d) turns a mean over the sampler's tokens into
one over the learner's. Each rule bounds it in its own way. All are 1 everywhere while the mean |d| of the step is at most
`threshold`: rounding needs no correction, and a weight is variance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["masked_sequence", "masked_token", "truncated_sequence", "truncated_token"]

RANGE = 20.0  # nats; beyond it exp would overflow long before it means anything


class Correction(NamedTuple):
    """What a rule returns."""

    weight: Tensor  # [N, T], constant, 0 outside the mask
    bounded: Tensor  # [N, T] bool: the bound took effect


def truncated_token(
    old_logp: Tensor, behavior_logp: Tensor, mask: Tensor, *, cap: float, threshold: float
) -> Correction:
    """w_t = min(exp(d_t), cap).

    See Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025 (truncated importance
    sampling); the truncation is of Ionides, "Truncated Importance Sampling", 2008.

    Args:
        old_logp: the learner's log-prob before the update, [N, T]
        behavior_logp: the sampler's log-prob, [N, T]
        mask: trained tokens, [N, T] bool
        cap: largest weight
        threshold: mean |d| of the step up to which nothing is corrected, nats a token
    """
    ratio = _difference(old_logp, behavior_logp, mask).exp()
    return _unless_small(ratio.clamp(max=cap), ratio > cap, old_logp, behavior_logp, mask, threshold)


def truncated_sequence(
    old_logp: Tensor, behavior_logp: Tensor, mask: Tensor, *, cap: float, threshold: float
) -> Correction:
    """w = min(exp(sum_t d_t), cap), the same for all tokens of a row.

    The unbiased form, of large variance for long rows. See Yao et al., "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training", 2025.

    Args:
        old_logp: the learner's log-prob before the update, [N, T]
        behavior_logp: the sampler's log-prob, [N, T]
        mask: trained tokens, [N, T] bool
        cap: largest weight
        threshold: mean |d| of the step up to which nothing is corrected, nats a token
    """
    ratio = _difference(old_logp, behavior_logp, mask).sum(-1, keepdim=True).clamp(-RANGE, RANGE).exp()
    ratio = ratio.expand_as(old_logp)
    return _unless_small(ratio.clamp(max=cap), ratio > cap, old_logp, behavior_logp, mask, threshold)


def masked_token(
    old_logp: Tensor, behavior_logp: Tensor, mask: Tensor, *, low: float, high: float, threshold: float
) -> Correction:
    """w_t = exp(d_t) inside [low, high], and 0 outside: a token the two disagree on teaches nothing.

    See Ling Team, "Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model",
    arXiv:2510.18855 (IcePop).

    Args:
        old_logp: the learner's log-prob before the update, [N, T]
        behavior_logp: the sampler's log-prob, [N, T]
        mask: trained tokens, [N, T] bool
        low: smallest ratio kept
        high: largest ratio kept
        threshold: mean |d| of the step up to which nothing is corrected, nats a token
    """
    ratio = _difference(old_logp, behavior_logp, mask).exp()
    outside = (ratio < low) | (ratio > high)
    return _unless_small(ratio.masked_fill(outside, 0), outside, old_logp, behavior_logp, mask, threshold)


def masked_sequence(
    old_logp: Tensor, behavior_logp: Tensor, mask: Tensor, *, low: float, high: float, threshold: float
) -> Correction:
    """w = 1 for rows whose mean ratio exp(mean_t d_t) lies in [low, high], and 0 for the others.

    See Liu et al., "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch", 2025
    (geometric sequence mask).

    Args:
        old_logp: the learner's log-prob before the update, [N, T]
        behavior_logp: the sampler's log-prob, [N, T]
        mask: trained tokens, [N, T] bool
        low: smallest mean ratio kept
        high: largest mean ratio kept
        threshold: mean |d| of the step up to which nothing is corrected, nats a token
    """
    d = _difference(old_logp, behavior_logp, mask)
    mean = (d.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).exp()
    outside = ((mean < low) | (mean > high)).expand_as(d)
    return _unless_small((~outside).to(d.dtype), outside, old_logp, behavior_logp, mask, threshold)


def _difference(old_logp: Tensor, behavior_logp: Tensor, mask: Tensor) -> Tensor:
    return ((old_logp - behavior_logp) * mask).clamp(-RANGE, RANGE).detach()


def _unless_small(
    weight: Tensor, bounded: Tensor, old_logp: Tensor, behavior_logp: Tensor, mask: Tensor, threshold: float
) -> Correction:
    """The weights where the step's gap is above the threshold, else 1."""
    gap = ((old_logp - behavior_logp).abs() * mask).sum() / mask.sum().clamp(min=1)
    on = gap > threshold
    return Correction(torch.where(on, weight, torch.ones_like(weight)) * mask, bounded & mask & on)
