"""Rewards that are a rule about the text: length, a regular expression, an exact match."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.per_sample import Row, by_references, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores


class Length:
    """1 within `slack` of the target length n*, falling linearly: 1 - min(max(|n - n*| - slack, 0) / n*, 1)."""

    def __init__(self, *, unit: Literal["words", "characters"], target: int, slack: int) -> None:
        """Args:
        unit: what is counted: words (separated by white space) or characters
        target: length that scores 1, in units
        slack: distance from the target that still scores 1, in units
        """
        if target < 1 or slack < 0:
            raise ConfigError(
                f"reward.length: target={target}, slack={slack} are not allowed; target starts at 1, slack at 0"
            )
        self.unit, self.target, self.slack = unit, target, slack

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        lengths = [len(s.response.split() if self.unit == "words" else s.response) for s in samples]
        return scored(Row(1 - min(max(abs(n - self.target) - self.slack, 0) / self.target, 1)) for n in lengths)


class Regex:
    """1 where the pattern matches the response, else 0. A pattern with nested repeats can take exponential time."""

    pooled = True  # for the time-out

    def __init__(
        self, *, pattern: str, mode: Literal["fullmatch", "search"], ignore_case: bool, dotall: bool, multiline: bool
    ) -> None:
        """Args:
        pattern: Python regular expression
        mode: fullmatch (the whole response) or search (anywhere in it)
        ignore_case: letters match in either case
        dotall: the dot matches a newline too
        multiline: ^ and $ match at every line
        """
        if not pattern:
            raise ConfigError("reward.regex.pattern is empty; type reward.regex.pattern='REGULAR EXPRESSION'")
        chosen = {re.IGNORECASE: ignore_case, re.DOTALL: dotall, re.MULTILINE: multiline}
        flags = sum(flag for flag, on in chosen.items() if on)
        try:
            compiled = re.compile(pattern, flags)
        except re.error as e:
            raise ConfigError(
                f"reward.regex.pattern: {pattern!r} is not a regular expression: {e}; type reward.regex.pattern=..."
            ) from None
        self.match = compiled.fullmatch if mode == "fullmatch" else compiled.search

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One score per response, in order."""
        return (Row(1.0 if self.match(s.response) else 0.0) for s in samples)


class ExactMatch:
    """1 where the normalised response equals a normalised reference, else 0; white space is always collapsed.

    All three settings on is the normalisation of Rajpurkar et al., SQuAD, arXiv:1606.05250.
    """

    needs_references = True

    def __init__(self, *, ignore_case: bool, ignore_punctuation: bool, ignore_articles: bool) -> None:
        """Args:
        ignore_case: compare in lower case
        ignore_punctuation: drop ASCII punctuation
        ignore_articles: drop the words a, an, the
        """
        self.case, self.punctuation, self.articles = ignore_case, ignore_punctuation, ignore_articles

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(by_references(samples, self._prepare))

    def _prepare(self, references: tuple[str, ...]) -> Callable[[str], float]:
        wanted = {self.normal(r) for r in references}
        return lambda response: float(self.normal(response) in wanted)

    def normal(self, text: str) -> str:
        """The text as it is compared; a text of nothing but ignored characters stays whole, so '!' is not ''."""
        plain = text.lower() if self.case else text
        kept = plain.translate(_NO_PUNCTUATION) if self.punctuation else plain
        kept = re.sub(r"\b(?:a|an|the)\b", " ", kept, flags=re.IGNORECASE) if self.articles else kept
        return " ".join(kept.split()) or " ".join(plain.split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
