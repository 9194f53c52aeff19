"""What stands in, under `debug.stand_ins`, for models that a recipe needs and nobody named: tiny random ones, and a rule for a judge.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from rlhf_cli.config import check_node
from rlhf_cli.environments.section import OWN
from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.judge import configured
from rlhf_cli.rewards.nodes import PATHS, RESERVED, unfolded

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
    if not cfg.debug.get("stand_ins"):
        return
    seeds = count(1)
    for _, node in _models(cfg):
        for name in PATHS:
            path = node.get(name)
            if path == "":
                node[name] = f"{PREFIX}{next(seeds)}"
            elif path is not None and not isinstance(path, str):
                node[name] = [p or f"{PREFIX}{next(seeds)}" for p in path]
    if not configured(cfg.judge) and any(_flag(cfg, node, key, "asks_judge") for key, node in _askers(cfg)):
        cfg.judge.backend = "rule"


def notes(cfg: Any) -> list[str]:
    """One sentence for the plan where a random model stands in."""
    names = [key for key, node in _models(cfg) if any(p.startswith(PREFIX) for p in _paths(node))]
    said = []
    if names:
        said = [f"{', '.join(names)}: a random tiny model stands in (debug.stand_ins); its numbers mean nothing"]
    if cfg.judge.backend == "rule" and cfg.debug.get("stand_ins"):
        said.append("judge: a rule answers without reading (debug.stand_ins); its numbers mean nothing")
    return said


def _paths(node: Any) -> Iterator[str]:
    for path in (node.get(name) for name in PATHS):
        yield from [str(path or "")] if path is None or isinstance(path, str) else map(str, path)


def _models(cfg: Any) -> Iterator[tuple[str, Any]]:
    """(key, node) of every model that is read by path: of `frozen`, of a soup, of rewards."""
    yield from ((f"frozen.{name}", section) for name, section in cfg.frozen.items())
    if cfg.model.reference == "soup":
        yield "model.soup", cfg.model.soup
    yield from ((k, node) for k, node in _rewards(cfg) if "path" in node and _flag(cfg, node, k, "loads_model"))


def _rewards(cfg: Any) -> Iterator[tuple[str, Any]]:
    nodes = ((f"reward.{name}", node) for name, node in (cfg.reward or {}).items())
    return (unfolded(key, node) for key, node in nodes if isinstance(node, Mapping))


def _askers(cfg: Any) -> Iterator[tuple[str, Any]]:
    """Whatever may ask a judge: rewards, and the other party of a dialogue."""
    yield from _rewards(cfg)
    if cfg.environment:
        yield "environment", cfg.environment


def _flag(cfg: Any, node: Mapping[str, Any], key: str, flag: str) -> bool:
    one = {**node, "path": ""} if "path" in node else node  # it may be a list: a member for each
    reserved = OWN if key == "environment" else RESERVED
    try:
        signature, _ = check_node(one, key, allow=cfg.allow_targets, reserved=reserved)
    except ConfigError:
        return False  # the planner says what is wrong
    return bool(signature.flags.get(flag))
