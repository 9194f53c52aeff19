"""The stand-in for a judge: a deterministic rule that answers every question in the right format, without reading it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from rlhf_cli.judges.ask import Ask, Quality, Reply
from rlhf_cli.judges.text import unit_hash


def by_length(text: str) -> float:
    """Longer is better: n / (n + 64) of n characters."""
    return len(text) / (len(text) + 64)


RULES: dict[str, Quality] = {"hash": unit_hash, "length": by_length}
"""Name -> how good a text is, in [0, 1)."""


class Rule:
    """Answers by a rule of `RULES`."""

    early = False

    def __init__(self, rule: str) -> None:
        self.rule = rule

    def name(self, ask: Ask) -> str:
        """The rule."""
        return f"rule:{self.rule}"

    def start(self, asks: Sequence[Ask]) -> list[Future[Reply]]:
        """Answer at once."""
        return [done(ask.stand_in(RULES[self.rule])) for ask in asks]

    def check(self, asks: Sequence[Ask]) -> None:
        """A rule is always there."""


def done(reply: Reply) -> Future[Reply]:
    """A future that holds its result."""
    future: Future[Reply] = Future()
    future.set_result(reply)
    return future
