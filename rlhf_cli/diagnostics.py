"""Numbers that say whether an update is healthy. Each takes columns and returns one scalar; those a run lacks columns for are skipped."""

from __future__ import annotations

from torch import Tensor


def ratio_mean(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """Mean importance ratio pi/pi_old over trained tokens: 1 on-policy."""
    return _mean((logp - old_logp).clamp(-20, 20).exp(), mask)


def ratio_gap(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """Mean |importance ratio - 1| over trained tokens: 0 on-policy."""
    return _mean(((logp - old_logp).clamp(-20, 20).exp() - 1).abs(), mask)


def ratio_max(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """Largest importance ratio over trained tokens."""
    return (((logp - old_logp).clamp(-20, 20) * mask).exp()).max()


def kl_old(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """k3 estimate of KL(old || current) per token, nats."""
    d = (logp - old_logp).clamp(-20, 20)
    return _mean(d.exp() - 1 - d, mask)


def kl_reference(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference) per token, nats."""
    d = (ref_logp - logp).clamp(-20, 20)
    return _mean(d.exp() - 1 - d, mask)


def kl_reference_whole(full_logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """`kl_reference` where a mask forbade tokens: of the whole policy at the start of the step, since the reference is whole too."""
    return kl_reference(full_logp, ref_logp, mask)


def sampler_gap(old_logp: Tensor, behavior_logp: Tensor, mask: Tensor) -> Tensor:
    """Mean |log-prob difference| between the learner before the update and the sampler, nats per token."""
    return _mean((old_logp - behavior_logp).abs(), mask)


def sampler_gap_max(old_logp: Tensor, behavior_logp: Tensor, mask: Tensor) -> Tensor:
    """Largest |log-prob difference| between the learner before the update and the sampler, nats."""
    return ((old_logp - behavior_logp).abs() * mask).max()


def surprise(logp: Tensor, mask: Tensor) -> Tensor:
    """Mean -log pi of the trained tokens: on the policy's own samples an unbiased estimate of its entropy, nats per token."""
    return _mean(-logp, mask)


def policy_accuracy(logp: Tensor, ref_logp: Tensor, mask: Tensor, pairs: Tensor) -> Tensor:
    """Fraction of pairs whose winner has the larger log-ratio to the reference; ties count half."""
    return _ordered(((logp - ref_logp) * mask).sum(-1), pairs)


def reward_accuracy(score_new: Tensor, pairs: Tensor) -> Tensor:
    """Fraction of pairs whose winner scores higher; ties count half."""
    return _ordered(score_new, pairs)


def explained_variance(value_new: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - value) / Var(returns) over trained tokens."""
    target, error = returns[mask], (returns - value_new)[mask]
    return 1 - error.var(correction=0) / target.var(correction=0).clamp(min=1e-12)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum().clamp(min=1)


def _ordered(x: Tensor, pairs: Tensor) -> Tensor:
    d = x[pairs[:, 0]] - x[pairs[:, 1]]
    return ((d > 0).float() + 0.5 * (d == 0).float()).sum() / max(len(pairs), 1)


DIAGNOSTICS = {
    "ratio_mean": ratio_mean,
    "ratio_gap": ratio_gap,
    "ratio_max": ratio_max,
    "kl_old": kl_old,
    "kl": kl_reference,
    "sampler_gap": sampler_gap,
    "sampler_gap_max": sampler_gap_max,
    "surprise": surprise,
    "accuracy": policy_accuracy,
    "reward_accuracy": reward_accuracy,
    "explained_variance": explained_variance,
}
WHOLE = {"kl": kl_reference_whole}
"""What is taken instead in runs that have its columns."""
