"""A direction in the space of two rewards for each prompt, written into it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf_cli.data.record import Record
from rlhf_cli.rewards.nodes import sources


def written(records: Sequence[Record], cfg: Any) -> list[Record]:
    """The records, each with a direction in its system message and in `meta["direction"]`, where the combination wants one.

    See Wang et al., "Arithmetic Control of LLMs for Diverse User Preferences: Directional Preference Alignment with Multi-Objective
    Rewards", arXiv:2402.18571, section 3.
    """
    rule: Mapping[str, Any] = cfg.combine or {}
    if "max_degrees" not in rule:
        return list(records)
    names = [n for n, w in sources(cfg).items() if w]
    return [_directed(r, names, float(rule["max_degrees"]), str(rule["template"]), cfg.seed) for r in records]


def unit(degrees: float) -> tuple[float, float]:
    """The direction at an angle to the first reward."""
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


def told(v: Sequence[float], names: Sequence[str], template: str) -> str:
    """What the policy reads: hundredths, rounded."""
    return template.replace("{weights}", " + ".join(f"{n}*{round(100 * x)}" for n, x in zip(names, v, strict=True)))


def _directed(record: Record, names: Sequence[str], largest: float, template: str, seed: int) -> Record:
    digest = hashlib.blake2b(f"{seed} {record.uid}".encode(), digest_size=8).digest()
    v = unit(largest * (2 * (int.from_bytes(digest, "big") / 2**64) - 1))
    text = told(v, names, template)
    first, *others = record.messages
    system = first["role"] == "system"
    head = {"role": "system", "content": f"{first['content']}\n\n{text}" if system else text}
    messages = (head, *(others if system else record.messages))
    return replace(record, messages=messages, meta={**record.meta, "direction": list(v)})
