"""Sentence chrF as sacrebleu computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.per_sample import Row, by_references, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores


class Chrf:
    """Character n-gram F-score in [0, 1]: (1 + beta^2) P R / (beta^2 P + R), the best reference counts.

    P and R are means over the orders that both texts have. Works for any script, as it needs no words.
    See Popovic, chrF: character n-gram F-score for automatic MT evaluation, WMT 2015; chrF++: WMT 2017.
    """

    needs_references = True
    pooled = True

    def __init__(self, *, char_order: int, word_order: int, beta: int, lowercase: bool) -> None:
        """Args:
        char_order: longest character n-gram
        word_order: longest word n-gram added; 0 is chrF, 2 is chrF++
        beta: how much recall outweighs precision; above 1 it favours long responses
        lowercase: ignore case
        """
        if char_order < 1 or word_order < 0 or beta < 1:
            raise ConfigError(
                f"reward.chrf: char_order={char_order}, word_order={word_order}, beta={beta} are not allowed; "
                "char_order and beta start at 1, word_order at 0"
            )
        self.char_order, self.word_order, self.beta, self.lowercase = char_order, word_order, beta, lowercase

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One score per response, in order."""
        return by_references(samples, self._prepare)

    def _prepare(self, references: tuple[str, ...]) -> Callable[[str], float]:
        from sacrebleu.metrics.chrf import CHRF

        metric = CHRF(
            char_order=self.char_order,
            word_order=self.word_order,
            beta=self.beta,
            lowercase=self.lowercase,
            references=[[r] for r in references],
        )
        return lambda response: metric.corpus_score([response], None).score / 100
