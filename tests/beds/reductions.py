"""Recipes whose rule is another recipe's: same select, shaping, credit, correction and updates, on another reward or other data.

They need no row of their own: where the other one ends on a problem, they end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from rlhf_cli.compose import compose

RULE = ("select", "shaping", "credit", "correction", "updates", "source")


@dataclass(frozen=True)
class Reduction:
    """`name` has the rule of the recipe that `words` choose; `says` is what it adds."""

    name: str
    words: tuple[str, ...]
    says: str


def rule(words: tuple[str, ...]) -> dict[str, Any]:
    """What decides where a recipe ends, given scores: constants included."""
    cfg = OmegaConf.to_container(compose("train", list(words), None), resolve=True)
    assert isinstance(cfg, dict)
    heads = {name: section.get("head") for name, section in cfg["learners"].items()}
    return {"heads": heads} | {key: cfg[key] for key in RULE}


GRPO, PPO = "algo=grpo", "algo=ppo"
MEAN = tuple(f"reduce@updates.policy.{term}.reduce=token_mean" for term in ("surrogate", "kl"))

REDUCTIONS = [
    Reduction("bleuberi", (GRPO, *MEAN), "BLEU, on the prompts where the initial policy scores lowest"),
    Reduction(
        "co_reward",
        (GRPO, "updates.policy.surrogate.coef=2", "updates.policy.kl.coef=0.01"),
        "the majority answer to another wording; the sum of two losses is twice their mean, which moves no end",
    ),
    Reduction("lsc", (PPO,), "a sum of rewards that were shaped one by one; of one reward: the row above"),
    Reduction("mo_grpo", (GRPO,), "the weighted sum of a model's outputs"),
    Reduction("mpo", (PPO, "shaping=[missing_eos,kl_mpo]"), "a judge whose rubric another judge rewrites"),
    Reduction("oni", (PPO,), "what a small model learnt of a judge's labels"),
    Reduction("pairwise_rl", (PPO, "shaping=kl_weak"), "how likely a judge prefers the response to an anchor"),
    Reduction("pairwise_rl_rm", ("algo=sft",), "verdicts to imitate"),
    Reduction("r3", (PPO,), "relevance, length and repetition"),
    Reduction("reasoning_sql", (GRPO,), "the weighted parts of a query's reward"),
    Reduction("reward_robust", (PPO,), "nominal and worst reward of an ensemble"),
    Reduction("rewardanything", (GRPO,), "a judge's scores of the whole group"),
    Reduction("rewardanything_rm", (GRPO,), "form and order of the policy's own scores"),
    Reduction("rlpa", (PPO, "shaping=kl_small"), "a turn of a dialogue is a response"),
    Reduction("rlpa_dialogue", (PPO, "shaping=[kl_small,turns]"), "a dialogue is a response, each turn has its reward"),
    Reduction("rm_ensemble", (PPO,), "the mean of an ensemble"),
    Reduction(
        "salmon",
        (
            PPO, "shaping=[missing_eos,length_penalty,scale,kl]", "shaping.missing_eos.penalty=6", "shaping.length_penalty.rate=-0.0048828125",
            "shaping.length_penalty.free=0", "shaping.length_penalty.most=819.2", "shaping.scale.factor=10", "shaping.kl.beta=0.1", "credit.lam=1",
        ),
        "a model that reads principles; a bonus for length, and 10 times the reward at 10 times beta",
    ),
    Reduction("writing_zero_rm", (GRPO,), "form and sign of the policy's own two scores"),
]  # fmt: skip
