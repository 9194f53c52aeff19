"""From the configuration to the stage that scores a step."""

from __future__ import annotations

from functools import partial
from typing import Any

from rlhf_cli import gates, plan_reward, stages
from rlhf_cli.engine.comm import Comm
from rlhf_cli.flow import Plan
from rlhf_cli.prepass import Prepass
from rlhf_cli.rewards.joining import Joining
from rlhf_cli.rewards.nodes import reward_nodes, slot
from rlhf_cli.state import Builder
from rlhf_cli.types import Scorer


def make_joining(
    cfg: Any, plan: Plan, scorer: Any, prepass: Prepass | None, tokenizer: Any, count: Any, build: Builder
) -> Joining:
    """How the rewards of a step become its score; `build` remembers what has state."""
    build.keep("combine", scorer.chosen)
    slots = {  # every member and part has shapers of its own: they may remember
        name: [build(v, f"reward.{name}.shaping.{k}") for k, (_, v) in slot(node).items()]
        for node in reward_nodes(cfg)
        for name in node.sources
    }
    rule = cfg.combine or {}
    return Joining(
        scorer.weights, scorer.chosen, slots, rule.get("center", "none"), rule.get("scale", "none"),
        references=prepass.references if prepass is not None else None, keep_references=plan_reward.wants(cfg).combined,
        tokenizer=tokenizer, reads_tokens=any("reward" in s.needs for s in plan.stages), count=count,
    )  # fmt: skip


def make_scoring(
    cfg: Any, plan: Plan, scorer: Scorer | None, comm: Comm, checks: gates.Gates, record: Any, join: Joining | None
) -> stages.Stage:
    """The stage that scores a step."""
    if scorer is None:
        return stages.keep
    count = partial(record.count, stage="component")
    took = partial(record.count, stage="time")
    score = stages.scoring(scorer, comm, cfg.gates.failures, checks.reward, count, record.note, took, join)
    score = stages.shuffled(score, cfg.seed) if cfg.debug.get("shuffled_reward") else score
    return stages.baselined(score, record.count) if plan.greedy else score
