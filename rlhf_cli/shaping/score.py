"""Shapers of the score: functions of one number per row, and of the response's length."""

from __future__ import annotations

from torch import Tensor


def clip(score: Tensor, *, low: float, high: float) -> Tensor:
    """Score limited to [low, high], [N].

    See Huang et al., "The N+ Implementation Details of RLHF with PPO", arXiv:2403.17031.

    Args:
        score: one number per row, [N]
        low: smallest score that counts
        high: largest score that counts
    """
    return score.clamp(low, high)


def scale(score: Tensor, *, factor: float) -> Tensor:
    """Score times a constant, [N].

    Args:
        score: one number per row, [N]
        factor: multiplier
    """
    return score * factor


def missing_eos(score: Tensor, truncated: Tensor, *, penalty: float) -> Tensor:
    """Score minus a constant where the response was cut before its end, [N].

    See Huang et al., "The N+ Implementation Details of RLHF with PPO", arXiv:2403.17031 (the EOS trick); TRL's
    missing_eos_penalty.

    Args:
        score: one number per row, [N]
        truncated: reached the token limit before EOS or a stop, [N] bool
        penalty: what a response without end loses, score units
    """
    return score - penalty * truncated


def overlong(score: Tensor, mask: Tensor, *, max_tokens: int, buffer: int, factor: float) -> Tensor:
    """Score minus a penalty that grows from 0 to `factor` over the last `buffer` tokens before `max_tokens`, [N].

    See Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv:2503.14476, eq. 13.

    Args:
        score: one number per row, [N]
        mask: trained tokens, [N, T] bool
        max_tokens: length that gets the whole penalty, tokens
        buffer: length over which the penalty grows, tokens
        factor: whole penalty, score units
    """
    excess = mask.sum(-1) - (max_tokens - buffer)
    return score - factor * (excess / max(buffer, 1)).clamp(0, 1)
