"""Group-relative credit, scaled by how hard the data are and how the policy responds to them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_cli.credit.group import group_norm
from rlhf_cli.select import gives, grouped
from rlhf_cli.types import Credit


@gives("advantage")
def difficulty_scaled(
    score: Tensor,
    mask: Tensor,
    group: Tensor,
    hardness: Tensor,
    gap: Tensor,
    category: Tensor,
    *,
    sign: Literal["formula", "prose"],
    tau: float,
    ddof: int,
    eps: float,
) -> Credit:
    """GRPO-S: A = alpha (R - mean) / (std + eps) with alpha = alpha_D alpha_M, a constant of the prompt.

    Data hardness: alpha_D = sigmoid(delta) / sigmoid(mean of delta over the category), delta the mean distance of the prompt's responses
    to its demonstration. Responsiveness, one number per category: alpha_M = sigmoid(mean of the gaps with (gap - mean)^2 <= tau) /
    sigmoid(mean of all gaps), gap = r(demonstration) - r(response). Per prompt, since one per response would leave a group's
    advantages with another sum than 0. See Cheng et al., "Inverse Reinforcement Learning with Dynamic Reward Scaling for LLM
    Alignment", arXiv:2503.18991, section 4; its formula gives harder data larger weights where its prose says the opposite.

    Args:
        score: reward of each row, [N]
        mask: trained tokens, [N, T] bool
        group: rows of one prompt share it, [N] int64
        hardness: 1 - similarity of the response to the demonstration, [N]
        gap: reward of the demonstration minus that of the response, [N]
        category: rows of one category share it, [N]
        sign: formula (harder data weigh more) or prose (delta is the similarity: easier data weigh more)
        tau: largest squared distance of a gap to its category's mean; 0 is twice the variance of the category's gaps
        ddof: 1 for the sample standard deviation, 0 for the population's
        eps: added to the standard deviation, score units
    """
    kind = torch.unique(category, return_inverse=True)[1]
    prompt = torch.unique(group, return_inverse=True)[1]
    everyone = torch.ones_like(score, dtype=torch.bool)
    delta = hardness if sign == "formula" else 1 - hardness
    own = mean_by(delta, prompt, everyone)
    alpha_d = torch.sigmoid(own) / torch.sigmoid(mean_by(own, kind, everyone))
    centre = mean_by(gap, kind, everyone)
    off = (gap - centre).square()
    kept = off <= (tau if tau > 0 else 2 * mean_by(off, kind, everyone))
    alpha_m = torch.sigmoid(mean_by(gap, kind, kept)) / torch.sigmoid(centre)
    base = group_norm(score, mask, group, scale="std", ddof=ddof, eps=eps).advantage
    return Credit(base * (alpha_d * alpha_m)[:, None].to(base.dtype))


def mean_by(x: Tensor, index: Tensor, kept: Tensor) -> Tensor:
    """[N]: each row's mean over the kept rows with its index, or over all of them where none is kept. Equal values give themselves, exactly."""
    low = grouped(x, index).low[index]
    n = int(index.max()) + 1 if len(index) else 0

    def total(values: Tensor) -> Tensor:
        return torch.zeros(n, dtype=x.dtype).index_add(0, index, values)[index]

    off, one = x - low, torch.ones_like(x)
    size = total(one * kept)
    some = total(off * kept) / size.clamp(min=1)
    return low + torch.where(size > 0, some, total(off) / total(one))
