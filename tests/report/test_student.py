"""Student's t against tables, the paired test against sums done by hand."""

from __future__ import annotations

import math

import pytest

from rlhf_cli.report.student import cdf, interval, paired, quantile


@pytest.mark.parametrize(
    ("df", "expected"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (10, 2.2281), (30, 2.0423), (1e6, 1.95997)]
)
def test_quantiles_are_those_of_the_tables(df: float, expected: float) -> None:
    assert quantile(0.975, df) == pytest.approx(expected, abs=5e-5)
    assert cdf(quantile(0.975, df), df) == pytest.approx(0.975, abs=1e-12)


def test_closed_forms_of_the_distribution() -> None:
    for t in (-3.0, -0.4, 0.0, 0.7, 5.0):
        assert cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-12)  # Cauchy
        assert cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-12)


def test_interval_over_seeds() -> None:
    # 1, 2, 3: mean 2, variance 1, standard error 1/sqrt(3); t(0.975, 2) = 4.302653
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6) == pytest.approx(2 - found.low)
    assert math.isnan(interval([5.0]).low) and interval([5.0]).mean == 5.0


def test_one_seed_is_the_paired_t_test_over_prompts() -> None:
    # 1, 3: mean 2, standard error 1, t = 2 with one degree of freedom: p = 2 (1/2 - atan(2)/pi)
    for table in ([[1.0, 3.0]], [[1.0], [3.0]]):
        found = paired(table)
        assert found.mean == 2.0 and found.p == pytest.approx(1 - 2 * math.atan(2) / math.pi)
        assert found.high == pytest.approx(2 + 12.7062, abs=1e-4)
    assert math.isnan(paired([[4.0]]).low)
    assert math.isnan(paired([[1.0, 1.0], [1.0, 1.0]]).p), "equal values say nothing about their spread"


def test_seeds_and_prompts_both_random() -> None:
    # Rows (seeds) have means 2 and 5, columns (prompts) 2, 2, 6.5, the grand mean is 3.5.
    table = [[1.0, 0.0, 5.0], [3.0, 4.0, 8.0]]
    # MS_seed = 3 * ((1.5)^2 + (1.5)^2) / 1 = 13.5. MS_prompt = 2 * (1.5^2 + 1.5^2 + 3^2) / 2 = 13.5.
    # Residuals: (0.5, -0.5, 0), (-0.5, 0.5, 0): MS_rest = 1 / 2 = 0.5. Variance of the mean: (13.5 + 13.5 - 0.5) / 6.
    error = math.sqrt(26.5 / 6)
    df = 26.5**2 / (13.5**2 / 1 + 13.5**2 / 2 + 0.5**2 / 2)
    found = paired(table)
    assert found.mean == 3.5
    assert found.high - 3.5 == pytest.approx(quantile(0.975, df) * error)
    assert found.p == pytest.approx(2 * cdf(-3.5 / error, df))


def test_without_a_seed_effect_the_test_over_prompts_remains() -> None:
    # Both seeds have mean 2: MS_seed = 0 < MS_rest, so its variance is 0 and prompts alone vary: means 1, 3.
    # MS_prompt = 2 * (1 + 1) / 1 = 4, variance of the mean 4 / 4 = 1, one degree of freedom.
    found = paired([[0.0, 4.0], [2.0, 2.0]])
    assert found.p == pytest.approx(1 - 2 * math.atan(2) / math.pi)
