"""From the configuration to the reward of a run."""

from __future__ import annotations

from typing import Any

from rlhf_cli.config import build, check_node
from rlhf_cli.hardware import reward_processes
from rlhf_cli.rewards.combine import Combined
from rlhf_cli.rewards.pool import Pooled, Workers
from rlhf_cli.types import Scorer


def make_scorer(cfg: Any) -> Combined | None:
    """The weighted sum of the chosen rewards; those that say so run in worker processes, which all of them share."""
    workers = Workers(reward_processes(cfg), cfg.reward_workers.timeout)
    built: dict[str, tuple[float, Scorer]] = {}
    for name, node in (cfg.reward or {}).items():
        if not node:
            continue
        settings: Any = {"key": f"reward.{name}", "allow": list(cfg.allow_targets), "reserved": ("weight",)}
        scorer: Any = build(node, **settings)
        if getattr(scorer, "pooled", False):
            sig, bound = check_node(node, **settings)
            scorer = Pooled(name, scorer, (sig.target, bound), workers)
        if getattr(scorer, "asks_judge", False):
            from rlhf_cli.judges.judge import judge_of

            scorer.connect(judge_of(cfg))
        built[name] = float(node.get("weight", 1.0)), scorer
    return Combined(built) if built else None
