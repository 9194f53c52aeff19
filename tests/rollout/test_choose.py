"""Draws against the probabilities they come from."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_cli.rollout.choose import Decoding, choose, distribution, draw

LAST = 1 - 2.0**-53  # the largest uniform number


def uniforms(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocabulary", [5, 128, 300])
def test_frequencies_follow_the_probabilities(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(vocabulary, generator=generator)
    n = 40_000
    token, logp = choose(logits.expand(n, -1), uniforms(n), Decoding())
    expected = n * torch.softmax(logits.double(), -1)
    counts = torch.bincount(token, minlength=vocabulary)
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    freedom = vocabulary - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)  # five standard deviations above the mean of chi-square
    torch.testing.assert_close(logp, torch.log_softmax(logits, -1)[token], atol=1e-5, rtol=0)


def test_draws_are_the_inverse_of_the_cumulative_sum() -> None:
    # Sums of p are 1, 3, 3, 7 of 7, so u in [0, 1/7) is token 0, [1/7, 3/7) token 1, [3/7, 1) token 3; token 2 never.
    p = torch.tensor([[1.0, 2.0, 0.0, 4.0]]).expand(6, -1)
    u = torch.tensor([0.0, 0.142, 0.143, 0.428, 0.429, LAST], dtype=torch.float64)
    token, mass = draw(p, u)
    assert token.tolist() == [0, 0, 1, 1, 3, 3]
    assert mass.tolist() == [7.0] * 6


@pytest.mark.parametrize("zeros", [[0], [299], list(range(128)), list(range(128, 300)), [0, 127, 128, 255, 256, 299]])
def test_a_token_of_probability_zero_is_never_drawn(zeros: list[int]) -> None:
    p = torch.rand(300, generator=torch.Generator().manual_seed(1)) + 1e-6
    p[zeros] = 0
    u = torch.cat([torch.tensor([0.0, 2.0**-53, LAST, LAST - 2.0**-53], dtype=torch.float64), uniforms(2000)])
    token, _ = draw(p.expand(len(u), -1), u)
    assert not set(token.tolist()) & set(zeros)


@pytest.mark.parametrize("only", [0, 127, 128, 299])
def test_a_certain_token_is_drawn_at_both_ends(only: int) -> None:
    p = torch.zeros(2, 300)
    p[:, only] = 1e-30  # far below one: the mass need not be 1
    token, _ = draw(p, torch.tensor([0.0, LAST], dtype=torch.float64))
    assert token.tolist() == [only, only]


def test_large_vocabulary_equals_a_float64_search() -> None:
    generator = torch.Generator().manual_seed(2)
    p = torch.softmax(3 * torch.randn(64, 49152, generator=generator), -1)
    u = uniforms(64, 3)
    exact = p.double().cumsum(-1)
    wanted = torch.searchsorted(exact, u[:, None] * exact[:, -1:], right=True)[:, 0]
    assert torch.equal(draw(p, u)[0], wanted)


def test_top_k_keeps_the_best_and_renormalises() -> None:
    # p = 0.1 0.2 0.3 0.4; the best two are 0.3 and 0.4, which become 3/7 and 4/7.
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(2, -1)
    token, logp = choose(logits, torch.tensor([0.42, 0.43], dtype=torch.float64), Decoding(top_k=2))
    assert token.tolist() == [2, 3]
    torch.testing.assert_close(logp, torch.tensor([3 / 7, 4 / 7]).log())


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.39, [3]), (0.41, [2, 3]), (0.69, [2, 3]), (0.71, [1, 2, 3]), (0.95, [0, 1, 2, 3])],
)
def test_nucleus_is_the_smallest_set_with_the_mass(top_p: float, kept: list[int]) -> None:
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    assert distribution(logits, Decoding(top_p=top_p))[0].nonzero().flatten().tolist() == kept


def test_nucleus_wider_than_the_first_guess() -> None:
    # Tokens fall off slowly, so that 0.9 of the mass needs thousands and a sort of the whole vocabulary.
    logits = -1e-4 * torch.arange(5000.0)[torch.randperm(5000, generator=torch.Generator().manual_seed(4))]
    best = torch.softmax(logits.double(), -1).sort(descending=True).values.cumsum(-1)
    wanted = int((best < 0.9).sum()) + 1
    assert wanted > 4000
    assert abs(int((distribution(logits[None], Decoding(top_p=0.9)) > 0).sum()) - wanted) <= 1


def test_equals_at_an_edge_stay_together() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 7] = 5
    assert int((distribution(logits, Decoding(top_k=2)) > 0).sum()) == 10
    assert int((distribution(logits, Decoding(top_p=0.99)) > 0).sum()) == 10
    assert int((distribution(logits, Decoding(top_p=0.5)) > 0).sum()) == 1


def test_top_k_comes_before_the_nucleus() -> None:
    # Of 0.3 and 0.4, renormalised to 0.43 and 0.57, half the mass is in the best alone; of all four it is not.
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    assert distribution(logits, Decoding(top_p=0.5, top_k=2))[0].nonzero().flatten().tolist() == [3]
    assert distribution(logits, Decoding(top_p=0.5))[0].nonzero().flatten().tolist() == [2, 3]


def test_temperature_zero_takes_the_first_best_and_reports_temperature_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    token, logp = choose(logits, torch.tensor([0.99], dtype=torch.float64), Decoding(temperature=0, top_k=1, top_p=0.1))
    assert token.tolist() == [1]
    torch.testing.assert_close(logp, torch.log_softmax(logits, -1)[:, 1])


def test_nan_logits_are_reported_and_not_a_crash() -> None:
    _, logp = choose(torch.full((2, 300), float("nan")), uniforms(2), Decoding())
    assert logp.isnan().all()
