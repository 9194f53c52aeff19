"""Single-turn policy optimisation of the papers: recipe, and where theory says that it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from optimality_bed import Row
from optimality_envs import LENGTHS, MEMORYLESS, TWO_TOKENS, Env, Law, Policy, best, optimum
from torch import Tensor

from rlhf_cli.types import Experience

OPTIMUM = "the optimum of E[r] - beta KL(pi, ref)"
BEST = "the best response alone: nothing holds it back"
ALL = (MEMORYLESS, TWO_TOKENS, LENGTHS)
OTHER: Mapping[str, Policy] = {  # another model on each problem: a DPO policy, or a second fine-tune
    MEMORYLESS.name: {"": np.array([0.4, 0.6])},
    TWO_TOKENS.name: {"": np.array([0.4, 0.6]), "0": np.array([0.7, 0.3]), "1": np.array([0.5, 0.5])},
}


def soup(env: Env) -> Policy:
    """The average of the logits of reference and other: the geometric mean of both, normalised."""
    mean = {c: np.sqrt(p * OTHER[env.name][c]) for c, p in env.start.items()}
    return {c: p / p.sum() for c, p in mean.items()}


def tilted(weights: Callable[[Env], Law]) -> Callable[[Env], Law]:
    """weights x exp(r) / Z."""

    def law(env: Env) -> Law:
        found = {y: p * float(np.exp(env.reward[y])) for y, p in weights(env).items()}
        return {y: p / sum(found.values()) for y, p in found.items()}

    return law


def towards_dpo(env: Env) -> Law:
    """reference^(1/2) x other^(1/2): what a reward of half the log-ratio adds at beta 1."""
    other = env.law(OTHER[env.name])
    return {y: float(np.sqrt(p * other[y])) for y, p in env.law(env.start).items()}


def logp_of(policy: Callable[[Env], Policy]) -> Callable[[Env, Experience], Tensor]:
    """The column of a model's log-probs, [N, T]."""

    def column(env: Env, exp: Experience) -> Tensor:
        found, made = policy(env), torch.zeros(exp.mask.shape)
        for i, sample in enumerate(exp.samples):
            for t, token in enumerate(sample.response):
                made[i, t] = float(np.log(found[env.context(sample.response[:t])][int(token)]))
        return made

    return column


P3O = ("experiment=p3o", "shaping.sequence_kl.beta=1")
COPG = ("experiment=copg", "updates.policy.preference.objective.beta=1")
ONE = ("batch.samples=1", "batch.epochs=1", "batch.minibatches=1", "learners.critic.lr=0.4")
RTO = ("experiment=rto", "frozen.dpo.path=x", "learners.critic.path=", *ONE, "shaping.kl_weak.beta=1")
BOTH = (MEMORYLESS, TWO_TOKENS)

ROWS = [
    Row("p3o", P3O, optimum(1.0), OPTIMUM, ALL),
    Row("p3o, joint", (*P3O, "objective@updates.policy.preference.objective=p3o_joint"), optimum(1.0), OPTIMUM, ALL),
    Row("copg", COPG, optimum(1.0), OPTIMUM, ALL),
    Row(
        "rto, token rewards not clipped",
        (*RTO, "shaping.implicit_dpo.beta=0.5", "shaping.implicit_dpo.limit=0"),
        tilted(towards_dpo),
        "ref^(1/2) dpo^(1/2) exp(r): the DPO model's reward is not shaping, it moves the optimum towards that model",
        BOTH,
        columns={"dpo_logp": logp_of(lambda env: OTHER[env.name])},
    ),
    Row(
        "nlpo, everything allowed, gamma 1",
        ("experiment=nlpo", *ONE, "shaping=kl_full", "shaping.kl_full.beta=1", "credit.gamma=1"),
        optimum(1.0),
        OPTIMUM,
        BOTH,
        columns={"full_logp": lambda env, exp: exp.behavior_logp},
    ),
    Row(
        "salsa",
        ("experiment=salsa", "model.soup.path=x", *ONE, "shaping.kl.beta=1"),
        tilted(lambda env: env.law(soup(env))),
        "soup exp(r): the optimum around the soup, not around the policy's own start",
        BOTH,
        columns={"ref_logp": logp_of(soup)},
    ),
    Row(
        "trpa",
        ("experiment=trpa", "batch.samples=2", "reward=levels"),
        best,
        BEST,
        columns={"best": lambda env, exp: torch.zeros(len(exp))},
        steps=400,
        lr=1.0,
        tolerance=0.05,
    ),
]
