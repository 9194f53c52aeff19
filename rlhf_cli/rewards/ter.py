"""1 - TER as sacrebleu computes it per sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rlhf_cli.rewards.per_sample import Row, by_references, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores


class Ter:
    """1 - edits / words of the reference, at most 1, the best reference counts; negative where a response is all wrong and long.

    Edits are insertions, deletions, substitutions and shifts of a phrase, one each. See Snover et al., A Study of Translation Edit
    Rate with Targeted Human Annotation, AMTA 2006; as a reward: Ramamurthy et al., arXiv:2210.01241 (GRUE).
    """

    needs_references = True
    pooled = True

    def __init__(self, *, lowercase: bool, punctuation: bool) -> None:
        """Args:
        lowercase: ignore case
        punctuation: punctuation counts
        """
        self.lowercase, self.punctuation = lowercase, punctuation

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One score per response, in order."""
        return by_references(samples, self._prepare)

    def _prepare(self, references: tuple[str, ...]) -> Callable[[str], float]:
        from sacrebleu.metrics.ter import TER

        metric = TER(case_sensitive=not self.lowercase, no_punct=not self.punctuation)
        return lambda response: max(1 - metric.sentence_score(response, [r]).score / 100 for r in references)
