"""Methods of the papers that change the reward or the credit: recipe, and where theory says that it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from optimality_bed import Row
from optimality_envs import (
    LENGTHS,
    TWO_TOKENS,
    Env,
    Law,
    Rule,
    best,
    k3_slope,
    optimum,
    per_token,
    standardised,
    stationary,
)
from torch import Tensor

from rlhf_cli.types import Experience

FREE = (TWO_TOKENS, LENGTHS)  # a policy of one probability for all places has no such law
ONE = ("batch.samples=1", "batch.epochs=1", "batch.minibatches=1")
CRITIC = "learners.critic.lr=0.4"
DRAWN = 100  # responses of the reference, each exactly as often as its probability says


def references(env: Env) -> list[float]:
    """Rewards of the reference's responses."""
    return [env.reward[y] for y, p in env.law(env.start).items() for _ in range(round(DRAWN * p))]


def ref_scores(env: Env, exp: Experience) -> Tensor:
    """The same for every row, [N, R]."""
    return torch.tensor(references(env)).expand(len(exp), -1)


def ref_length(env: Env, exp: Experience) -> Tensor:
    """No response is longer than the length that costs nothing, [N, R]."""
    return torch.ones(len(exp), DRAWN)


def shaped(phi: Callable[[float, np.ndarray], float]) -> Callable[[Env], Law]:
    """ref exp(phi(r)) / Z, with phi of a reward and the references' rewards."""

    def law(env: Env) -> Law:
        known = np.array(references(env))
        found = {y: p * float(np.exp(phi(env.reward[y], known))) for y, p in env.law(env.start).items()}
        return {y: p / sum(found.values()) for y, p in found.items()}

    return law


def preferred(r: float, known: np.ndarray) -> float:
    """PAR: how likely the response beats one of the reference's, by Bradley and Terry."""
    return float((1 / (1 + np.exp(known - r))).mean())


def log_sigmoid(r: float, known: np.ndarray) -> float:
    """Log-probability of being better than the 85 % point of a normal law with the references' mean and deviation."""
    level = known.mean() + 1.0364333894937898 * known.std(ddof=1)
    return -float(np.log1p(np.exp(level - r)))


def for_best_of_4(r: float, known: np.ndarray) -> float:
    """exp(10 u - 10) of the quantile u, ties half."""
    return float(np.exp(10 * ((known < r).mean() + (known == r).mean() / 2) - 10))


def against_the_first(rewards: Tensor) -> Tensor:
    """A strict judge: 0 for the pivot, +1 for what beats it, -1 for the rest, [P, k]."""
    sign = torch.where(rewards > rewards[:, :1], 1.0, -1.0)
    return torch.cat([torch.zeros(len(rewards), 1), sign[:, 1:]], -1)


def beaten(r: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The advantages of a group whose first row is the pivot."""
    return np.concatenate([np.zeros((len(r), 1)), np.where(r[:, 1:] > r[:, :1], 1.0, -1.0)], 1)


def per_row(number: float) -> Callable[[Env, Experience], Tensor]:
    """A column of one number."""
    return lambda env, exp: torch.full((len(exp),), number)


ALIKE: Mapping[str, Callable[[Env, Experience], Tensor]] = {
    "gap": per_row(1.0),
    "category": per_row(0.0),
    "hardness": per_row(0.5),
}

ROWS = [
    Row(
        "par",
        ("experiment=par", *ONE, CRITIC, "shaping.kl_par.beta=1"),
        shaped(preferred),
        "ref exp(PAR(r)): bounded in [0, 1], so the best response cannot buy any KL",
        FREE,
        columns={"ref_scores": ref_scores, "ref_length": ref_length},
    ),
    Row(
        "lsc of one reward",
        ("algo=ppo", "shaping=[lsc,kl]", *ONE, CRITIC, "shaping.kl.beta=1"),
        shaped(log_sigmoid),
        "ref sigmoid(r - level): the law of responses that are good",
        FREE,
        columns={"ref_scores": ref_scores},
    ),
    Row(
        "infalign",
        ("experiment=infalign", *ONE, CRITIC, "shaping.kl.beta=1"),
        shaped(for_best_of_4),
        "ref exp(Phi(u)) with the reward's quantile u under the reference: only its order counts",
        FREE,
        columns={"ref_scores": ref_scores},
    ),
    Row(
        "dpa",
        (
            "experiment=dpa",
            "combine=weighted_sum",
            "reward.helpfulness.model.path=x",
            "reward.verbosity.model.path=x",
            "batch.samples=2",
        ),
        best,
        "the best response alone: of its own samples the better one is imitated, again and again",
    ),
    Row(
        "dr_irl, prompts alike",
        (
            "experiment=dr_irl",
            "batch.samples=2",
            "reward=[by_category,clause_distance]",
            "reward.by_category.path=x",
            "updates.policy.kl.coef=1",
        ),
        stationary(Rule(2, standardised(1e-4), weight=per_token, beta=1.0, kl=k3_slope)),
        "where grpo ends: no prompt is harder than another",
        columns=ALIKE,
    ),
    Row(
        "stable_reinforce",
        ("experiment=stable_reinforce", *ONE, "shaping.kl_stable.beta=1"),
        optimum(1.0),
        "the optimum of E[r] - beta KL(pi, ref): no advantage here is beyond three deviations",
    ),
    Row(
        "writing_zero",
        ("experiment=writing_zero", "batch.samples=2", "batch.resample=1", "updates.policy.kl.coef=1"),
        stationary(Rule(2, beaten, weight=per_token, beta=1.0, kl=k3_slope)),
        "E[A grad log pi] = beta grad KL(ref, pi) with A = +1 or -1 against a member of the group: only the reward's order counts",
        judged=against_the_first,
    ),
]
