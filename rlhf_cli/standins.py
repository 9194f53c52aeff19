"""What stands in, under `debug.stand_ins`, for models that a recipe needs and nobody named: tiny random ones, and a rule for a judge.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_cli.config import check_node
from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.judge import configured

PREFIX = "tiny:"  # tiny:SEED is the random two-layer model of that seed


def seed_of(path: str) -> int | None:
    """The seed of a path `tiny:SEED`; None for any other path. Raises ConfigError where SEED is no number."""
    if not path.startswith(PREFIX):
        return None
    seed = path.removeprefix(PREFIX)
    if not seed.isdecimal():
        raise ConfigError(f"{path!r}: a random model is named tiny:SEED, e.g. tiny:1")
    return int(seed)


def fill(cfg: Any) -> None:
    """Give every model of a reward that has an empty path a random tiny model of its own; paths that are given stay."""
    if cfg.debug.get("stand_ins"):
        for seed, (_, node) in enumerate(_unnamed(cfg), 1):
            node["path"] = f"{PREFIX}{seed}"
        if not configured(cfg.judge) and any(_flag(cfg, node, key, "asks_judge") for key, node in _rewards(cfg)):
            cfg.judge.backend = "rule"


def notes(cfg: Any) -> list[str]:
    """One sentence for the plan where a random model stands in."""
    names = [key for key, node in _models(cfg) if str(node.get("path") or "").startswith(PREFIX)]
    said = []
    if names:
        said = [f"{', '.join(names)}: a random tiny model stands in (debug.stand_ins); its numbers mean nothing"]
    if cfg.judge.backend == "rule" and cfg.debug.get("stand_ins"):
        said.append("judge: a rule answers without reading (debug.stand_ins); its numbers mean nothing")
    return said


def _unnamed(cfg: Any) -> Iterator[tuple[str, Any]]:
    return ((key, node) for key, node in _models(cfg) if not node["path"])


def _models(cfg: Any) -> Iterator[tuple[str, Any]]:
    """(key, node) of every reward that loads a model by path."""
    return ((key, node) for key, node in _rewards(cfg) if "path" in node and _flag(cfg, node, key, "loads_model"))


def _rewards(cfg: Any) -> Iterator[tuple[str, Any]]:
    nodes = ((f"reward.{name}", node) for name, node in (cfg.reward or {}).items())
    return ((key, node) for key, node in nodes if isinstance(node, Mapping))


def _flag(cfg: Any, node: Mapping[str, Any], key: str, flag: str) -> bool:
    try:
        signature, _ = check_node(node, key, allow=cfg.allow_targets, reserved=("weight",))
    except ConfigError:
        return False  # the planner says what is wrong
    return bool(signature.flags.get(flag))
