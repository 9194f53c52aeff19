"""Policy-gradient surrogates and the penalties that go with them, unreduced.

Advantages and every log-probability but `logp` are constants. At logp = old_logp each surrogate has REINFORCE's
gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_cli.credit.to_go import whitened
from rlhf_cli.inject import per_row, rowwise, weighted_by_advantage
from rlhf_cli.kl import bounded_exp, estimate


@weighted_by_advantage
@rowwise
def ppo_clip(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, *, eps_low: float, eps_high: float, dual_clip: float | None
) -> Tensor:
    """Clipped surrogate: -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) with r = exp(logp - old_logp), [N, T].

    See Schulman et al., "Proximal Policy Optimization Algorithms", arXiv:1707.06347, eq. 7; eps_high > eps_low is the
    clip-higher of Yu et al., arXiv:2503.14476. The dual clip bounds the loss of A < 0 by -dual_clip A: Ye et al.,
    "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", arXiv:1912.09729.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        old_logp: the same at the start of the step, [N, T] nats
        advantage: [N, T], constant
        eps_low: how far the ratio may fall below 1
        eps_high: how far the ratio may rise above 1
        dual_clip: largest ratio that counts where the advantage is negative (> 1); empty turns it off
    """
    ratio = bounded_exp(logp - old_logp)
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - eps_low, 1 + eps_high) * advantage)
    if dual_clip is not None:
        gain = torch.where(advantage < 0, torch.maximum(gain, dual_clip * advantage), gain)
    return -gain


def ppo_clip_whitened(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, *, eps_low: float, eps_high: float
) -> Tensor:
    """`ppo_clip` of advantages that are shifted and scaled to mean 0 and variance 1 over the tokens of each mini-batch, [N, T].

    The sample variance (n - 1), as the code of Ramamurthy et al., "Is Reinforcement Learning (Not) for Natural Language
    Processing", arXiv:2210.01241 (RL4LMs) has it; a credit whitens over the whole step instead.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        old_logp: the same at the start of the step, [N, T] nats
        advantage: [N, T], constant
        mask: trained tokens, [N, T] bool
        eps_low: how far the ratio may fall below 1
        eps_high: how far the ratio may rise above 1
    """
    scaled = whitened(advantage, mask, ddof=1)
    return ppo_clip(logp, old_logp, scaled, eps_low=eps_low, eps_high=eps_high, dual_clip=None)


@weighted_by_advantage
@rowwise
def two_sided_clip(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, *, eps_low: float, eps_high: float, delta: float
) -> Tensor:
    """`ppo_clip` with the ratio of the *unclipped* term bounded from above: -min(min(r, delta) A, clip(r) A), [N, T].

    Bounds the loss of a negative advantage as the dual clip does. See Prime Intellect, "INTELLECT-2: A Reasoning Model
    Trained Through Globally Decentralized Reinforcement Learning", arXiv:2505.07291, section 3.4; TRL's `delta`.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        old_logp: the same at the start of the step, [N, T] nats
        advantage: [N, T], constant
        eps_low: how far the ratio may fall below 1
        eps_high: how far the ratio may rise above 1
        delta: largest ratio of the unclipped term (> 1 + eps_high)
    """
    ratio = bounded_exp(logp - old_logp)
    return -torch.minimum(ratio.clamp(max=delta) * advantage, ratio.clamp(1 - eps_low, 1 + eps_high) * advantage)


@weighted_by_advantage
@rowwise
def cispo(logp: Tensor, old_logp: Tensor, advantage: Tensor, *, cap: float, floor: float | None) -> Tensor:
    """Clipped importance weight on REINFORCE: -sg(clip(r, floor, cap)) A logp with r = exp(logp - old_logp), [N, T].

    The weight is constant, so every token keeps its gradient. See MiniMax, "MiniMax-M1: Scaling Test-Time Compute
    Efficiently with Lightning Attention", arXiv:2506.13585, eq. 4.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        old_logp: the same at the start of the step, [N, T] nats
        advantage: [N, T], constant
        cap: largest weight, not the distance from 1
        floor: smallest weight; empty: none
    """
    weight = bounded_exp(logp - old_logp).clamp(min=floor, max=cap).detach()
    return -weight * advantage * logp


@weighted_by_advantage
@rowwise
def reinforce(logp: Tensor, advantage: Tensor) -> Tensor:
    """Score-function surrogate: -A logp, [N, T].

    See Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning",
    Machine Learning 8, 1992.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        advantage: [N, T], constant
    """
    return -advantage * logp


@weighted_by_advantage
@per_row
@rowwise
def sequence_ratio_clip(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    level: Literal["seq_sum", "seq_mean"],
    eps_low: float,
    eps_high: float,
) -> Tensor:
    """Clipped surrogate with one ratio per row: -min(s A, clip(s, 1 - eps_low, 1 + eps_high) A), [N].

    seq_mean: s = exp(mean_t log r_t). See Zheng et al., "Group Sequence Policy Optimization", arXiv:2507.18071, eq. 5.
    seq_sum: s = exp(sum_t log r_t), the ratio of whole responses. See Ahmadian et al., "Back to Basics: Revisiting
    REINFORCE Style Optimization for Learning from Human Feedback in LLMs", arXiv:2402.14740 (RLOO).
    A is the row's mean advantage, its one value under every group credit. A clipped row has no gradient at all.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        old_logp: the same at the start of the step, [N, T] nats
        advantage: [N, T], constant
        mask: trained tokens, [N, T] bool
        level: seq_sum (ratio of the responses) or seq_mean (its length-th root)
        eps_low: how far the ratio may fall below 1
        eps_high: how far the ratio may rise above 1
    """
    length = mask.sum(-1).clamp(min=1)
    log_ratio = torch.where(mask, logp - old_logp, 0.0).sum(-1)  # [N]
    ratio = bounded_exp(log_ratio / length if level == "seq_mean" else log_ratio)
    gain = torch.where(mask, advantage, 0.0).sum(-1) / length  # [N]
    return -torch.minimum(ratio * gain, ratio.clamp(1 - eps_low, 1 + eps_high) * gain)


@weighted_by_advantage
@rowwise
def gspo_token(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, *, eps_low: float, eps_high: float
) -> Tensor:
    """GSPO with an advantage per token: -min(s_t A_t, clip(s_t) A_t), s_t = sg(exp(mean log r)) r_t / sg(r_t), [N, T].

    The ratio's value is the row's, its gradient the token's; with one advantage per row, value and gradient of the mean
    over tokens are those of `gspo`. See Zheng et al., "Group Sequence Policy Optimization", arXiv:2507.18071, eq. 13.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        old_logp: the same at the start of the step, [N, T] nats
        advantage: [N, T], constant
        mask: trained tokens, [N, T] bool
        eps_low: how far the ratio may fall below 1
        eps_high: how far the ratio may rise above 1
    """
    log_ratio = torch.where(mask, logp - old_logp, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = bounded_exp(log_ratio.detach() + logp - logp.detach())
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - eps_low, 1 + eps_high) * advantage)


@rowwise
def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL estimator k1 = d, d = logp - ref_logp, [N, T]. Its expected gradient is 0: a monitor, not a penalty.

    See Schulman, "Approximating KL Divergence", 2020, joschu.net/blog/kl-approx.html.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        ref_logp: the same under the reference, [N, T] nats
    """
    return estimate(logp - ref_logp, "k1")


@rowwise
def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL estimator k2 = d^2 / 2, d = logp - ref_logp, [N, T]. Its expected gradient is that of KL(pi || ref).

    See Schulman, "Approximating KL Divergence", 2020, joschu.net/blog/kl-approx.html.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        ref_logp: the same under the reference, [N, T] nats
    """
    return estimate(logp - ref_logp, "k2")


@rowwise
def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL estimator k3 = exp(-d) - 1 + d, d = logp - ref_logp, [N, T]. Its expected gradient is that of KL(ref || pi).

    See Schulman, "Approximating KL Divergence", 2020, joschu.net/blog/kl-approx.html; Shao et al., "DeepSeekMath",
    arXiv:2402.03300, eq. 4. d is clamped to +-20, beyond which the gradient is 0.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        ref_logp: the same under the reference, [N, T] nats
    """
    return estimate(logp - ref_logp, "k3")


@rowwise
def kl_k3_straight(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2, k2 - sg(k2) + sg(k3), [N, T]: unbiased in value and towards KL(pi || ref).

    See Tang and Munos, "On a few pitfalls in KL divergence gradient estimation for RL", arXiv:2506.09477; verl's "k3+".

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        ref_logp: the same under the reference, [N, T] nats
    """
    d = logp - ref_logp
    k2 = estimate(d, "k2")
    return k2 - k2.detach() + estimate(d, "k3").detach()


@rowwise
def kl_k3_corrected(logp: Tensor, old_logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 times the importance ratio, r (exp(-d) - 1 + d) with d = logp - ref_logp, [N, T]: its gradient is that of KL(pi || ref).

    See DeepSeek-AI, "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models", arXiv:2512.02556, section 3.1;
    TRL's use_bias_correction_kl. Unbiased off-policy too, in value and gradient.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        old_logp: the same at the start of the step, [N, T] nats
        ref_logp: the same under the reference, [N, T] nats
    """
    return bounded_exp(logp - old_logp) * estimate(logp - ref_logp, "k3")


@rowwise
def kl_old(logp: Tensor, old_logp: Tensor) -> Tensor:
    """Trust region: k3 = exp(-d) - 1 + d, d = logp - old_logp, [N, T]: a penalty on leaving the policy of the step's start.

    To second order KL(old || new), of which it is not an unbiased estimate on tokens of old. See Su et al., "Trust Region Preference
    Approximation: A simple and stable reinforcement learning algorithm for LLM reasoning", arXiv:2504.04524.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
        old_logp: the same at the start of the step, [N, T] nats
    """
    return estimate(logp - old_logp, "k3")


@rowwise
def entropy_bonus(entropy: Tensor) -> Tensor:
    """Negative entropy of the next-token distribution, [N, T]: adding it to a loss rewards entropy.

    See Williams and Peng, "Function optimization using connectionist reinforcement learning algorithms", 1991.

    Args:
        entropy: entropy of the policy at each token, [N, T] nats
    """
    return -entropy
