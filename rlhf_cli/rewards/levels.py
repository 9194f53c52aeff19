"""Levels of a response by rule: right, wrong, without an answer, without the format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.per_sample import Row, references_of, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores


class Levels:
    """Minus the level: -1 format and answer right, -2 answer wrong, -3 no answer found in the format, -4 format wrong.

    The whole response must have the format, whose first group is the answer. An answer is the set of what `answer` finds there,
    and of the same number of things as the reference's, or it is none; case and spaces do not count. A reference in which
    `answer` finds nothing makes the row missing. Component: `best`, 1 at level 1, whatever the weight of this reward.
    See Su et al., "Trust Region Preference Approximation: A simple and stable reinforcement learning algorithm for LLM reasoning",
    arXiv:2504.04524 (Knights and Knaves).
    """

    needs_references = True
    pooled = True
    columns = "best"

    def __init__(self, *, format: str, answer: str) -> None:
        """Args:
        format: regular expression of the whole response; its first group is the answer
        answer: regular expression of one part of an answer; its groups, or the whole match, are compared
        """
        self.format, self.answer = _compiled("format", format), _compiled("answer", answer)
        if not self.format.groups:
            raise ConfigError(f"reward.levels.format={format!r} has no group; put the answer in parentheses")

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One level per response, in order."""
        for sample in samples:
            wanted = [x for x in (self._parts(r) for r in references_of(sample)) if x]
            if not wanted:
                yield Row(None, reason="no reference holds an answer")
            else:
                level = self._level(sample.response, wanted)
                yield Row(-float(level), {"best": float(level == 1)})

    def _level(self, response: str, wanted: Sequence[list[str]]) -> int:
        match = self.format.fullmatch(response.strip())
        if match is None:
            return 4
        found = self._parts(match.group(1) or "")
        if not found or len(found) not in {len(x) for x in wanted}:
            return 3
        return 1 if found in wanted else 2

    def _parts(self, text: str) -> list[str]:
        """What an answer says, sorted."""
        matches = self.answer.finditer(" ".join(text.lower().split()))
        return sorted(
            {" ".join(g or "" for g in m.groups()) if m.groups() else m.group().replace(",", "") for m in matches}
        )


def _compiled(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL | re.IGNORECASE)
    except re.error as e:
        raise ConfigError(f"reward.levels.{key}={pattern!r} is no regular expression: {e}") from None
