"""Shapers of the score: of one number per row, and of the response's length."""

from __future__ import annotations

from torch import Tensor

from rlhf_cli.select import grouped


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


def overlong(score: Tensor, mask: Tensor, *, max_tokens: int, buffer: float, factor: float) -> Tensor:
    """Score minus a penalty that grows from 0 to `factor` over the last part of the allowed length, [N].

    See Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv:2503.14476, eq. 13.

    Args:
        score: one number per row, [N]
        mask: trained tokens, [N, T] bool
        max_tokens: length that gets the whole penalty, tokens
        buffer: share of `max_tokens` over which the penalty grows, in [0, 1]
        factor: whole penalty, score units
    """
    width = buffer * max_tokens
    excess = mask.sum(-1) - (max_tokens - width)
    return score - factor * (excess / max(width, 1)).clamp(0, 1)


def ceil(score: Tensor, *, high: float) -> Tensor:
    """min(score, high), [N].

    See Fu et al., "Reward Shaping to Mitigate Reward Hacking in RLHF", arXiv:2502.18770 (baseline).

    Args:
        score: one number per row, [N]
        high: largest score that counts
    """
    return score.clamp(max=high)


class Whiten:
    """(score - mean) / (std + eps) over the step's rows, [N]; equal scores give exactly 0. Without `center`, the mean is added again.

    What is compared with the rows (responses of the initial policy) takes the rows' mean and std, never its own: `frozen`.
    See Huang et al., "The N+ Implementation Details of RLHF with PPO", arXiv:2403.17031, detail 21.
    """

    def __init__(self, *, center: bool, eps: float) -> None:
        """Args:
        center: leave the mean off
        eps: added to the sample standard deviation, score units
        """
        self.center, self.eps = center, eps

    def __call__(self, score: Tensor) -> Tensor:
        """Measure the step's scores, and shape them.

        Args:
            score: one number per row, [N]
        """
        self.zero = score[:1]  # first taken off, so that rounding leaves nothing of equal scores
        shifted = score - self.zero
        self.mean, self.level = shifted.mean(), score.mean()
        centred = shifted - self.mean
        self.spread = (centred.square().sum() / max(len(score) - 1, 1)).sqrt() + self.eps
        return self.frozen(score)

    def frozen(self, score: Tensor) -> Tensor:
        """By the mean and std of the last step."""
        scaled = (score - self.zero - self.mean) / self.spread
        return scaled if self.center else scaled + self.level


def length_penalty(score: Tensor, mask: Tensor, *, rate: float, free: int, most: float | None) -> Tensor:
    """Score minus rate * min(max(0, length - free), most), [N]. A rate below 0 is a bonus.

    See Fu et al., "Reward Shaping to Mitigate Reward Hacking in RLHF", arXiv:2502.18770, which applies it before any other shaping.

    Args:
        score: one number per row, [N]
        mask: trained tokens, [N, T] bool
        rate: penalty, score units per token
        free: length without penalty, tokens
        most: tokens beyond `free` that count at most; null: all of them
    """
    counted = (mask.sum(-1) - free).clamp(min=0).to(score.dtype)
    return score - rate * (counted if most is None else counted.clamp(max=most))


def relative_length(score: Tensor, mask: Tensor, group: Tensor, *, factor: float, correct: float) -> Tensor:
    """Score plus factor * L for correct rows, factor * min(L, 0) for others, L = 1/2 - (n - n_min) / (n_max - n_min), [N].

    n is the length, n_min and n_max those of the group; groups of one length get nothing.
    See Kimi Team, "Kimi k1.5: Scaling Reinforcement Learning with LLMs", arXiv:2501.12599, section 2.3.3.

    Args:
        score: one number per row, [N]
        mask: trained tokens, [N, T] bool
        group: rows of one prompt share it, [N] int64
        factor: weight, score units
        correct: score from which a response counts as correct
    """
    length = mask.sum(-1).to(score.dtype)
    g = grouped(length, group)
    low, width = g.low[g.index], (g.high - g.low)[g.index]
    bonus = 0.5 - (length - low) / width.clamp(min=1)
    bonus = bonus.where(score >= correct, bonus.clamp(max=0)).where(width > 0, 0.0)
    return score + factor * bonus
