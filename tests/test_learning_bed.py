"""Where each method ends: a memoryless policy over three tokens, all samples enumerated, so expectations are exact.

With reward r and reference q the KL-regularised optimum is q exp(r / beta) / Z. RLOO, PPO and DPO reach it; a baseline
that contains the row itself reaches it for a larger beta; GRPO reaches another point, where its own stationarity
condition holds.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli import objectives
from rlhf_cli.credit import gae, group_norm, group_norm_to_go, leave_one_out
from rlhf_cli.inject import call
from rlhf_cli.reduce import token_mean
from rlhf_cli.shaping import sequence_kl, token_kl
from rlhf_cli.shaping.place import at_end
from rlhf_cli.types import Experience

REWARD = torch.tensor([1.0, 0.3, -0.5], dtype=torch.float64)
REF = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
BETA = 0.5
CLIP = {"eps_low": 0.2, "eps_high": 0.2}


def optimum(beta: float, reward: Tensor = REWARD, ref: Tensor = REF) -> Tensor:
    """argmax of E_pi[r] - beta KL(pi || ref)."""
    tilted = ref * (reward / beta).exp()
    return tilted / tilted.sum()


def natural_step(theta: Tensor, loss: Tensor, lr: float) -> Tensor:
    """One step along the natural gradient: the same fixed points as the gradient, reached at one rate on all tokens."""
    (grad,) = torch.autograd.grad(loss, theta)
    return (theta - lr * grad / theta.softmax(-1)).detach().requires_grad_()


# -- group methods -----------------------------------------------------------------------------------------------------


def train_groups(
    k: int,
    credit: Callable[..., Any],
    terms: list[tuple[float, Callable[..., Tensor]]],
    shaper: Callable[..., Tensor] | None = None,
    *,
    steps: int = 150,
    lr: float = 0.5,
) -> Tensor:
    """Expected updates over all groups of k samples, weighted by probability. Terms are (coefficient, objective)."""
    action = torch.cartesian_prod(*[torch.arange(3)] * k).reshape(-1, k)  # [P, k]
    rows = action.numel()
    fixed = Experience(
        mask=torch.ones(rows, 1, dtype=torch.bool),
        group=torch.arange(len(action)).repeat_interleave(k),
        ref_logp=REF.log()[action].reshape(rows, 1),
    )
    theta = REF.log().requires_grad_()
    for _ in range(steps):
        logp = theta.log_softmax(-1)[action].reshape(rows, 1)
        old = logp.detach()
        exp = replace(fixed, score=REWARD[action].flatten(), behavior_logp=old, old_logp=old)
        exp = shaped(exp, shaper)
        exp = replace(exp, advantage=call(credit, exp).advantage)
        probability = old.reshape(-1, k).sum(-1).exp()  # [P]
        weights = token_mean(exp.mask) * len(action) * probability[exp.group, None]
        loss = sum(coef * rowed_loss(call(f, exp, {"logp": logp}), weights) for coef, f in terms)
        theta = natural_step(theta, loss, lr)  # type: ignore[arg-type]
    return theta.softmax(-1).detach()


def shaped(exp: Experience, shaper: Callable[..., Tensor] | None) -> Experience:
    """The pipeline's rule: [N] replaces the score, [N, T] adds to the reward; the score lands at the end."""
    reward = torch.zeros_like(exp.behavior_logp)
    if shaper is not None:
        made = call(shaper, exp)
        exp, reward = (replace(exp, score=made), reward) if made.ndim == 1 else (exp, reward + made)
    return replace(exp, reward=reward + at_end(exp.score, exp.mask))


def rowed_loss(unreduced: Tensor, weights: Tensor) -> Tensor:
    return (unreduced * (weights if unreduced.ndim == 2 else weights.sum(-1))).sum()


SURROGATES = {
    "reinforce": objectives.reinforce,
    "ppo_clip": partial(objectives.ppo_clip, dual_clip=None, **CLIP),
    "seq_sum": partial(objectives.sequence_ratio_clip, level="seq_sum", **CLIP),
}


@pytest.mark.parametrize("surrogate", SURROGATES.values(), ids=SURROGATES.keys())
@pytest.mark.parametrize("k", [2, 3])
def test_rloo_with_the_penalty_in_the_score_reaches_the_optimum(k: int, surrogate: Callable[..., Tensor]) -> None:
    got = train_groups(k, leave_one_out, [(1.0, surrogate)], partial(sequence_kl, beta=BETA))
    assert torch.allclose(got, optimum(BETA), atol=1e-6)


def test_rloo_with_k2_in_the_loss_reaches_the_optimum() -> None:
    got = train_groups(3, leave_one_out, [(1.0, SURROGATES["ppo_clip"]), (BETA, objectives.kl_k2)])
    assert torch.allclose(got, optimum(BETA), atol=1e-6)


def test_k1_in_the_loss_penalises_nothing() -> None:
    # its expected gradient is 0: the policy leaves for the best token
    got = train_groups(2, leave_one_out, [(1.0, SURROGATES["ppo_clip"]), (BETA, objectives.kl_k1)])
    assert got[0] > 0.999


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_a_group_mean_reaches_the_optimum_of_a_larger_beta(k: int, placement: str) -> None:
    # the mean contains the row: E[(R_i - mean) grad] = (K - 1) / K grad E[R], so beta acts as beta K / (K - 1)
    settings = {"scale": "none", "ddof": 1, "eps": 0.0}
    if placement == "loss":
        terms = [(1.0, SURROGATES["ppo_clip"]), (BETA, objectives.kl_k2)]
        got = train_groups(k, partial(group_norm, **settings), terms)
    else:
        penalty = partial(token_kl, beta=BETA, kind="k1")
        got = train_groups(k, partial(group_norm_to_go, **settings), [(1.0, SURROGATES["ppo_clip"])], penalty)
    assert torch.allclose(got, optimum(BETA * k / (k - 1)), atol=1e-6)
    assert (got - optimum(BETA)).abs().max() > 0.03


# -- GRPO: another fixed point -----------------------------------------------------------------------------------------


def grpo_residual(p: list[float], k: int, beta: float, eps: float) -> list[float]:
    """Stationarity under the std-scaled advantage and k3 in the loss, enumerated: E[A 1(y = a)] - beta (p_a - q_a)."""
    reward, ref = REWARD.tolist(), REF.tolist()
    drift = [0.0] * 3
    for sample in itertools.product(range(3), repeat=k):
        scores = [reward[a] for a in sample]
        if len(set(scores)) == 1:
            continue
        probability = torch.tensor([p[a] for a in sample], dtype=torch.float64).prod().item()
        mean, std = statistics.mean(scores), statistics.stdev(scores)
        for a in sample:
            drift[a] += probability / k * (reward[a] - mean) / (std + eps)
    return [drift[a] - beta * (p[a] - ref[a]) for a in range(3)]


def solve_grpo(k: int, beta: float, eps: float) -> list[float]:
    """Newton on the first two probabilities, with a numeric Jacobian, from the reference."""
    x = torch.tensor([0.6, 0.3], dtype=torch.float64)

    def residual(x: Tensor) -> Tensor:
        return torch.tensor(grpo_residual([*x.tolist(), 1 - x.sum().item()], k, beta, eps)[:2], dtype=torch.float64)

    for _ in range(12):
        columns = [(residual(x + h) - residual(x - h)) / 2e-6 for h in 1e-6 * torch.eye(2, dtype=torch.float64)]
        x = x - torch.linalg.solve(torch.stack(columns, -1), residual(x))
    return [*x.tolist(), 1 - x.sum().item()]


@pytest.mark.parametrize("k", [2, 4])
def test_grpo_reaches_its_own_fixed_point(k: int) -> None:
    beta = 1.0
    credit = partial(group_norm, scale="std", ddof=1, eps=1e-4)
    got = train_groups(k, credit, [(1.0, SURROGATES["ppo_clip"]), (beta, objectives.kl_k3)], steps=200, lr=0.3)
    expected = torch.tensor(solve_grpo(k, beta, 1e-4), dtype=torch.float64)
    assert max(map(abs, grpo_residual(expected.tolist(), k, beta, 1e-4))) < 1e-10 and expected.min() > 0
    assert torch.allclose(got, expected, atol=1e-6)
    assert (got - optimum(beta)).abs().max() > 0.03, "it is not the KL-regularised optimum"


def test_grpo_on_two_samples_by_hand() -> None:
    # K = 2: A = +-1 / sqrt 2, and the best token wins against each other one, so at the fixed point with beta = 1
    # p (1 - p) / sqrt 2 = p - q; for q = 0.2: p^2 + (sqrt 2 - 1) p - 0.2 sqrt 2 = 0, p = 0.363626.
    # The size of the reward is gone.
    credit = partial(group_norm, scale="std", ddof=1, eps=0.0)
    got = train_groups(2, credit, [(1.0, objectives.reinforce), (1.0, objectives.kl_k3)], steps=200, lr=0.3)
    assert got[0].item() == pytest.approx(0.363626, abs=1e-6)


# -- PPO: two tokens, a critic, generalized advantages -----------------------------------------------------------------


def test_ppo_with_a_critic_reaches_the_optimum_and_the_soft_value() -> None:
    action = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # [9, 2], both tokens from the same policy
    exp = Experience(mask=torch.ones(9, 2, dtype=torch.bool), score=REWARD[action].sum(-1), ref_logp=REF.log()[action])
    theta = REF.log().requires_grad_()
    critic = torch.zeros(4, dtype=torch.float64, requires_grad=True)  # V(start), V(first token = 0, 1, 2)
    state = torch.stack([torch.zeros(9, dtype=torch.int64), 1 + action[:, 0]], -1)
    for _ in range(80):
        old = theta.log_softmax(-1)[action].detach()
        now = replace(exp, behavior_logp=old, old_logp=old, value=critic[state].detach())
        now = shaped(now, partial(token_kl, beta=BETA, kind="k1"))
        credit = call(partial(gae, gamma=1.0, lam=0.95, whiten=False), now)
        now = replace(now, advantage=credit.advantage, returns=credit.returns)
        weights = token_mean(now.mask) * 9 * old.sum(-1, keepdim=True).exp()
        for _epoch in range(2):  # the second one starts with ratios other than 1
            logp = theta.log_softmax(-1)[action]
            surrogate = partial(objectives.ppo_clip, dual_clip=None, **CLIP)
            theta = natural_step(theta, rowed_loss(call(surrogate, now, {"logp": logp}), weights), 0.7)
            outs = {"value_new": critic[state]}
            error = rowed_loss(call(partial(objectives.clipped_value, clip=None), now, outs), weights)
            visits = torch.zeros(4, dtype=torch.float64).index_add(0, state.flatten(), weights.flatten())
            critic = (critic - 0.7 * torch.autograd.grad(error, critic)[0] / visits).detach().requires_grad_()
    assert torch.allclose(theta.softmax(-1), optimum(BETA), atol=1e-6)
    # at the optimum r - beta log(pi / q) = beta log Z on every token
    log_z = BETA * (REF * (REWARD / BETA).exp()).sum().log()
    assert torch.allclose(critic.detach(), torch.cat([2 * log_z[None], REWARD + log_z]), atol=1e-6)


# -- recorded preferences ----------------------------------------------------------------------------------------------


def minimise(x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    x = x.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(x)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    return x.detach()


PAIRS = torch.tensor([(a, b) for a in range(3) for b in range(3) if a != b])


def labels(reward: Tensor) -> Tensor:
    """How often the first of each ordered pair wins, by Bradley-Terry."""
    return (reward[PAIRS[:, 0]] - reward[PAIRS[:, 1]]).sigmoid()


def dpo_policy(reward: Tensor, ref: Tensor) -> Tensor:
    exp = Experience(mask=torch.ones(3, 1, dtype=torch.bool), ref_logp=ref.log()[:, None], pairs=PAIRS)
    fn = partial(objectives.dpo, beta=BETA, label_smoothing=0.0)
    return minimise(
        torch.zeros(3, dtype=torch.float64),
        lambda z: (labels(reward) * call(fn, exp, {"logp": z.log_softmax(-1)[:, None]})).sum(),
    ).softmax(-1)


def test_dpo_reaches_the_optimum() -> None:
    reward = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    expected = torch.tensor([0.866813, 0.117310, 0.015876], dtype=torch.float64)  # softmax(2, 0, -2)
    assert torch.allclose(dpo_policy(reward, uniform), expected, atol=1e-6)
    assert torch.allclose(dpo_policy(REWARD, REF), optimum(BETA), atol=1e-6)


def test_bradley_terry_recovers_reward_differences() -> None:
    exp = Experience(pairs=PAIRS)
    fn = partial(objectives.bradley_terry, label_smoothing=0.0)
    score = minimise(
        torch.zeros(3, dtype=torch.float64), lambda s: (labels(REWARD) * call(fn, exp, {"score_new": s})).sum()
    )
    assert torch.allclose(score - score[0], REWARD - REWARD[0], atol=1e-6)


def test_sft_recovers_the_frequencies_of_the_demonstrations() -> None:
    frequency = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    z = minimise(
        torch.zeros(3, dtype=torch.float64),
        lambda z: (frequency * objectives.nll(z.log_softmax(-1)[:, None])[:, 0]).sum(),
    )
    assert torch.allclose(z.softmax(-1), frequency, atol=1e-6)
