"""GAE and reward-to-go: hand numbers, the slow double loop, turns, whitening."""

import pytest
import torch
from torch import Tensor

from rlhf_cli.credit import gae, gae_biased, gae_scaled_reward, reward_to_go
from rlhf_cli.credit.to_go import whitened

FULL = torch.ones(1, 3, dtype=torch.bool)
REWARD = torch.tensor([[0.0, 0.0, 1.0]])
VALUE = torch.tensor([[0.5, 0.4, 0.6]])


@pytest.mark.parametrize(
    ("lam", "advantage", "returns"),
    [
        # deltas: .4 - .5 = -.1, .6 - .4 = .2, 1 - .6 = .4; lambda .95: .4, .2 + .38 = .58, -.1 + .551 = .451
        (0.95, [0.451, 0.58, 0.4], [0.951, 0.98, 1.0]),
        (1.0, [0.5, 0.6, 0.4], [1.0, 1.0, 1.0]),  # Monte Carlo: G - V
        (0.0, [-0.1, 0.2, 0.4], [0.4, 0.6, 1.0]),  # the deltas
    ],
)
def test_hand_numbers(lam: float, advantage: list[float], returns: list[float]) -> None:
    made = gae(REWARD, VALUE, FULL, gamma=1.0, lam=lam, whiten=False)
    assert torch.allclose(made.advantage, torch.tensor([advantage]), atol=1e-6)
    assert made.returns is not None and torch.allclose(made.returns, torch.tensor([returns]), atol=1e-6)


def test_whitening_uses_the_sample_variance_and_leaves_returns() -> None:
    # mean .477, squared deviations .000676 + .010609 + .005929 = .017214; / 2 -> std .092774; -.026 / .092774 = -.2803
    made = gae(REWARD, VALUE, FULL, gamma=1.0, lam=0.95, whiten=True)
    assert torch.allclose(made.advantage, torch.tensor([[-0.2803, 1.1102, -0.8300]]), atol=1e-4)
    assert made.returns is not None and torch.allclose(made.returns, torch.tensor([[0.951, 0.98, 1.0]]), atol=1e-6)


def test_biased_whitening() -> None:
    white = whitened(torch.tensor([[0.451, 0.58, 0.4]]), FULL, ddof=0)
    assert torch.allclose(white, torch.tensor([[-0.3432, 1.3597, -1.0165]]), atol=1e-4)


def slow_gae(reward: Tensor, value: Tensor, gamma: float, lam: float) -> list[float]:
    """A_t = sum_l (gamma lam)^l delta_{t+l}, one row without holes, in plain floats."""
    r, v = reward.tolist(), [*value.tolist(), 0.0]
    delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, len(r))) for t in range(len(r))]


def test_equals_the_slow_loop_on_ragged_rows_with_holes() -> None:
    torch.manual_seed(0)
    reward, value = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    mask = torch.rand(5, 9) < 0.6
    mask[3] = False
    made = gae(reward, value, mask, gamma=0.9, lam=0.8, whiten=False)
    assert made.returns is not None and made.advantage.dtype == torch.float64
    for i in range(5):
        # removing the holes and computing on the tokens that are left must change nothing: V and A are carried over
        slow = torch.tensor(slow_gae(reward[i, mask[i]], value[i, mask[i]], 0.9, 0.8), dtype=torch.float64)
        assert torch.allclose(made.advantage[i, mask[i]], slow, atol=1e-12)
        assert torch.allclose(made.returns[i, mask[i]], slow + value[i, mask[i]], atol=1e-12)
    assert (made.advantage[~mask] == 0).all() and (made.returns[~mask] == 0).all()


def test_two_turns_carry_value_and_advantage_over_the_observation() -> None:
    # the fixture with two observation tokens, full of garbage, between its tokens
    mask = torch.tensor([[1, 0, 0, 1, 1, 0]], dtype=torch.bool)
    reward = torch.tensor([[0.0, 9.0, 9.0, 0.0, 1.0, 9.0]])
    value = torch.tensor([[0.5, -9.0, -9.0, 0.4, 0.6, -9.0]])
    made = gae(reward, value, mask, gamma=1.0, lam=0.95, whiten=False)
    assert torch.allclose(made.advantage, torch.tensor([[0.451, 0.0, 0.0, 0.58, 0.4, 0.0]]), atol=1e-6)


def test_reward_to_go() -> None:
    # 0 + .5 (.2 + .5 * 1) = .35; .2 + .5 = .7; 1
    made = reward_to_go(torch.tensor([[0.0, 0.2, 1.0]]), FULL, gamma=0.5, whiten=False)
    assert torch.allclose(made.advantage, torch.tensor([[0.35, 0.7, 1.0]]), atol=1e-6)
    assert made.returns is made.advantage


def test_reward_to_go_is_gae_without_a_critic() -> None:
    torch.manual_seed(0)
    reward, mask = torch.randn(4, 6), torch.rand(4, 6) < 0.7
    monte_carlo = gae(reward, torch.zeros(4, 6), mask, gamma=0.9, lam=1.0, whiten=False)
    assert torch.allclose(
        reward_to_go(reward, mask, gamma=0.9, whiten=False).advantage, monte_carlo.advantage, atol=1e-6
    )


def test_reinforce_pp_whitens_with_the_biased_variance() -> None:
    # mean 3/8, biased variance 15/64: .625 / .484123 = 1.2910, -.375 / .484123 = -.7746
    score = torch.tensor([[1.0], [0], [0], [1], [1], [0], [0], [0]])
    made = reward_to_go(score, torch.ones(8, 1, dtype=torch.bool), gamma=1.0, whiten=True)
    expected = torch.where(score == 1, 1.2910, -0.7746)
    assert torch.allclose(made.advantage, expected, atol=1e-4)


@pytest.mark.parametrize("ddof", [0, 1])
def test_whitening_a_constant_or_nothing_is_exactly_zero(ddof: int) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    # seven 0.7, whose float32 mean is not 0.7: the remainder over sqrt(1e-8) would show
    assert torch.equal(whitened(torch.full((2, 4), 0.7), mask, ddof=ddof), torch.zeros(2, 4))
    assert torch.equal(whitened(torch.rand(2, 4), torch.zeros_like(mask), ddof=ddof), torch.zeros(2, 4))
    one = torch.zeros_like(mask)
    one[1, 1] = True
    assert torch.equal(whitened(torch.rand(2, 4), one, ddof=ddof), torch.zeros(2, 4))


def test_openrlhf_s_whitening_is_the_biased_one() -> None:
    # the check above: A = (.451, .58, .4), biased: (-.3432, 1.3597, -1.0165)
    reward, value = torch.tensor([[0.0, 0, 1]]), torch.tensor([[0.5, 0.4, 0.6]])
    found = gae_biased(reward, value, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=0.95)
    assert torch.allclose(found.advantage, torch.tensor([[-0.3432, 1.3597, -1.0165]]), atol=1e-4)
    assert found.returns is not None and torch.allclose(found.returns, torch.tensor([[0.951, 0.98, 1.0]]))


def test_scaled_rewards_keep_their_mean() -> None:
    # rewards 0, 0, 1, 3 (one token outside): variance 2 with n - 1, so they are divided by sqrt 2; lam = 1, V = 0: to go
    mask = torch.tensor([[True, True, False], [True, True, False]])
    reward = torch.tensor([[0.0, 0, 9], [1, 3, 9]])
    found = gae_scaled_reward(reward, torch.zeros(2, 3), mask, gamma=1.0, lam=1.0, whiten=False)
    assert torch.allclose(found.advantage, torch.tensor([[0.0, 0, 0], [4, 3, 0]]) / 2**0.5, atol=1e-6)
