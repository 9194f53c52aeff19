"""Token rewards from a model that was trained on preferences."""

from __future__ import annotations

import torch
from torch import Tensor


def implicit_dpo(dpo_logp: Tensor, ref_logp: Tensor, mask: Tensor, *, beta: float, limit: float) -> Tensor:
    """A reward per token, beta (dpo_logp - ref_logp) limited to +-limit, [N, T]: scaled first, then limited.

    `dpo_logp` is of the model `frozen.dpo`, which must have been trained by DPO against this very reference. The end token gets a
    reward as any other. Not limited, a response's sum is beta / beta_dpo times DPO's implicit reward of it, so it moves the optimum
    towards the DPO policy. See Zhong et al., "DPO Meets PPO: Reinforced Token Optimization for RLHF", arXiv:2404.18922.

    Args:
        dpo_logp: log-probabilities of the DPO model, [N, T] nats
        ref_logp: the same under the reference, [N, T] nats
        mask: trained tokens, [N, T] bool
        beta: reward per nat
        limit: largest reward of a token either way; 0: none
    """
    reward = beta * (dpo_logp - ref_logp)
    return torch.where(mask, reward.clamp(-limit, limit) if limit else reward, 0.0)
