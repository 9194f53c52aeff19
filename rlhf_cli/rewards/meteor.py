"""METEOR as nltk computes it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.per_sample import Row, by_references, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores

_TOKEN = re.compile(r"\w+|[^\w\s]")


class Meteor:
    """METEOR in [0, 1): F (1 - gamma (chunks/matches)^beta), F = P R / (alpha P + (1 - alpha) R); the best reference counts.

    Words match exactly, then by Porter stem, then, only with `synonyms`, by WordNet; that corpus is a download, so
    without it this is the exact and stem variant. Case is ignored. A text of n words against itself scores
    1 - gamma / n^beta, not 1. The empty response scores 0.
    See Lavie and Agarwal, METEOR: an Automatic Metric for MT Evaluation, WMT 2007.
    """

    needs_references = True
    pooled = True

    def __init__(self, *, alpha: float, beta: float, gamma: float, synonyms: bool) -> None:
        """Args:
        alpha: weight of recall against precision in F, in [0, 1]; 0.9 favours recall
        beta: exponent of the penalty for scattered matches
        gamma: largest penalty for scattered matches, in [0, 1]
        synonyms: match WordNet synonyms too; off is the exact and stem variant, which needs no corpus
        """
        if not (0 <= alpha <= 1 and 0 <= gamma <= 1 and beta >= 0):
            raise ConfigError(
                f"reward.meteor: alpha={alpha}, beta={beta}, gamma={gamma} are not allowed; "
                "alpha and gamma lie in [0, 1], beta starts at 0; usually 0.9, 3, 0.5"
            )
        self.parameters = {"alpha": alpha, "beta": beta, "gamma": gamma}
        self.wordnet = _wordnet() if synonyms else _NoSynonyms()

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One score per response, in order."""
        return by_references(samples, self._prepare)

    def _prepare(self, references: tuple[str, ...]) -> Callable[[str], float]:
        from nltk.translate.meteor_score import meteor_score

        texts = [words(r) for r in references]
        settings: Any = {"stemmer": _stems(), "wordnet": self.wordnet, **self.parameters}
        return lambda response: float(meteor_score(texts, words(response), **settings))


def words(text: str) -> list[str]:
    """Runs of letters and digits, and every other visible character."""
    return _TOKEN.findall(text)


def plain_meteor() -> Callable[[list[str], list[str]], float]:
    """METEOR of (reference, hypothesis) as lists of words, with the usual 0.9, 3 and 0.5; exact and stem matches."""
    from nltk.translate.meteor_score import single_meteor_score

    settings: Any = {"stemmer": _stems(), "wordnet": _NoSynonyms(), "alpha": 0.9, "beta": 3.0, "gamma": 0.5}
    return lambda reference, hypothesis: float(single_meteor_score(reference, hypothesis, **settings))


class _NoSynonyms:
    """A WordNet in which no word has a sense."""

    def synsets(self, word: str) -> list[Any]:
        return []


@lru_cache(maxsize=1)
def _stems() -> Any:
    """nltk's Porter stemmer with a memory: it takes 20 us a word, and texts repeat their words."""
    from nltk.stem import PorterStemmer
    from nltk.stem.api import StemmerI

    class Remember(StemmerI):
        stem = staticmethod(lru_cache(maxsize=1 << 16)(PorterStemmer().stem))

    return Remember()


def _wordnet() -> Any:
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise ConfigError(
            "reward.meteor.synonyms=true: the WordNet corpus is not on this machine; type python -m nltk.downloader "
            "wordnet, or reward.meteor.synonyms=false for the exact and stem variant"
        ) from None
    return wordnet
