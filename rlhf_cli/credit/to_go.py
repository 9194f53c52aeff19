"""Credit from the rewards that follow a token."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cli.select import gives
from rlhf_cli.types import Credit


@gives("advantage", "returns")
def reward_to_go(reward: Tensor, mask: Tensor, *, gamma: float, whiten: bool) -> Credit:
    """Discounted sum of the rewards from each token on, optionally whitened over the tokens of the batch.

    G_t = sum_{s >= t} gamma^(s - t) r_s, counting trained tokens only. Whitened: Hu, "REINFORCE++: Stabilizing
    Critic-Free Policy Optimization with Global Advantage Normalization", arXiv:2501.03262, with the biased variance of
    its author's code. Returns are G, not whitened.

    Args:
        reward: reward of each token, the score at the last one included, [N, T]
        mask: trained tokens, [N, T] bool
        gamma: discount per token
        whiten: shift and scale the advantage to mean 0 and variance 1 over the batch's tokens
    """
    returns = discounted_sum(reward, mask, gamma=gamma)
    return Credit(whitened(returns, mask, ddof=0) if whiten else returns, returns)


@gives("advantage", "returns")
def reward_to_go_filtered(reward: Tensor, mask: Tensor, *, gamma: float, sigmas: float) -> Credit:
    """Whitened rewards to go, where an advantage beyond so many standard deviations becomes 0 instead of a huge step.

    z_t = (G_t - mean) / std over the tokens of the step, A_t = z_t where |z_t| <= sigmas, else 0; filtered tokens keep
    their place in every normaliser. See Zhang et al., "R1-Reward: Training Multimodal Reward Model Through Stable
    Reinforcement Learning", arXiv:2505.02835 (StableReinforce). Its released code compares z with the raw mean +- 3.

    Args:
        reward: reward of each token, the score at the last one included, [N, T]
        mask: trained tokens, [N, T] bool
        gamma: discount per token
        sigmas: largest |z| kept, standard deviations
    """
    returns = discounted_sum(reward, mask, gamma=gamma)
    z = whitened(returns, mask, ddof=0)
    return Credit(torch.where(z.abs() <= sigmas, z, 0.0), returns)


def discounted_sum(x: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """y_t = x_t + gamma y_next(t) over mask tokens, where next(t) is the following mask token; 0 elsewhere, [N, T]."""
    carry = x.new_zeros(len(x))
    out = torch.zeros_like(x)
    for t in reversed(range(x.shape[1])):
        carry = torch.where(mask[:, t], x[:, t] + gamma * carry, carry)
        out[:, t] = carry
    return torch.where(mask, out, 0.0)


def whitened(x: Tensor, mask: Tensor, *, ddof: int) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over mask tokens, 0 elsewhere. Equal values, or a single one, give exactly 0."""
    valid = x[mask]
    valid = valid - valid[:1]  # shifted first, so that rounding leaves nothing of a constant
    centred = valid - valid.sum() / max(len(valid), 1)
    variance = centred.square().sum() / max(len(valid) - ddof, 1)
    return torch.zeros_like(x).masked_scatter(mask, centred * torch.rsqrt(variance + 1e-8))
