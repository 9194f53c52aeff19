"""Shapers that compare a score with those of the initial policy's responses to the same prompt.

`ref_scores` [N, R] holds NaN where a reference response could not be scored; a row has at least one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# The polynomial of degree 5 that is closest to the sigmoid on [-5, 5] in the mean square: 1/2 + a x + b x^3 + c x^5
POLY = (0.22932746, -0.010259517, 0.00020829496)


def par(score: Tensor, ref_scores: Tensor, *, kind: Literal["sigmoid", "tanh", "atan", "poly"], k: float) -> Tensor:
    """Preference as reward: mean_m sigmoid(k (r - r_m)), the probability that the response beats a reference, in [0, 1], [N].

    See Fu et al., "Reward Shaping to Mitigate Reward Hacking in RLHF", arXiv:2502.18770.

    Args:
        score: one number per row, [N]
        ref_scores: of the initial policy's responses, [N, R]
        kind: sigmoid; tanh, atan and poly are the paper's ablations
        k: steepness, 1 / reward units
    """
    return squashed(k * (score[:, None] - ref_scores), kind).nanmean(-1)


def sgfc(score: Tensor, ref_scores: Tensor, *, k: float, shift: float) -> Tensor:
    """Slow growth, then fast: mean_m sigmoid(k (r - shift - r_m)), a baseline of PAR, in [0, 1], [N].

    See Fu et al., "Reward Shaping to Mitigate Reward Hacking in RLHF", arXiv:2502.18770.

    Args:
        score: one number per row, [N]
        ref_scores: of the initial policy's responses, [N, R]
        k: steepness, 1 / reward units
        shift: how far above the references the slope is steepest, reward units
    """
    return squashed(k * (score[:, None] - shift - ref_scores), "sigmoid").nanmean(-1)


def centered(score: Tensor, ref_scores: Tensor) -> Tensor:
    """mean_m (r - r_m), [N]. Without effect under credits that take the group's mean off.

    See Fu et al., "Reward Shaping to Mitigate Reward Hacking in RLHF", arXiv:2502.18770 (baseline).

    Args:
        score: one number per row, [N]
        ref_scores: of the initial policy's responses, [N, R]
    """
    return score - ref_scores.nanmean(-1)


def lsc(
    score: Tensor, ref_scores: Tensor, *, level: Literal["gaussian", "empirical", "mean"], quantile: float
) -> Tensor:
    """Log-sigmoid centred: log sigmoid(r - r_ref), the log-probability of being better than the reference level, below 0, [N].

    Sums of it over several rewards are a logical AND: log prod_i p_i(good).
    See Wang et al., "Transforming and Combining Rewards for Aligning Large Language Models", arXiv:2402.00742.

    Args:
        score: one number per row, [N]
        ref_scores: of the initial policy's responses, [N, R]
        level: gaussian (mean + z std of the references, sample std), empirical (their quantile) or mean
        quantile: of the reference level, in (0, 1); 0.5 under gaussian is the mean
    """
    return logsigmoid(score - reference_level(ref_scores, level, quantile))


def lsc_canned(score: Tensor, canned_score: Tensor) -> Tensor:
    """`lsc` whose level is the reward of a canned answer to the prompt: log sigmoid(r - r_canned), below 0, [N].

    For properties that a fixed answer has, such as a refusal being harmless.
    See Wang et al., "Transforming and Combining Rewards for Aligning Large Language Models", arXiv:2402.00742.

    Args:
        score: one number per row, [N]
        canned_score: of the canned answer to the row's prompt, [N]
    """
    return logsigmoid(score - canned_score)


def reference_level(ref_scores: Tensor, level: str, quantile: float) -> Tensor:
    """The value that a good response exceeds, [N]. One reference has no spread.

    Args:
        ref_scores: [N, R], NaN where missing
        level: gaussian, empirical or mean
        quantile: in (0, 1)
    """
    if level == "empirical":
        return ref_scores.nanquantile(quantile, -1)
    mean = ref_scores.nanmean(-1)
    if level == "mean":
        return mean
    count = (~ref_scores.isnan()).sum(-1)
    square = (ref_scores - mean[:, None]).square().nansum(-1)
    z = torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64)).to(mean.dtype)
    return mean + z * (square / (count - 1).clamp(min=1)).sqrt()


def squash(score: Tensor, *, kind: Literal["sigmoid", "tanh", "atan", "poly"], k: float) -> Tensor:
    """sigmoid(k r), or another bounded curve from 0 to 1 (tanh, atan: from -1 to 1), without reference, [N].

    See Fu et al., "Reward Shaping to Mitigate Reward Hacking in RLHF", arXiv:2502.18770 (baselines).

    Args:
        score: one number per row, [N]
        kind: sigmoid, tanh, atan (2 / pi atan) or poly (a fit of degree 5 to the sigmoid on [-5, 5], 0 and 1 outside)
        k: steepness, 1 / reward units
    """
    return squashed(k * score, kind)


def squashed(x: Tensor, kind: str) -> Tensor:
    """The curve at x, same shape.

    Args:
        x: any shape
        kind: sigmoid, tanh, atan or poly
    """
    if kind == "tanh":
        return torch.tanh(x)
    if kind == "atan":
        return torch.atan(x) * (2 / torch.pi)
    if kind == "poly":
        a, b, c = POLY
        inside = 0.5 + x * (a + x.square() * (b + c * x.square()))
        return torch.where(x < -5, 0.0, torch.where(x > 5, 1.0, inside.clamp(0, 1))).where(~x.isnan(), x)
    return torch.sigmoid(x)
