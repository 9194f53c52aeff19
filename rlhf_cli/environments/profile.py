"""What a turn says about the user: an inferred profile and a reply, and how the profile is measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_FORM = re.compile(r"<profile>\n(.*?)</profile>\n\n<response>\n(.*?)</response>", re.S)


class Said(NamedTuple):
    """A turn in the wanted form."""

    profile: tuple[str, ...]
    reply: str


def parse(text: str) -> Said | None:
    """The parts of `<profile>\\n...</profile>\\n\\n<response>\\n...</response>`, exact to the newline; None for any other text."""
    match = _FORM.fullmatch(text.strip())
    if match is None or "<profile>" in match[1] or "<response>" in match[2]:
        return None
    return Said(tuple(points(match[1])), match[2].strip())


def bare(text: str) -> str:
    """What the user reads: the reply without the profile."""
    said = parse(text)
    return text if said is None else said.reply


def points(text: str) -> list[str]:
    """The lines that say something, without their dashes. A trailing newline is no point."""
    lines = (line.strip().removeprefix("-").strip() for line in text.splitlines())
    return [line for line in lines if line]


def f1(hits: int, inferred: int, gold: int) -> float:
    """2 P R / (P + R) with P = hits / inferred and R = hits / gold; 0 without a hit. More hits than either has are cut."""
    hits = min(hits, inferred, gold)
    if hits <= 0:
        return 0.0
    precision, recall = hits / inferred, hits / gold
    return 2 * precision * recall / (precision + recall)


def equal_points(inferred: Sequence[str], gold: Sequence[str]) -> int:
    """How many points of the gold profile stand among the inferred ones, word for word but for case and blanks."""
    return len({_plain(x) for x in inferred} & {_plain(x) for x in gold})


def words(text: str) -> set[str]:
    """The words of a text, in lower case."""
    return set(re.findall(r"[a-z0-9']+", text.lower()))


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")
