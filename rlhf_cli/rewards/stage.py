"""From the configuration to the stage that scores a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rlhf_cli import gates, plan_reward, stages
from rlhf_cli.detectors import Detectors
from rlhf_cli.engine.comm import Comm
from rlhf_cli.flow import Plan
from rlhf_cli.prepass import Prepass
from rlhf_cli.rewards.joining import Joining
from rlhf_cli.rewards.nodes import reward_nodes, slot
from rlhf_cli.state import Builder
from rlhf_cli.types import Experience


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


def make_detectors(cfg: Any, scorer: Any) -> Detectors:
    """What looks at every scored step for signs of hacking, with the weights of the rewards and of those of form alone."""
    forms: dict[str, float] = {}
    for name, (weight, part) in scorer.scorers.items():
        made = getattr(part, "scorer", part)  # what runs in worker processes
        forms |= {name: weight} if getattr(made, "of_format", False) else {}
        forms |= {f"{name}/{k}": weight * w for k, w in getattr(made, "forms", {}).items()}
    return Detectors(cfg.detectors, scorer.weights, forms)


def watched(score: stages.Stage, detectors: Detectors, record: Any, join: Joining) -> stages.Stage:
    """The stage, and then the detectors, whose numbers are logged under `hack/`."""

    def stage(exp: Experience) -> Experience:
        exp = score(exp)
        record.count(detectors(exp, join.told), stage="hack")
        return exp

    return stage


def held(annotate: stages.Stage, detectors: Detectors | None) -> stages.Stage:
    """The stage that asks the models, and then the detector of the KL, whose number is logged with the step."""
    if detectors is None:
        return annotate
    watch = detectors

    def stage(exp: Experience) -> Experience:
        exp = annotate(exp)
        watch.drift(exp)
        return exp

    return stage


def make_scoring(
    cfg: Any,
    plan: Plan,
    scorer: Any,
    comm: Comm,
    checks: gates.Gates,
    record: Any,
    tokenizer: Any,
    build: Builder,
    ask: Callable[[], Prepass],
) -> tuple[stages.Stage, Prepass | None]:
    """The stage that scores a step, and the prepass that it compares with, made by `ask` where one is wanted."""
    if scorer is None:
        return stages.keep, None
    compared = plan_reward.wants(cfg).prepass
    prepass = ask() if compared or cfg.dataset.hardest else None
    join = make_joining(cfg, plan, scorer, prepass if compared else None, tokenizer, record.count, build)
    count, took = partial(record.count, stage="component"), partial(record.count, stage="time")
    score = stages.scoring(scorer, comm, cfg.gates.failures, checks.reward, count, record.note, took, join)
    score = watched(score, build.keep("detectors", make_detectors(cfg, scorer)), record, join)
    brought = {c: f"{name}/{c}" for name, (_, s) in scorer.scorers.items() for c in getattr(s, "columns", "").split()}
    score = stages.filling(score, brought) if brought else score
    score = stages.shuffled(score, cfg.seed) if cfg.debug.get("shuffled_reward") else score
    return (stages.baselined(score, record.count) if plan.greedy else score), prepass
