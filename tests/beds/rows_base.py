"""The base methods: recipe, and where theory says that it ends."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from optimality_bed import Row as AnyRow
from optimality_envs import (
    MANY_UPDATES,
    MEMORYLESS,
    SEVERAL,
    TWO_TOKENS,
    Env,
    Rule,
    best,
    centred,
    centred_then_whitened,
    corner,
    k2_slope,
    k3_slope,
    leave_one_out,
    one_rollout,
    optimum,
    per_token,
    standardised,
    stationary,
    varied,
)

Row = partial(AnyRow, tolerance=0.002)
STANDARD = standardised(1e-4)
OPTIMUM = "the optimum of E[r] - beta KL(pi, ref)"
BEST = "the best response alone: nothing holds it back"
SHORT = "the short response of less reward: 1 / length and 1 / std together favour it"
ALL = (MEMORYLESS, TWO_TOKENS, SEVERAL)
ONE = "batch.samples=1"
SUM = "reduce@updates.policy.surrogate.reduce=sequence_sum"
GRPO_SUM = (
    "algo=grpo",
    SUM,
    "reduce@updates.policy.kl.reduce=sequence_sum",
)
K1, K2 = (f"objective@updates.policy.kl.objective=kl_{k}" for k in ("k1", "k2"))
FAR = ("batch.epochs=300", "reduce@updates.policy.surrogate.reduce=sequence_sum", "credit=group_mean", "shaping=none")


def held(algo: str, reduce: str, rule: Rule, says: str, envs: tuple[Env, ...]) -> AnyRow:
    """A recipe without a KL, given one: k2 in the loss with the recipe's own weights, so that its end tells its advantage and weights."""
    term = "updates.policy.hold"
    words = (
        f"algo={algo}", f"+objective@{term}.objective=kl_k2", f"+reduce@{term}.reduce={reduce}", f"{term}.coef=1", "batch.minibatches=1"
    )  # fmt: skip
    return Row(f"{algo} with k2", words, stationary(replace(rule, beta=1.0, kl=k2_slope)), says, envs)


LESS = (TWO_TOKENS, SEVERAL)
ROWS = [
    Row("reinforce", ("algo=reinforce", "shaping.sequence_kl.beta=1"), optimum(1.0), OPTIMUM, ALL),
    Row(
        "reinforce, running mean",
        ("algo=reinforce", "shaping.sequence_kl.beta=1", "credit=running_mean"),
        optimum(1.0),
        OPTIMUM,
    ),
    Row(
        "reinforce, batch mean",
        ("algo=reinforce", "shaping.sequence_kl.beta=1", "credit=batch_mean"),
        optimum(1.0),
        OPTIMUM,
    ),
    Row("rloo", ("algo=rloo", "shaping.sequence_kl.beta=1"), optimum(1.0), OPTIMUM, ALL),
    Row("remax", ("algo=remax", ONE, "shaping.kl.beta=1"), optimum(1.0), OPTIMUM, ALL),
    Row("reinforce_pp", ("algo=reinforce_pp", ONE, "shaping.kl.beta=1"), optimum(1.0), OPTIMUM, ALL),
    Row("ppo", ("algo=ppo", ONE, "shaping.kl.beta=1", "learners.critic.lr=0.4"), optimum(1.0), OPTIMUM, ALL),
    Row(
        "ppo_shared",
        ("algo=ppo_shared", ONE, "shaping.kl.beta=1", "updates.policy.value.coef=1"),
        optimum(1.0),
        OPTIMUM,
    ),
    Row(
        "reinforce_pp_baseline",
        ("algo=reinforce_pp_baseline", "updates.policy.kl.coef=1"),
        stationary(Rule(2, centred_then_whitened, beta=1.0, kl=k2_slope, keep=varied)),
        "E[A grad log pi] = beta grad KL per token over groups that differ; A has unit variance, so the reward's scale is gone",
    ),
    Row(
        "grpo",
        ("algo=grpo", "updates.policy.kl.coef=1"),
        stationary(Rule(2, standardised(1e-4), weight=per_token, beta=1.0, kl=k3_slope)),
        "E[A grad log pi] = beta grad KL(ref, pi) per token, short responses weigh more; the reward's scale is gone",
        ALL,
    ),
    Row("dr_grpo", ("algo=dr_grpo",), best, BEST, ALL, lr=1.0),
    Row("dapo", ("algo=dapo", "batch.minibatches=1"), best, BEST, ALL),
    Row("gspo", ("algo=gspo", "batch.minibatches=1"), best, BEST),
    Row("gspo", ("algo=gspo", "batch.minibatches=1"), corner(Rule(2, STANDARD, weight=per_token)), SHORT, (SEVERAL,)),
    Row("grpo without KL", ("algo=grpo", "updates.policy.kl=null"), best, BEST),
    Row(
        "grpo without KL",
        ("algo=grpo", "updates.policy.kl=null"),
        corner(Rule(2, STANDARD, weight=per_token)),
        SHORT,
        (SEVERAL,),
    ),
    Row("gspo_token", ("algo=gspo_token", "batch.minibatches=1"), best, BEST),
    Row("cispo", ("algo=cispo", "batch.minibatches=1"), best, BEST, ALL, steps=300),
    held("dr_grpo", "constant_length", Rule(2, centred), "as with beta K / (K - 1)", LESS),
    held("dapo", "token_mean", Rule(2, STANDARD, keep=varied), "KL counts in groups that differ only", (TWO_TOKENS,)),
    held("gspo", "sequence_mean", Rule(2, STANDARD, weight=per_token), "GRPO's advantage, 1 / length", LESS),
    held("gspo_token", "sequence_mean", Rule(2, STANDARD, weight=per_token), "where gspo ends", LESS),
    held("cispo", "token_mean", Rule(2, STANDARD), "GRPO's advantage, every token weighs alike", LESS),
    # -- what a choice does ---------------------------------------------------------------------------------------------
    Row(
        "k1 in the loss",
        (*GRPO_SUM, K1, "updates.policy.kl.coef=1", "credit=leave_one_out"),
        best,
        "k1 has no gradient: " + BEST,
    ),
    Row(
        "k2 in the loss",
        (*GRPO_SUM, K2, "updates.policy.kl.coef=1", "credit=leave_one_out"),
        stationary(Rule(2, leave_one_out, beta=1.0, kl=k2_slope)),
        "the optimum if no token affects later ones; else none is charged for the KL of those after it",
        ALL,
    ),
    Row(
        "k3 in the loss",
        (*GRPO_SUM, "updates.policy.kl.coef=1", "credit=leave_one_out"),
        stationary(Rule(2, leave_one_out, beta=1.0, kl=k3_slope)),
        "E[A grad log pi] = beta grad KL(ref, pi): the other direction of KL",
    ),
    *(
        Row(
            f"{name} in the loss",
            (
                *GRPO_SUM,
                f"objective@updates.policy.kl.objective={option}",
                "updates.policy.kl.coef=1",
                "credit=leave_one_out",
            ),
            stationary(Rule(2, leave_one_out, beta=1.0, kl=k2_slope)),
            "where k2 ends",
            (TWO_TOKENS,),
        )
        for name, option in (("k3 with k2's gradient", "kl_k3_straight"), ("k3 times the ratio", "kl_k3_corrected"))
    ),
    Row(
        "KL in the reward, not summed",
        ("algo=grpo", SUM, "updates.policy.kl=null", "shaping=kl", "shaping.kl.beta=1", "credit=group_mean_at_token"),
        stationary(Rule(2, centred, beta=1.0, kl=k2_slope)),
        "where group mean, k2 ends",
        (TWO_TOKENS,),
    ),
    Row(
        "KL in the reward, summed",
        ("algo=grpo", SUM, "updates.policy.kl=null", "shaping=kl", "shaping.kl.beta=1", "credit=group_mean_to_go"),
        optimum(2.0),
        "the optimum of beta K / (K - 1): the mean of the score contains the row itself, the penalty does not",
        (TWO_TOKENS,),
    ),
    Row(
        "group mean, k2",
        (*GRPO_SUM, K2, "updates.policy.kl.coef=1", "credit=group_mean"),
        stationary(Rule(2, centred, beta=1.0, kl=k2_slope)),
        "as with beta K / (K - 1), here 2: the mean contains the row itself",
    ),
    Row(
        "mean per response, k2",
        ("algo=grpo", K2, "updates.policy.kl.coef=1", "credit=leave_one_out"),
        stationary(Rule(2, leave_one_out, weight=per_token, beta=1.0, kl=k2_slope)),
        "1 / length: not where k2 alone ends",
        (SEVERAL,),
    ),
    Row(
        "one rollout, clip 0.2",
        ("algo=grpo", "updates.policy.kl=null", *FAR),
        one_rollout(Rule(2, centred), 0.2, 0.2),
        "P(1) = 1.2 x 0.7 = 0.84, the edge of the clip, far from the best response",
        (MANY_UPDATES,),
        steps=1,
        lr=0.05,
    ),
    Row(
        "one rollout, clip 0.2 and 0.28",
        ("algo=dapo", "select=keep_all", "batch.minibatches=1", *FAR),
        one_rollout(Rule(2, centred), 0.2, 0.28),
        "P(1) = 1.28 x 0.7 = 0.896: clip-higher moves the edge",
        (MANY_UPDATES,),
        steps=1,
        lr=0.05,
    ),
    Row(
        "one rollout, clip 0.2 of a response's ratio",
        (
            "algo=grpo",
            "objective@updates.policy.surrogate.objective=sequence_ratio_clip",
            "updates.policy.surrogate.reduce=null",
            "updates.policy.kl=null",
            "batch.epochs=300",
            "credit=group_mean",
            "shaping=none",
        ),
        one_rollout(Rule(2, centred), 0.2, 0.2, whole=True),
        "P(0) P(1) = 0.8 x 0.21: the last force to end is that which takes from 01 and 10, worse than 11",
        (MANY_UPDATES,),
        steps=1,
        lr=0.05,
    ),
    Row(
        "one rollout, cispo",
        ("algo=cispo", "batch.minibatches=1", *FAR),
        best,
        "the best response: a capped weight keeps its gradient, so that there is no edge",
        (MANY_UPDATES,),
        steps=1,
        lr=0.05,
    ),
]
