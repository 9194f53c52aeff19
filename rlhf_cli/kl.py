"""Estimators of KL(pi || ref) from sampled tokens, used as a token reward, a sequence reward or a loss term.

With d = log pi - log ref on tokens drawn from pi (Schulman, "Approximating KL Divergence", 2020,
joschu.net/blog/kl-approx.html). As a *value*, k1 and k3 are unbiased and k2 is biased. As a *loss on fixed samples*
only the gradient matters, and there E[grad k1] = 0, E[grad k2] = grad KL(pi || ref) and E[grad k3] =
grad KL(ref || pi).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

LIMIT = 20.0
"""Largest |log-ratio| that is exponentiated: e^20 = 4.9e8 is far from overflow in float32. The gradient beyond is 0."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), exact for |log_ratio| <= 20 and constant beyond."""
    return log_ratio.clamp(-LIMIT, LIMIT).exp()


def k1(d: Tensor) -> Tensor:
    """k1 = d: unbiased, may be negative."""
    return d


def k2(d: Tensor) -> Tensor:
    """k2 = d^2 / 2: biased to second order, never negative."""
    return d.square() / 2


def k3(d: Tensor) -> Tensor:
    """k3 = exp(-d) - 1 + d: unbiased, never negative. d is clamped to +-20."""
    return bounded_exp(-d) - 1 + d.clamp(-LIMIT, LIMIT)


def k1_positive(d: Tensor) -> Tensor:
    """max(0, d): biased upward, never negative. Sun et al., "SALMON", arXiv:2310.05910, in its authors' code."""
    return d.clamp(min=0)


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k1_positive": k1_positive, "k2": k2, "k3": k3}


def estimate(d: Tensor, kind: Literal["k1", "k1_positive", "k2", "k3"]) -> Tensor:
    """The estimator called `kind` at log-ratio d = log pi - log ref, elementwise."""
    return ESTIMATORS[kind](d)
