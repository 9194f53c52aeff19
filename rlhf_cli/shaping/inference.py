"""Rewards for a policy that will be decoded by best-of-N, or attacked by worst-of-N: calibrate, then transform.

See Balashankar et al., "InfAlign: Inference-aware language model alignment", arXiv:2412.19792. Under the initial policy the calibrated
reward u of a response is uniform on [0, 1]; the policy that maximises E[Phi(u)] - beta KL has the density f(u) ~ exp(Phi(u) / beta).
The fixed points below follow from setting the variation of the win rate after decoding to zero.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

POINTS = 4001  # of a table over [0, 1]
ROUNDS = 400  # of the fixed point
HALF = 0.5


def infalign_ctrl(
    score: Tensor, ref_scores: Tensor, *, transform: Literal["identity", "exponential", "log"], t: float
) -> Tensor:
    """Phi(u) of the calibrated reward u, [N].

    exponential is sign(t) e^(t u), scaled by e^-max(t, 0) so that it stays within [-1, 1]; beta scales by the same factor.
    See Balashankar et al., "InfAlign: Inference-aware language model alignment", arXiv:2412.19792 (InfAlign-CTRL).

    Args:
        score: one number per row, [N]
        ref_scores: of the initial policy's responses, [N, R]
        transform: identity (the win rate), exponential or log (of u, at least 1 / (2 R): a best-of-n policy)
        t: exponent; 10 for best-of-4, -10 for worst-of-4
    """
    u = calibrated(score, ref_scores)
    if transform == "identity":
        return u
    if transform == "log":
        count = (~ref_scores.isnan()).sum(-1)
        return torch.maximum(u, HALF / count).log()
    sign = 1.0 if t > 0 else -1.0
    return sign * torch.exp(t * u - max(t, 0.0))


class InfAlignOptimal:
    """Phi(u) with the transform that is optimal for one N and beta, scaled to [0, 1]: a table, found as a fixed point.

    best: Phi(v) = N^2 int_0^v (F(u) u)^(N-1) du; worst: Phi(v) = N^2 int_0^v ((1 - F(u)) (1 - u))^(N-1) du, with F the
    distribution of f ~ exp(Phi / beta). N = 1 gives Phi(v) = v.
    See Balashankar et al., "InfAlign: Inference-aware language model alignment", arXiv:2412.19792, section 4.
    """

    def __init__(self, *, mode: Literal["best", "worst"], n: int, beta: float) -> None:
        """Args:
        mode: best (best-of-N decoding) or worst (worst-of-N)
        n: responses that decoding chooses from
        beta: KL coefficient of the unscaled transform, for which it is optimal
        """
        table = optimal_transform(n, beta, worst=mode == "worst")
        self.table = (table / table[-1]).float()

    def __call__(self, score: Tensor, ref_scores: Tensor) -> Tensor:
        """The transform of the calibrated reward.

        Args:
            score: one number per row, [N]
            ref_scores: of the initial policy's responses, [N, R]
        """
        u = calibrated(score, ref_scores)
        place = u.clamp(0, 1) * (len(self.table) - 1)
        low = place.floor().long().clamp(max=len(self.table) - 2)
        return torch.lerp(self.table[low], self.table[low + 1], place - low)


def calibrated(score: Tensor, ref_scores: Tensor) -> Tensor:
    """u = mean_m (1[r > r_m] + 1/2 1[r = r_m]), the response's quantile among the references, [N].

    Args:
        score: one number per row, [N]
        ref_scores: [N, R], NaN where missing
    """
    there = ~ref_scores.isnan()
    r = score[:, None]
    wins = (r > ref_scores).to(score.dtype) + HALF * (r == ref_scores).to(score.dtype)
    return (wins * there).sum(-1) / there.sum(-1)


def optimal_transform(n: int, beta: float, *, worst: bool, points: int = POINTS) -> Tensor:
    """Phi at `points` equal steps over [0, 1], float64, by damped iteration from the identity.

    Args:
        n: responses that decoding chooses from
        beta: KL coefficient
        worst: worst-of-N instead of best-of-N
        points: of the table
    """
    u = torch.linspace(0, 1, points, dtype=torch.float64)
    phi = u.clone()
    for _ in range(ROUNDS):
        cdf = aligned(phi, beta)[1]
        base = (1 - cdf) * (1 - u) if worst else cdf * u
        phi = HALF * phi + HALF * n * n * integral(base ** (n - 1))
    return phi


def aligned(phi: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Density and distribution of the aligned policy over u, at equal steps over [0, 1].

    Args:
        phi: the transform there
        beta: KL coefficient
    """
    density = torch.exp((phi - phi.max()) / beta)
    total = integral(density)
    return density / total[-1], total / total[-1]


def win_rates(phi: Tensor, beta: float, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL (nats) of the aligned policy, and its win rates over the initial one: of single responses, best-of-n, worst-of-n.

    best: 1 - int F^n n u^(n-1) du; worst: int (1 - F)^n n (1 - u)^(n-1) du.

    Args:
        phi: the transform at equal steps over [0, 1]
        beta: KL coefficient
        n: responses that decoding chooses from
    """
    u = torch.linspace(0, 1, len(phi), dtype=phi.dtype)
    density, cdf = aligned(phi, beta)
    kl = integral(torch.xlogy(density, density))[-1]
    best = 1 - integral(cdf**n * n * u ** (n - 1))[-1]
    worst = integral((1 - cdf) ** n * n * (1 - u) ** (n - 1))[-1]
    return kl, integral(density * u)[-1], best, worst


def integral(y: Tensor) -> Tensor:
    """The running integral from 0 of values at equal steps over [0, 1], by trapezia.

    Args:
        y: values, [points]
    """
    steps = (y[1:] + y[:-1]) / (2 * (len(y) - 1))
    return torch.cat([y.new_zeros(1), steps.cumsum(0)])
