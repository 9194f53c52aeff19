"""What stands in, under `debug.stand_ins`, for models that a recipe needs and nobody named: tiny random ones. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_cli.config import check_node
from rlhf_cli.errors import ConfigError

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


def notes(cfg: Any) -> list[str]:
    """One sentence for the plan where a random model stands in."""
    names = [key for key, node in _models(cfg) if str(node.get("path") or "").startswith(PREFIX)]
    return (
        [f"{', '.join(names)}: a random tiny model stands in (debug.stand_ins); its numbers mean nothing"]
        if names
        else []
    )


def _unnamed(cfg: Any) -> Iterator[tuple[str, Any]]:
    return ((key, node) for key, node in _models(cfg) if not node["path"])


def _models(cfg: Any) -> Iterator[tuple[str, Any]]:
    """(key, node) of every model that is read by path: of rewards, of `frozen`, of a soup."""
    yield from ((f"frozen.{name}", section) for name, section in cfg.frozen.items())
    if cfg.model.reference == "soup":
        yield "model.soup", cfg.model.soup
    for name, node in (cfg.reward or {}).items():
        if isinstance(node, Mapping) and "path" in node and _loads_model(cfg, node, f"reward.{name}"):
            yield f"reward.{name}", node


def _loads_model(cfg: Any, node: Mapping[str, Any], key: str) -> bool:
    try:
        signature, _ = check_node(node, key, allow=cfg.allow_targets, reserved=("weight",))
    except ConfigError:
        return False  # the planner says what is wrong
    return bool(signature.flags.get("loads_model"))
