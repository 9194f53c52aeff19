"""The final answer of a worked solution, compared by value: symbolically by math-verify, or as a number."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.per_sample import Row, references_of, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores

Extract = Literal["any", "marked"]
Judge = Callable[[str], tuple[float | None, bool]]
"""Of a response: its value (None: the references hold no answer), and whether it has an answer."""


class MathAnswer:
    """1 where the response's final answer equals a reference's, else 0; a reference without an answer is missing.

    The answer stands after the last `####` that is no heading or in the last `\\boxed{}`, whichever comes later; without them
    (extract=any) it is what the library finds last in the text. Only that span is read: hedging with two answers fails.
    method=verify compares by math-verify, so 1/2, 0.5 and \\frac{1}{2}, x+1 and 1+x, (1,2) and (1, 2) are equal;
    method=number compares final numbers as fractions. Component `found`: 1 where the response has an answer.
    See Kydlicek, Math-Verify, 2025, https://github.com/huggingface/Math-Verify; final numbers: Cobbe et al.,
    Training Verifiers to Solve Math Word Problems, arXiv:2110.14168.
    """

    needs_references = True
    pooled = True  # the library's own time-outs are alarms, which no thread may set; a worker can be killed

    def __init__(
        self, *, method: Literal["verify", "number"], extract: Literal["any", "marked"], tolerance: float
    ) -> None:
        """Args:
        method: verify (expressions, sets, intervals, units; math-verify) or number (the final number alone)
        extract: any (fall back to the last answer in the text) or marked (only #### and \\boxed count: rewards the format too)
        tolerance: largest |a - b| / max(1, |b|) of two numbers that still counts as equal; 0 is exact, for verify
            up to six decimals
        """
        if not 0 <= tolerance < 1:
            raise ConfigError(
                f"reward.math_answer.tolerance: {tolerance} is not allowed; type a number in [0, 1), usually 0"
            )
        self.method, self.extract = method, extract
        self.tolerance = Fraction(tolerance)

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One score per response, in order, each with its part `found`."""
        prepare = self._expressions if self.method == "verify" else self._numbers
        ready: tuple[tuple[str, ...], Judge] | None = None
        for sample in samples:
            references = references_of(sample)
            if not references:
                yield Row(None, {"found": None}, "it has no reference")
                continue
            if ready is None or ready[0] != references:
                ready = references, prepare(references)
            value, found = ready[1](sample.response)
            yield Row(value, {"found": float(found)}, "its references hold no answer" if value is None else "")

    def _numbers(self, references: tuple[str, ...]) -> Judge:
        golds = [g for r in references if (g := final_number(r, "any")) is not None]

        def judge(response: str) -> tuple[float | None, bool]:
            x = final_number(response, self.extract)
            equal = x is not None and any(abs(x - g) <= self.tolerance * max(1, abs(g)) for g in golds)
            return float(equal) if golds else None, x is not None

        return judge

    def _expressions(self, references: tuple[str, ...]) -> Judge:
        from rlhf_cli.rewards import expressions

        golds = [g for r in references if (g := expressions.gold(r))]

        def judge(response: str) -> tuple[float | None, bool]:
            answer = expressions.answer(response, self.extract)
            equal = any(expressions.equal(g, answer, float(self.tolerance)) for g in golds)
            return float(equal) if golds else None, bool(answer)

        return judge


_INTEGER = r"(?>[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)"
_DECIMAL = rf"(?>(?:{_INTEGER}(?:\.[0-9]++)?+|\.[0-9]++)(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?+)"
# A minus belongs to the number unless it follows an operand; a digit after a letter or ^ (H2O, cm^2) is not a number.
_NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z)\]}])(?P<minus>-))?(?:\\?[$€£](?P<minus2>-)?)?(?<![A-Za-z0-9^])(?<!\^\{)"
    rf"(?>(?P<whole>{_INTEGER})\s++(?={_INTEGER}/))?(?P<top>{_DECIMAL})(?>\s?/\s?(?P<bottom>{_DECIMAL}))?"
)
# `#### 2. Add them` is a heading, not an answer.
_MARKED = re.compile(rf"####\s*+(?>{_NUMBER.pattern})(?![.):]\s+\S)")
_UNIT = re.compile(r"\s*\\?[%$€£]$|^\$(?=.*\$$)")  # behind a number, or $ around it
_DIGITS = 100


def final_number(text: str, extract: Extract) -> Fraction | None:
    """The number that a solution ends in, or None."""
    text = _plain(text)
    marked = list(_MARKED.finditer(text))
    box = last_boxed(text)
    if marked and (box is None or marked[-1].start() > text.rfind("\\boxed{")):
        return _value(marked[-1])
    if box is not None:
        # `x = 42 km` inside a box: the number that follows the last equals sign.
        match = _NUMBER.search(box.rpartition("=")[2])
        return _value(match) if match else None
    numbers = list(_NUMBER.finditer(text)) if extract == "any" else []
    return _value(numbers[-1]) if numbers else None


def only_number(text: str) -> Fraction | None:
    """The number that a text is, perhaps with a sign of money or per cent; None where it is more than a number."""
    text = _plain(text.strip()).strip().removeprefix("+").rstrip(".")
    match = _NUMBER.fullmatch(_UNIT.sub("", text).strip())
    return _value(match) if match else None


def last_boxed(text: str) -> str | None:
    """What the last `\\boxed{...}` holds, by matching braces; None where there is none or it is cut off."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[start:i]
    return None


def _plain(text: str) -> str:
    """LaTeX fractions and separators as plain characters."""
    for old, new in (("\u2212", "-"), ("\\!", ""), ("{,}", ","), ("\\,", ","), ("\\left", ""), ("\\right", "")):
        text = text.replace(old, new)
    text = re.sub(r"(?<=[0-9])\\[dt]?frac", r" \\frac", text)
    text = re.sub(r"\\[dt]?frac\s?\{([^{}]{1,50})\}\s?\{([^{}]{1,50})\}", r"\1/\2", text)
    return re.sub(r"\\[dt]?frac\s?([0-9])\s?([0-9])", r"\1/\2", text)


def _value(match: re.Match[str]) -> Fraction | None:
    """None for a division by zero, and for digits beyond any real answer, which would be slow to convert."""
    whole, top, bottom = (match[k] for k in ("whole", "top", "bottom"))
    if len(match[0]) > _DIGITS:
        return None
    under = _fraction(bottom) if bottom else Fraction(1)
    if not under:
        return None
    x = (_fraction(whole) if whole else 0) + _fraction(top) / under
    return -x if bool(match["minus"]) != bool(match["minus2"]) else x


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))
