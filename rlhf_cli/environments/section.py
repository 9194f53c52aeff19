"""The `environment` section: checked for the plan, and built. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_cli.config import build, check_node, nearest
from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.judge import check_section, describe
from rlhf_cli.plan_reward import wants
from rlhf_cli.rewards.nodes import RESERVED, reward_nodes
from rlhf_cli.signature import Signature

OWN = ("rows", "turns")  # keys that every environment's section has besides its own settings
FORMS = ("episode", "turn")


def chosen(cfg: Any) -> bool:
    """Whether the policy talks to somebody."""
    return bool(cfg.environment)


def check(cfg: Any, source: str) -> Signature | None:
    """The environment's signature, after the checks that need no model; None without one."""
    asked = [node.name for node in reward_nodes(cfg) if _flag(cfg, node.settings, node.key)]
    if not chosen(cfg):
        if asked:
            raise ConfigError(
                f"reward={asked[0]}: there is no environment; type environment=NAME (rlhf list environment)"
            )
        return None
    env = cfg.environment
    if source != "sampled":
        raise ConfigError("environment: recorded responses answer nobody; type source=sampled, or environment=none")
    for key in OWN:
        if env.get(key) is None:
            raise ConfigError(f"environment.{key}: missing; type environment.{key}={'episode' if key == 'rows' else 4}")
    if env["rows"] not in FORMS:
        raise ConfigError(
            f"environment.rows: {env['rows']!r} is not allowed; choose one of {', '.join(FORMS)}{nearest(str(env['rows']), FORMS)}"
        )
    if wants(cfg).prepass or cfg.dataset.hardest:
        raise ConfigError(
            "environment: a prepass compares with single responses of the initial policy; type environment=none, or a shaping without references"
        )
    if not isinstance(env["turns"], int) or env["turns"] < 1:
        raise ConfigError(f"environment.turns: {env['turns']} is not allowed; type a whole number from 1 on")
    sig = check_node(env, "environment", allow=cfg.allow_targets, reserved=OWN)[0]
    if sig.flags.get("asks_judge"):
        check_section(cfg.judge)
    return sig


def does(cfg: Any) -> str:
    """What the source does, for the plan."""
    name = cfg.environment["_target_"].rpartition(".")[2]
    k, turns = cfg.batch.samples, cfg.environment["turns"]
    if cfg.environment["rows"] == "turn":
        return f"up to {turns} turns with {name}, {k} candidates each; the best rewarded one goes on"
    return f"{k} dialogues with {name} from each prompt, up to {turns} turns"


def models(cfg: Any) -> dict[str, str]:
    """What it asks, for the plan."""
    if not chosen(cfg) or not check_node(cfg.environment, "environment", allow=cfg.allow_targets, reserved=OWN)[
        0
    ].flags.get("asks_judge"):
        return {}
    return {"judge": describe(cfg.judge)}


def make(cfg: Any) -> Any:
    """The environment, with the judge that it asks; None without one."""
    if not chosen(cfg):
        return None
    environment: Any = build(cfg.environment, "environment", allow=list(cfg.allow_targets), reserved=OWN)
    if getattr(environment, "asks_judge", False):
        from rlhf_cli.judges.judge import judge_of

        environment.connect(judge_of(cfg))
    return environment


def _flag(cfg: Any, node: Mapping[str, Any], key: str) -> bool:
    return bool(check_node(node, key, allow=cfg.allow_targets, reserved=RESERVED)[0].flags.get("needs_environment"))
