"""From the configuration to the stages between scores and update: what a method is, without models and data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from rlhf_cli import stages
from rlhf_cli.plan import Plan, learner_sections
from rlhf_cli.state import Builder
from rlhf_cli.types import Experience, Term, Update

Count = Callable[..., None]  # (numbers, stage): what a stage counted in a step


@dataclass(frozen=True)
class Pipeline:
    """The pure part of a run; the names are those of `types.Run`."""

    select: stages.Stage
    shape: stages.Stage
    credit: stages.Stage
    updates: Mapping[str, Update]
    minibatches: Callable[[Experience, int], Iterator[Tensor]]
    lr: Callable[[str, int], float]


def make_pipeline(cfg: Any, plan: Plan, build: Builder, count: Count) -> Pipeline:
    """Build the method's functions and objects; `build` remembers those with state."""
    sections = learner_sections(cfg)
    selects = cfg.select and plan.source == "sampled" and any((cfg.reward or {}).values())
    return Pipeline(
        select=stages.selecting(build(cfg.select, "select"), count) if selects else stages.keep,
        shape=stages.shaping([build(v, f"shaping.{k}") for k, v in (cfg.shaping or {}).items() if v], count),
        credit=make_credit(cfg, plan, build, count),
        updates={name: make_update(cfg, name, section.starts_at, build) for name, section in sections.items()},
        minibatches=stages.minibatches(cfg.batch.epochs, cfg.batch.minibatches, cfg.seed),
        lr=partial(learning_rate, cfg, {n: cfg.optim.lr if x.lr is None else x.lr for n, x in sections.items()}),
    )


def make_credit(cfg: Any, plan: Plan, build: Builder, count: Count) -> stages.Stage:
    """Advantages, corrected where the recipe says so."""
    if not cfg.credit:
        return stages.keep
    credit = stages.crediting(build(cfg.credit, "credit"), cfg.gates.advantage, count)
    if not cfg.correction or plan.source != "sampled":
        return credit
    correct = stages.correcting(build(cfg.correction, "correction"), count)
    return lambda exp: correct(credit(exp))


def make_update(cfg: Any, learner: str, starts_at: int, build: Builder) -> Update:
    """The terms of one learner."""
    terms = []
    for name, node in cfg.updates[learner].items():
        if node is None:
            continue
        key = f"updates.{learner}.{name}"
        reduce = build(node["reduce"], f"{key}.reduce") if node.get("reduce") else None
        objective = build(node["objective"], f"{key}.objective")
        terms.append(Term(name, objective, reduce, float(node.get("coef", 1.0))))
    return Update(tuple(terms), starts_at)


def learning_rate(cfg: Any, peaks: Mapping[str, float], name: str, step: int) -> float:
    """Linear warm-up, then the schedule; a function of the step alone, so a resumed run needs no scheduler state."""
    warm = min(1.0, (step + 1) / (cfg.optim.warmup + 1))
    left = 1.0 - max(0, step - cfg.optim.warmup) / max(1, cfg.steps - cfg.optim.warmup)
    shape: dict[str, Callable[[float], float]] = {
        "constant": lambda x: 1.0,
        "linear": lambda x: x,
        "cosine": lambda x: 0.5 * (1 - math.cos(math.pi * x)),
    }
    return peaks[name] * warm * shape[cfg.optim.schedule](left)
