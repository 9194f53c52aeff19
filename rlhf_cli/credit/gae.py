"""Generalized advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cli.credit.to_go import discounted_sum, whitened
from rlhf_cli.select import gives
from rlhf_cli.types import Credit


@gives("advantage", "returns")
def gae(reward: Tensor, value: Tensor, mask: Tensor, *, gamma: float, lam: float, whiten: bool) -> Credit:
    """Generalized advantage estimation: A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t.

    See Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", arXiv:1506.02438,
    eq. 16. V after the last token is 0. Between the policy's turns V and A are carried over the tokens outside the
    mask. Returns A + V come from the advantage before whitening; whitening uses the sample variance (n - 1), as TRL and
    verl do.

    Args:
        reward: reward of each token, the score at the last one included, [N, T]
        value: values of the critic, [N, T]
        mask: trained tokens, [N, T] bool
        gamma: discount per token
        lam: trace decay; 1 is Monte Carlo, 0 is one-step
        whiten: shift and scale the advantage to mean 0 and variance 1 over the batch's tokens
    """
    delta = torch.where(mask, reward + gamma * _next_value(value, mask) - value, 0.0)
    advantage = discounted_sum(delta, mask, gamma=gamma * lam)
    returns = torch.where(mask, advantage + value, 0.0)
    return Credit(whitened(advantage, mask, ddof=1) if whiten else advantage, returns)


@gives("advantage", "returns")
def gae_biased(reward: Tensor, value: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Credit:
    """`gae` whitened with the biased variance (n), as OpenRLHF does.

    See Hu et al., "OpenRLHF: An Easy-to-use, Scalable and High-performance RLHF Framework", arXiv:2405.11143.

    Args:
        reward: reward of each token, the score at the last one included, [N, T]
        value: values of the critic, [N, T]
        mask: trained tokens, [N, T] bool
        gamma: discount per token
        lam: trace decay; 1 is Monte Carlo, 0 is one-step
    """
    plain = gae(reward, value, mask, gamma=gamma, lam=lam, whiten=False)
    return Credit(whitened(plain.advantage, mask, ddof=0), plain.returns)


@gives("advantage", "returns")
def gae_scaled_reward(reward: Tensor, value: Tensor, mask: Tensor, *, gamma: float, lam: float, whiten: bool) -> Credit:
    """`gae` of rewards over their standard deviation in the batch; their mean is not shifted, [N, T].

    See Huang et al., "The N+ Implementation Details of RLHF with PPO", arXiv:2403.17031 (whiten_rewards).

    Args:
        reward: reward of each token, the score at the last one included, [N, T]
        value: values of the critic, [N, T]
        mask: trained tokens, [N, T] bool
        gamma: discount per token
        lam: trace decay; 1 is Monte Carlo, 0 is one-step
        whiten: shift and scale the advantage to mean 0 and variance 1 over the batch's tokens
    """
    scaled = torch.where(mask, reward * torch.rsqrt(reward[mask].var(correction=1).nan_to_num() + 1e-8), 0.0)
    return gae(scaled, value, mask, gamma=gamma, lam=lam, whiten=whiten)


def _next_value(value: Tensor, mask: Tensor) -> Tensor:
    """The value at the following mask token, 0 after the last one, [N, T]."""
    end = value.shape[1]
    place = torch.arange(end, device=value.device).expand_as(value).masked_fill(~mask, end)
    # the smallest mask position at or after t, then the one strictly after t
    at_or_after = place.flip(-1).cummin(-1).values.flip(-1)
    after = torch.cat([at_or_after[:, 1:], at_or_after.new_full((len(value), 1), end)], -1)
    padded = torch.cat([value, value.new_zeros(len(value), 1)], -1)
    return padded.gather(1, after)
