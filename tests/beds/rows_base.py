"""The base methods: recipe, and where theory says that it ends."""

from __future__ import annotations

from optimality_bed import Row
from optimality_envs import (
    Rule,
    best,
    k3_slope,
    optimum,
    standardised,
    stationary,
)

OPTIMUM = "argmax E[r] - beta KL(pi, ref)"
BEST = "the best response alone"

ROWS = [
    Row("rloo", ("algo=rloo", "shaping.sequence_kl.beta=1"), optimum(1.0), OPTIMUM),
    Row(
        "grpo",
        ("algo=grpo", "updates.policy.kl.coef=1"),
        stationary(Rule(2, standardised(1e-4), beta=1.0, kl=k3_slope)),
        "E[A grad log pi] = beta grad KL(ref, pi) per token; the reward's scale is gone",
    ),
    Row("dr_grpo", ("algo=dr_grpo",), best, BEST),
    Row("ppo", ("algo=ppo", "shaping.kl.beta=1", "learners.critic.lr=0.4", "batch.samples=1"), optimum(1.0), OPTIMUM),
]
