"""The BLEU variant that BLEUBERI trains on; it differs from sacrebleu's in smoothing, brevity and short texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rlhf_cli.rewards.per_sample import Row, by_references, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores

ORDERS = (1, 2, 3, 4)


class Bleuberi:
    """Smoothed BLEU in [0, 1]: BP * (p_1 p_2 p_3 p_4)^(1/4) with p_n = (matches_n + 1) / (n-grams_n + 1) for every n.

    Matches are clipped against all references, tokens are sacrebleu's 13a, case counts. BP = min(1, exp(1 - r/c)) with
    r the *shortest* reference. A blank response scores 0. Of a response with `<answer>` only the answer is scored.
    Because unigrams are smoothed too, one wrong word scores (1/2)^(1/4) = 0.84 against a one-word reference.
    See Chang et al., BLEUBERI: BLEU is a surprisingly effective reward for instruction following, arXiv:2505.11080;
    smoothing: Lin and Och, ORANGE, COLING 2004.
    """

    needs_references = True
    pooled = True

    def __init__(self, *, answer_tag: bool) -> None:
        """Args:
        answer_tag: score only the text inside <answer>...</answer> where a response has it
        """
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

        self.answer_tag = answer_tag
        self.tokens = Tokenizer13a()

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One score per response, in order."""
        return by_references(samples, self._prepare)

    def _prepare(self, references: tuple[str, ...]) -> Callable[[str], float]:
        texts = [self.tokens(r).split() for r in references]
        allowed: Counter[tuple[str, ...]] = Counter()
        for words in texts:
            allowed |= _ngrams(words)
        shortest = min(map(len, texts))

        def score(response: str) -> float:
            text = inside_answer(response) if self.answer_tag else response.strip()
            return smoothed_bleu(self.tokens(text).split(), allowed, shortest)

        return score


def smoothed_bleu(words: Sequence[str], allowed: Counter[tuple[str, ...]], shortest: int) -> float:
    """BLEU of one tokenised response: `allowed` is each n-gram's largest count in one reference."""
    if not words or not shortest:
        return 0.0
    matches = dict.fromkeys(ORDERS, 0)
    for ngram, count in _ngrams(words).items():
        matches[len(ngram)] += min(count, allowed[ngram])
    precisions = [(matches[n] + 1) / (max(len(words) - n + 1, 0) + 1) for n in ORDERS]
    brevity = min(1.0, math.exp(1 - shortest / len(words)))
    return brevity * math.prod(precisions) ** (1 / len(ORDERS))


def inside_answer(text: str) -> str:
    """The text of the first `<answer>`, closed or cut off; the whole text where there is none."""
    _, tag, rest = text.partition("<answer>")
    inside = rest.partition("<answer>")[0].partition("</answer>")[0]
    return (inside if tag else text).strip()


def _ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for n in ORDERS for i in range(len(words) - n + 1))
