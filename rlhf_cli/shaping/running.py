"""Shapers that remember the scores of earlier steps. Their memory travels with checkpoints; every rank sees all rows.

Each takes the step's scores into its memory first and then uses it. `frozen` uses it alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Moments:
    """Mean and population variance of all scores so far, in float64, by the pairwise update of Chan et al., 1979."""

    def __init__(self) -> None:
        self.count, self.mean, self.square = 0.0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Population standard deviation."""
        return (self.square / max(self.count, 1.0)) ** 0.5

    def take(self, score: Tensor) -> None:
        """More scores."""
        x = score.double()
        n = float(len(x))
        if not n:
            return
        mean = float(x.mean())
        gap, total = mean - self.mean, self.count + n
        self.square += float((x - mean).square().sum()) + gap * gap * self.count * n / total
        self.mean += gap * n / total
        self.count = total

    @property
    def stats(self) -> dict[str, float]:
        """For the log."""
        return {"running_mean": self.mean, "running_std": self.std}

    def state_dict(self) -> dict[str, Any]:
        """Count, mean, sum of squared deviations."""
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with these."""
        self.count, self.mean, self.square = (float(state[k]) for k in ("count", "mean", "square"))


class RunningNorm(Moments):
    """(r - mean) / std of all scores so far, or r / std, [N]. Without effect under credits that normalise the group by its std.

    See Fu et al., "Reward Shaping to Mitigate Reward Hacking in RLHF", arXiv:2502.18770 (baseline); Engstrom et al., "Implementation
    Matters in Deep Policy Gradients", arXiv:2005.12729, for the scale alone.
    """

    def __init__(self, *, center: bool, eps: float) -> None:
        """Args:
        center: take the running mean off
        eps: added to the standard deviation, reward units
        """
        super().__init__()
        self.center, self.eps = center, eps

    def __call__(self, score: Tensor) -> Tensor:
        """Take the scores in, and shape them.

        Args:
            score: one number per row, [N]
        """
        self.take(score)
        return self.frozen(score)

    def frozen(self, score: Tensor) -> Tensor:
        """With the memory as it is."""
        return (score - (self.mean if self.center else 0.0)) / (self.std + self.eps)


class RunningClip(Moments):
    """r limited to mean +- sigmas std of all scores so far, [N].

    See Fu et al., "Reward Shaping to Mitigate Reward Hacking in RLHF", arXiv:2502.18770 (baseline; one sigma in its code).
    """

    def __init__(self, *, sigmas: float) -> None:
        """Args:
        sigmas: half width, standard deviations
        """
        super().__init__()
        self.sigmas = sigmas

    def __call__(self, score: Tensor) -> Tensor:
        """Take the scores in, and shape them.

        Args:
            score: one number per row, [N]
        """
        self.take(score)
        return self.frozen(score)

    def frozen(self, score: Tensor) -> Tensor:
        """With the memory as it is."""
        return score.clamp(self.mean - self.sigmas * self.std, self.mean + self.sigmas * self.std)


class MinMax:
    """(r - lowest) / (highest - lowest) of all scores so far, in [0, 1], [N]; 0 while all were equal.

    See Fu et al., "Reward Shaping to Mitigate Reward Hacking in RLHF", arXiv:2502.18770 (baseline).
    """

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")

    def __call__(self, score: Tensor) -> Tensor:
        """Take the scores in, and shape them.

        Args:
            score: one number per row, [N]
        """
        if len(score):
            self.low, self.high = min(self.low, float(score.min())), max(self.high, float(score.max()))
        return self.frozen(score)

    def frozen(self, score: Tensor) -> Tensor:
        """With the memory as it is."""
        width = self.high - self.low
        return (score - self.low) / width if width > 0 else torch.zeros_like(score)

    @property
    def stats(self) -> dict[str, float]:
        """For the log."""
        return {"running_low": self.low, "running_high": self.high}

    def state_dict(self) -> dict[str, Any]:
        """The extremes; none before the first score."""
        return {"range": [self.low, self.high] if self.low <= self.high else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with these."""
        self.low, self.high = state["range"] or (float("inf"), float("-inf"))
