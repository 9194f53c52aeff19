"""Student's t and the paired test of two configurations over seeds and prompts, exact, without a statistics package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval and, for a difference, the two-sided p of "it is 0"."""

    mean: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


def cdf(t: float, df: float) -> float:
    """P(T <= t) for Student's t with `df` degrees of freedom.

    Through the regularised incomplete beta function, I_x(df/2, 1/2) at x = df / (df + t^2). See Abramowitz and Stegun,
    Handbook of Mathematical Functions, 26.7.1 and 26.5.8.
    """
    tail = _beta(df / (df + t * t), df / 2, 0.5) / 2
    return 1 - tail if t > 0 else tail


def quantile(probability: float, df: float) -> float:
    """The t that `probability` of the distribution lies below, for probabilities from 0.5 on."""
    low, high = 0.0, 1.0
    while cdf(high, df) < probability:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if cdf(middle, df) < probability else (low, middle)
    return (low + high) / 2


def interval(values: Sequence[float]) -> Estimate:
    """Mean of independent values with its 95 % t interval; one value has none."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return Estimate(float(x.mean()))
    return _t(float(x.mean()), float(x.var(ddof=1)) / len(x), len(x) - 1)


def paired(differences: Sequence[Sequence[float]]) -> Estimate:
    """Mean of a [seeds, prompts] table of paired differences, with a t interval and p that count both as drawn at random.

    Two-way random effects without replication: the variance of the mean is (MS_seed + MS_prompt - MS_rest) / (seeds x prompts),
    its degrees of freedom are Satterthwaite's (Biometrics Bulletin 2, 1946). One seed leaves the paired t test over prompts,
    one column that over seeds.
    """
    d = np.asarray(differences, dtype=np.float64)
    rows, columns = d.shape
    mean = float(d.mean())
    if d.size == 1:
        return Estimate(mean)
    by_seed, by_prompt = d.mean(1), d.mean(0)
    if rows == 1 or columns == 1:
        flat = d.ravel()
        return _t(mean, float(flat.var(ddof=1)) / len(flat), len(flat) - 1)
    rest = d - by_seed[:, None] - by_prompt[None, :] + mean
    df = (rows - 1, columns - 1, (rows - 1) * (columns - 1))
    ms = (columns * float(by_seed.var(ddof=1)), rows * float(by_prompt.var(ddof=1)), float((rest**2).sum()) / df[2])
    both = ms[0] + ms[1] - ms[2]
    candidates = [(ms[0], df[0]), (ms[1], df[1])]
    if ms[0] > ms[2] and ms[1] > ms[2]:  # otherwise one variance is estimated as 0, and the other's test remains
        candidates.append((both, both**2 / sum(m * m / n for m, n in zip(ms, df, strict=True))))
    variance, freedom = max(candidates)
    return _t(mean, variance / d.size, freedom)


def _t(mean: float, variance: float, df: float) -> Estimate:
    """Interval and p of a mean whose estimated variance has `df` degrees of freedom; equal values say nothing about theirs."""
    if variance <= 0:
        return Estimate(mean)
    error = math.sqrt(variance)
    half = quantile(0.975, df) * error
    return Estimate(mean, mean - half, mean + half, 2 * cdf(-abs(mean) / error, df))


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (modified Lentz)."""
    if x <= 0 or x >= 1:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny, f, c, d = 1e-300, 1.0, 1.0, 0.0
    for i in range(10_000):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / ((1 + term * d) or tiny)
        c = (1 + term / c) or tiny
        f *= c * d
        if abs(1 - c * d) < 1e-15 and i > 0:
            break
    return front * (f - 1)
