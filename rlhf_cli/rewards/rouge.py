"""ROUGE F-measure with rouge_score's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlhf_cli.rewards.per_sample import Row, by_references, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores


class Rouge:
    """ROUGE F-measure in [0, 1], the best reference counts; equals `rouge_score` for every variant.

    F = 2 P R / (P + R) over unigrams, bigrams or the longest common subsequence. Tokens are lower-case [a-z0-9] runs,
    so text in another script scores 0: use chrf there. Recall alone is not offered, as verbosity maximises it.
    See Lin, ROUGE: a Package for Automatic Evaluation of Summaries, ACL workshop 2004.
    """

    needs_references = True
    pooled = True

    def __init__(self, *, variant: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"], stemmer: bool) -> None:
        """Args:
        variant: unigrams, bigrams, longest common subsequence, or that per line (rougeLsum)
        stemmer: compare Porter stems of words over three letters
        """
        self.variant, self.stemmer = variant, stemmer

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One score per response, in order."""
        from rouge_score.tokenizers import DefaultTokenizer

        tokenizer = DefaultTokenizer(self.stemmer)
        if self.variant == "rougeL":
            return by_references(samples, lambda references: _rouge_l(tokenizer, references))
        return by_references(samples, lambda references: _library(tokenizer, self.variant, references))


class _Remember:
    """A tokenizer that keeps its results: the library tokenises the references again for every response."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[str]] = {}

    def tokenize(self, text: str) -> list[str]:
        if text not in self.known:
            self.known[text] = self.tokenizer.tokenize(text)
        return self.known[text]


def _library(tokenizer: Any, variant: str, references: tuple[str, ...]) -> Callable[[str], float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([variant], tokenizer=_Remember(tokenizer))
    return lambda response: float(scorer.score_multi(references, response)[variant].fmeasure)


def _rouge_l(tokenizer: Any, references: tuple[str, ...]) -> Callable[[str], float]:
    """The same number as the library's rougeL, whose quadratic table takes 13 ms for two texts of 300 words."""
    texts = [tokenizer.tokenize(r) for r in references]

    def score(response: str) -> float:
        words = tokenizer.tokenize(response)
        # With n words of overlap P = n/|words| and R = n/|text|, so 2 P R / (P + R) = 2 n / (|words| + |text|).
        return max(2 * common_subsequence(text, words) / max(len(text) + len(words), 1) for text in texts)

    return score


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table per big integer.

    See Hyyro, Bit-Parallel LCS-length Computation Revisited, AWOCA 2004.
    """
    where: dict[str, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        hit = row & where.get(word, 0)
        row = ((row + hit) | (row - hit)) & full
    return len(a) - row.bit_count()
