"""Sentence BLEU as sacrebleu computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.per_sample import Row, by_references, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores


class Bleu:
    """Sentence BLEU in [0, 1]: BP * exp(mean_n log p_n), clipped against all references, BP by the closest length.

    Equals `sacrebleu --sentence-level` / 100 with the settings below. The empty response scores 0.
    See Papineni et al., BLEU: a Method for Automatic Evaluation of Machine Translation, ACL 2002; smoothing: Chen and
    Cherry, WMT 2014; Post, A Call for Clarity in Reporting BLEU Scores, arXiv:1804.08771.
    """

    needs_references = True
    pooled = True

    def __init__(
        self,
        *,
        smooth: Literal["exp", "floor", "add-k", "none"],
        smooth_value: float | None,
        max_order: int,
        effective_order: bool,
        tokenize: Literal["13a", "intl", "char", "zh", "none"],
        lowercase: bool,
    ) -> None:
        """Args:
        smooth: what an n-gram order without any match counts as
        smooth_value: constant of floor (empty: 0.1) and add-k (empty: 1)
        max_order: longest n-gram, words
        effective_order: leave out orders longer than the response; off, a response under max_order words scores 0
        tokenize: sacrebleu tokenizer (13a for Western text, char or zh for Chinese)
        lowercase: ignore case
        """
        if max_order < 1:
            raise ConfigError(f"reward.bleu.max_order: {max_order} is not allowed; type a number from 1, usually 4")
        self.smooth, self.smooth_value, self.max_order = smooth, smooth_value, max_order
        self.effective_order, self.tokenize, self.lowercase = effective_order, tokenize, lowercase

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One score per response, in order."""
        return by_references(samples, self._prepare)

    def _prepare(self, references: tuple[str, ...]) -> Callable[[str], float]:
        from sacrebleu.metrics.bleu import BLEU

        metric = BLEU(
            lowercase=self.lowercase,
            tokenize=self.tokenize,
            smooth_method=self.smooth,
            smooth_value=self.smooth_value,
            max_ngram_order=self.max_order,
            effective_order=self.effective_order,
            references=[[r] for r in references],
        )
        # A corpus of one segment is the sentence score, and this call reuses the references' n-grams.
        return lambda response: metric.corpus_score([response], None).score / 100
