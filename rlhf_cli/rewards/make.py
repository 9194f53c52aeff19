"""From the configuration to the reward of a run."""

from __future__ import annotations

from typing import Any

from rlhf_cli import plan_reward
from rlhf_cli.combine import weighted_sum
from rlhf_cli.config import build, check_node
from rlhf_cli.errors import ConfigError
from rlhf_cli.hardware import reward_processes
from rlhf_cli.rewards.combine import Combined
from rlhf_cli.rewards.joining import Rule
from rlhf_cli.rewards.nodes import RESERVED, RULE_RESERVED, reward_nodes
from rlhf_cli.rewards.pool import Pooled, Workers
from rlhf_cli.types import Scorer


def make_scorer(cfg: Any) -> Combined | None:
    """The chosen rewards, combined; those that say so run in worker processes, which all of them share."""
    workers = Workers(reward_processes(cfg), cfg.reward_workers.timeout)
    built: dict[str, tuple[float, Scorer]] = {}
    for node in (nodes := reward_nodes(cfg)):
        settings: Any = {"key": node.key, "allow": list(cfg.allow_targets), "reserved": RESERVED}
        sig, bound = check_node(node.settings, **settings)
        plan_reward.check_filled(cfg, node, sig)
        scorer: Any = build(node.settings, **settings)
        if getattr(scorer, "pooled", False):
            _forgets_nothing(node.key, scorer)
            scorer = Pooled(node.name, scorer, (sig.target, bound), workers)
        if getattr(scorer, "asks_judge", False):
            from rlhf_cli.judges.judge import judge_of

            scorer.connect(judge_of(cfg))
        built[node.name] = float(node.settings.get("weight", 1.0)), scorer
    weights = {name: w for node in nodes for name, w in node.sources.items()}
    return Combined(built, weights, make_rule(cfg)) if built else None


def _forgets_nothing(key: str, scorer: Any) -> None:
    """What a worker process remembers stands in no checkpoint, and is told of no step."""
    kept = next((n for n in ("state_dict", "observe") if hasattr(scorer, n)), "")
    if kept:
        how = getattr(scorer, "stays_by", f"pooled = False in {type(scorer).__name__}")
        raise ConfigError(
            f"{key}: it has `{kept}`, and what a worker process remembers stands in no checkpoint; "
            f"score in the run's own process: {how.format(key=key)}"
        )


def make_rule(cfg: Any) -> Rule:
    """How the rewards become one; a run from before there were rules has none, and adds them."""
    if not cfg.combine:
        return weighted_sum
    return build(cfg.combine, "combine", allow=list(cfg.allow_targets), reserved=RULE_RESERVED)
