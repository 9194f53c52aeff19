"""The rewards of a configuration one by one: named copies and ensembles unfolded, and the sources that a combination sees. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_cli.errors import ConfigError

RESERVED = ("weight", "shaping", "parts")  # keys of a reward that do not belong to its scorer
RULE_RESERVED = ("center", "scale")  # keys of a combination that do not belong to its rule


class Node(NamedTuple):
    """One scorer."""

    name: str  # of its component
    key: str  # its place in the configuration, for messages
    settings: Mapping[str, Any]

    @property
    def sources(self) -> dict[str, float]:
        """What a combination sees of it, with weights: its value, or the parts that `parts` names."""
        weight = float(self.settings.get("weight", 1.0))
        parts = self.settings.get("parts") or {}
        return {f"{self.name}/{k}": weight * float(w) for k, w in parts.items()} or {self.name: weight}


def reward_nodes(cfg: Any) -> list[Node]:
    """Every scorer. `+reward@reward.NAME=model` gives one a name of its own; a `path` that is a list gives a member for each, NAME_1, ..."""
    found: list[Node] = []
    for name, node in (cfg.reward or {}).items():
        if not node:
            continue
        key, inner = unfolded(f"reward.{name}", node)
        paths = inner.get("path")
        if isinstance(paths, Sequence) and not isinstance(paths, str):
            if not paths:
                raise ConfigError(f"{key}.path is empty; type '{key}.path=[RUN,RUN]' with as many as there are members")
            found += [Node(f"{name}_{i}", key, {**_plain(inner), "path": path}) for i, path in enumerate(paths, 1)]
        else:
            found.append(Node(str(name), key, inner))
    return found


def sources(cfg: Any) -> dict[str, float]:
    """Source -> weight, of all scorers, those of weight 0 included."""
    return {name: weight for node in reward_nodes(cfg) for name, weight in node.sources.items()}


def slot(node: Node) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Shapers of one reward alone: name -> (place in the configuration, settings)."""
    chosen = node.settings.get("shaping") or {}
    return {str(k): (f"{node.key}.shaping.{k}", v) for k, v in chosen.items() if v}


def unfolded(key: str, node: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The node itself, or the option that lies inside a name."""
    if "_target_" not in node and len(node) == 1:
        option, inner = next(iter(node.items()))
        if isinstance(inner, Mapping) and "_target_" in inner:
            return f"{key}.{option}", inner
    return key, node


def _plain(node: Mapping[str, Any]) -> dict[str, Any]:
    return {str(k): v for k, v in node.items()}
