"""Principles in words: those that are shipped, files of yours, and which of them judge a response. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.text import unit_hash


class Principle(NamedTuple):
    """What makes a response good, and the same with the opposite sense."""

    name: str
    text: str
    negative: str
    weight: float = 1.0  # how likely it is drawn
    kind: str = ""  # prompts of this kind draw it almost surely
    always: bool = False  # shown with every response, never drawn


PACKAGED = (
    Principle("honest", "It states what is true and says where it is unsure.", "It states things with more certainty than is due.", 3),
    Principle("helpful", "It does what was asked, fully.", "It leaves part of what was asked undone.", 4),
    Principle("clear", "Its order and words are easy to follow.", "Its order and words are hard to follow.", 2),
    Principle("specific", "It gives details and examples where they help.", "It stays general and gives no example.", 2),
    Principle("aware", "It takes the asker's situation into account.", "It ignores the asker's situation.", 1),
    Principle("reasoning", "Its steps and numbers are right.", "Its steps or numbers are wrong.", 1, "reasoning"),
    Principle("harmless", "It gives no help with harming anybody.", "It helps with harming somebody.", 1, "red_team"),
    Principle("fair", "It treats all people with the same respect.", "It treats some people with less respect.", 1),
    Principle("modest", "It does not praise itself.", "It praises itself.", always=True),
    Principle("direct", "It lists no steps or pros and cons unasked.", "It lists steps or pros and cons unasked.", always=True),
    Principle("concise", "It is no longer than it needs to be.", "It is longer than it needs to be.", always=True),
)  # fmt: skip


def principles_of(value: str) -> tuple[Principle, ...]:
    """Those shipped (`packaged`), or of a file with a JSON object per line: name, text, and negative, weight, kind, always if wanted."""
    if value == "packaged":
        return PACKAGED
    file, key = Path(value).expanduser(), f"reward.principles.principles={value}"
    if not file.is_file():
        raise ConfigError(f"{key}: no such file; type packaged, or a file of JSON lines")
    found = []
    for n, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                found.append(Principle(**{"negative": "", **json.loads(line)}))
                good = bool(found[-1].text) and float(found[-1].weight) >= 0
            except (TypeError, ValueError):
                good = False
            if not good:
                raise ConfigError(
                    f"{key}, line {n}: wanted an object with name, text, and if you like negative, weight (0 or more), kind, always"
                )
    if len({p.name for p in found}) < len(found):
        raise ConfigError(f"{key}: two principles have one name; give each its own")
    return tuple(found)


def drawn(principles: Sequence[Principle], n: int, kind: str, boost: float, *where: object) -> list[Principle]:
    """`n` principles without replacement, each next one with probability weight / (weights that are left), then those always shown.

    A principle of the prompt's kind weighs `boost` more. The order u^(1 / weight), u a hash of `where` and the name, gives exactly
    these probabilities (Efraimidis and Spirakis, Weighted random sampling with a reservoir, 2006).
    """
    open_to = [p for p in principles if not p.always]
    weights = {p.name: p.weight + (boost if kind and p.kind == kind else 0.0) for p in open_to}
    keys = {name: unit_hash("principles", *where, name) ** (1 / w) for name, w in weights.items() if w > 0}
    chosen = sorted((p for p in open_to if p.name in keys), key=lambda p: -keys[p.name])[:n]
    return chosen + [p for p in principles if p.always]
