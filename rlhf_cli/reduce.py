"""Reductions of [N, T] losses: weights made from the mask, so that loss = sum(weights * unreduced).

Weights are made once from the mask of a whole optimizer step and then cut with the rows, so no result depends on
micro-batching. n_i is the number of mask tokens of row i and B the number of rows with n_i > 0; an empty mask gives
zeros, never 0/0.
"""

from __future__ import annotations

from torch import Tensor


def token_mean(mask: Tensor) -> Tensor:
    """Mean over all tokens of the step: w_it = m_it / sum(m). Long rows weigh more.

    See Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv:2503.14476.

    Args:
        mask: trained tokens, [N, T] bool
    """
    return mask / mask.sum().clamp(min=1)


def sequence_mean(mask: Tensor) -> Tensor:
    """Mean over rows of each row's token mean: w_it = m_it / (B n_i). Tokens of long rows weigh less.

    See Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    arXiv:2402.03300, eq. 3.

    Args:
        mask: trained tokens, [N, T] bool
    """
    length = mask.sum(-1, keepdim=True)
    return mask / (length.clamp(min=1) * _rows(mask))


def sequence_sum(mask: Tensor) -> Tensor:
    """Mean over rows of each row's token sum: w_it = m_it / B. The policy gradient of whole responses.

    See Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
    LLMs", arXiv:2402.14740.

    Args:
        mask: trained tokens, [N, T] bool
    """
    return mask / _rows(mask)


def constant_length(mask: Tensor, *, length: int) -> Tensor:
    """Mean over rows of each row's token sum over a constant: w_it = m_it / (B length). No length bias.

    See Liu et al., "Understanding R1-Zero-Like Training: A Critical Perspective", arXiv:2503.20783, section 3.

    Args:
        mask: trained tokens, [N, T] bool
        length: constant that stands for every row's length, tokens
    """
    return mask / (_rows(mask) * length)


def _rows(mask: Tensor) -> Tensor:
    return mask.any(-1).sum().clamp(min=1)
