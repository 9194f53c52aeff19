"""A penalty for n-grams that come again inside a response."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.per_sample import Row, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores


class Repetition:
    """-penalty (1 - distinct n-grams / n-grams), in [-penalty, 0]; 0 for a response of fewer than n units.

    See Yeo et al., Demystifying Long Chain-of-Thought Reasoning in LLMs, arXiv:2502.03373, app. C.
    """

    pooled = True

    def __init__(
        self, *, n: int, penalty: float, unit: Literal["words", "characters", "tokens"], tokenizer: str
    ) -> None:
        """Args:
        n: length of the n-grams, units
        penalty: what a response that only repeats itself approaches
        unit: words (separated by white space, case ignored), characters, or tokens
        tokenizer: unit=tokens: a folder with tokenizer.json
        """
        if n < 1 or penalty < 0:
            raise ConfigError(
                f"reward.repetition: n={n}, penalty={penalty} are not allowed; n starts at 1, penalty at 0"
            )
        self.n, self.penalty, self.unit = n, penalty, unit
        self.tokenizer = _tokenizer(tokenizer) if unit == "tokens" else None

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One score per response, in order."""
        return (Row(0.0 - self.penalty * repeated(self._units(s.response), self.n)) for s in samples)

    def _units(self, text: str) -> Sequence[Any]:
        if self.tokenizer is not None:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        return text.lower().split() if self.unit == "words" else text


def repeated(units: Sequence[Any], n: int) -> float:
    """1 - distinct n-grams / n-grams, in [0, 1); 0 where there are none."""
    total = len(units) - n + 1
    return 1 - len({tuple(units[i : i + n]) for i in range(total)}) / total if total > 0 else 0.0


def _tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer

    file = Path(folder).expanduser() / "tokenizer.json"
    if not folder or not file.is_file():
        raise ConfigError(
            f"reward.repetition.tokenizer: {folder!r} holds no tokenizer.json; type reward.repetition.tokenizer=FOLDER, "
            "or reward.repetition.unit=words"
        )
    return Tokenizer.from_file(str(file))
