"""KL penalties in the reward: constants, computed once from the sampler's log-probabilities.

See Ziegler et al., "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593, section 2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_cli.kl import estimate


def token_kl(
    behavior_logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    beta: float,
    kind: Literal["k1", "k1_positive", "k2", "k3"],
) -> Tensor:
    """A reward per token, -beta k(behavior_logp - ref_logp), [N, T]. k1 is the unbiased choice here.

    See Ouyang et al., "Training language models to follow instructions with human feedback", arXiv:2203.02155, eq. 2.

    Args:
        behavior_logp: log-probabilities of the sampler, [N, T] nats
        ref_logp: the same under the reference, [N, T] nats
        mask: trained tokens, [N, T] bool
        beta: penalty, reward per nat
        kind: estimator, k1 (d), k1_positive (max(0, d)), k2 (d^2 / 2) or k3 (exp(-d) - 1 + d)
    """
    return torch.where(mask, -beta * estimate(behavior_logp - ref_logp, kind), 0.0)


def token_kl_full(
    full_logp: Tensor, ref_logp: Tensor, mask: Tensor, *, beta: float, kind: Literal["k1", "k2", "k3"]
) -> Tensor:
    """`token_kl` of the policy's whole distribution, -beta k(full_logp - ref_logp), [N, T], where the sampled one was masked.

    See Ramamurthy et al., "Is Reinforcement Learning (Not) for Natural Language Processing", arXiv:2210.01241 (NLPO).

    Args:
        full_logp: log-probabilities of the policy over all tokens, at the start of the step, [N, T] nats
        ref_logp: the same under the reference, [N, T] nats
        mask: trained tokens, [N, T] bool
        beta: penalty, reward per nat
        kind: estimator, k1 (d), k2 (d^2 / 2) or k3 (exp(-d) - 1 + d)
    """
    return token_kl(full_logp, ref_logp, mask, beta=beta, kind=kind)


def sequence_kl(score: Tensor, behavior_logp: Tensor, ref_logp: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """Score minus beta times the row's log-ratio, R - beta sum_t (behavior_logp - ref_logp), [N]; baselines see it.

    See Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
    LLMs", arXiv:2402.14740, section 2.

    Args:
        score: one number per row, [N]
        behavior_logp: log-probabilities of the sampler, [N, T] nats
        ref_logp: the same under the reference, [N, T] nats
        mask: trained tokens, [N, T] bool
        beta: penalty, reward per nat
    """
    return score - beta * torch.where(mask, behavior_logp - ref_logp, 0.0).sum(-1)
