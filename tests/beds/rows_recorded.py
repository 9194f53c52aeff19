"""Methods that learn from records, and online DPO: recipe, and where theory says that it ends."""

from __future__ import annotations

import math

from optimality_bed import Row
from optimality_envs import MEMORYLESS, TWO_TOKENS, Env, Law, best, optimum
from rows_papers import OTHER

OPTIMUM = "the optimum of E[r] - beta KL(pi, ref), whoever wrote the responses"
PAIRS = ("dataset=preferences", "dataset.path=x")
BOTH = (MEMORYLESS, TWO_TOKENS)


def other(env: Env) -> Law:
    """Responses of another model than the reference."""
    return env.law(OTHER[env.name])


def scored(env: Env) -> Law:
    """exp(r) / Z."""
    total = sum(map(math.exp, env.reward.values()))
    return {y: math.exp(r) / total for y, r in env.reward.items()}


ROWS = [
    Row("sft", ("algo=sft",), other, "the law of the demonstrations", BOTH, data=other),
    Row(
        "dpo",
        ("algo=dpo", *PAIRS, "updates.policy.preference.objective.beta=1"),
        optimum(1.0),
        OPTIMUM + "; who wins follows Bradley and Terry",
        BOTH,
        data=other,
        steps=400,
        lr=2.0,
    ),
    Row(
        "copg_offline",
        ("experiment=copg_offline", "dataset=scored", "updates.policy.preference.objective.beta=1"),
        optimum(1.0),
        OPTIMUM,
        BOTH,
        data=other,
    ),
    Row(
        "dpo on its own samples",
        ("algo=dpo", "source=sampled", "updates.policy.preference.objective.beta=1"),
        best,
        "the best response alone: the better of two always wins, so no log-ratio is large enough",
        BOTH,
        steps=400,
        lr=1.0,
        tolerance=0.05,
    ),
    Row(
        "reward_model",
        ("algo=reward_model", *PAIRS),
        scored,
        "the reward up to a constant, shown as exp(score) / Z; who wins follows Bradley and Terry",
        BOTH,
        data=other,
        steps=400,
        lr=1.0,
    ),
]
