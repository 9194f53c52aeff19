"""A reward for being right that depends on length: short when right, long when wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.per_sample import Row, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores


class CosineLength:
    """low + (high - low) (1 + cos(pi min(L / limit, 1))) / 2 of the length L: `right` for right responses, `wrong` for others.

    Right ones fall from the larger bound to the smaller one as they grow; wrong ones rise from the smaller bound, so
    that more thought costs less where it is needed. Which are right is another reward's value of at least `threshold`;
    a response that it cannot score is missing here too. Part `right`: 1 or 0.
    See Yeo et al., Demystifying Long Chain-of-Thought Reasoning in LLMs, arXiv:2502.03373, sec. 4.2.
    """

    needs_references = True
    pooled = True

    def __init__(
        self,
        *,
        judge: Mapping[str, Any],
        threshold: float,
        unit: Literal["words", "characters"],
        limit: int,
        right: list[float],
        wrong: list[float],
    ) -> None:
        """Args:
        judge: the reward that says which responses are right, as in its own option file
        threshold: smallest value of that reward that counts as right
        unit: what is counted: words (separated by white space) or characters
        limit: length from which on nothing changes, units
        right: [value of the longest, value of the shortest] right response
        wrong: [value of the shortest, value of the longest] wrong response
        """
        from rlhf_cli.config import build

        if limit < 1 or len(right) != 2 or len(wrong) != 2:
            raise ConfigError(
                f"reward.cosine_length: limit={limit}, right={list(right)}, wrong={list(wrong)} are not allowed; limit "
                "starts at 1, the others are two numbers, e.g. right=[0.5,1.0] wrong=[-1.0,-0.5]"
            )
        self.judge: Any = build(judge, "reward.cosine_length.judge", reserved=("weight",))
        if not hasattr(self.judge, "rows"):
            raise ConfigError("reward.cosine_length.judge: must be a reward that looks at one response at a time")
        self.threshold, self.unit, self.limit = threshold, unit, limit
        self.right, self.wrong = (min(right), max(right)), (min(wrong), max(wrong))

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One score per response, in order."""
        for sample, judged in zip(samples, self.judge.rows(samples), strict=True):
            if judged.value is None:
                yield judged
                continue
            right = judged.value >= self.threshold
            length = len(sample.response.split() if self.unit == "words" else sample.response)
            low, high = self.right if right else self.wrong
            near = (1 + math.cos(math.pi * min(length / self.limit, 1))) / 2  # 1 for the empty response, 0 at the limit
            yield Row(low + (high - low) * (near if right else 1 - near), {"right": float(right)})
