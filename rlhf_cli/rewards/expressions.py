"""Mathematical answers through math-verify, without the alarms by which it limits its time. Used in worker processes."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from rlhf_cli.rewards.math_answer import Extract, last_boxed

Answer = list[Any]  # what math-verify makes of a text: expressions and their texts; empty: there is none

LONGEST = 200  # characters of a reference that is all answer
TAIL = 4000  # characters at the end of a response in which an unmarked answer is looked for

_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*+(?:(?i:answer:)[ \t]*+)?(\S[^\n]*)")
_WORDS = re.compile(
    r"(?!(?:sqrt|pi)\b(?!\s+[^\W\d_]{2}))[*_]*(?:[^\W\d_]{2,}|[0-9]+[.):]\s+\S)"
)  # how a heading begins: Step 1, 2. Add
_CURRENCY = re.compile(r"\\?[$€£]")
_PERCENT = re.compile(r"\\?%")  # 50 and 50 % are the same answer
_PI = re.compile(r"(?<![\\\w])pi\b")
_MIXED = re.compile(r"(?<![\w.])([0-9]+)\s+([0-9]+)/([0-9]+)(?![\w.])")


def gold(reference: str) -> Answer:
    """A reference's answer: its marked span, else all of it, else what is found in it."""
    span = marked(reference)
    if span is not None:
        return _span(span)
    return _span(reference) if len(reference) <= LONGEST else _search(reference)


def answer(response: str, extract: Extract) -> Answer:
    """The answer of a response: its last marked span alone; where it has none and `extract` is any, the last one in the text."""
    span = marked(response)
    if span is not None:
        return _span(span)
    cut_off = "\\boxed" in response
    return _search(response) if extract == "any" and not cut_off else []


def equal(gold: Answer, answer: Answer, tolerance: float) -> bool:
    """Whether they are the same; the order matters, as a gold inequality may be answered by an interval."""
    import math_verify

    quiet()
    if not gold or not answer:
        return False
    if math_verify.verify(gold, answer, timeout_seconds=None):
        return True
    return tolerance > 0 and _near(gold[0], answer[0], tolerance)


def marked(text: str) -> str | None:
    """What the later one holds of the last `####` line that is no heading and the last `\\boxed{}`; None where there is neither.

    A line of words is a heading where there is a box, or where more text follows it.
    """
    box, at = last_boxed(text), text.rfind("\\boxed{")
    for line in reversed(list(_HASHES.finditer(text))):
        heading = _WORDS.match(line[1]) and (box is not None or text[line.end() :].strip())
        if not heading:
            return line[1] if box is None or line.start() > at else box
    return box


def _span(span: str) -> Answer:
    """The answer in a text that is nothing but the answer."""
    span = _PI.sub(r"\\pi", span)
    plain = _PERCENT.sub("", _MIXED.sub(r"\1\\frac{\2}{\3}", _CURRENCY.sub("", span))).strip().rstrip(".")
    return _parse(rf"\boxed{{{plain}}}", _latex())


def _search(text: str) -> Answer:
    """What the library finds in running text, the last first."""
    return _parse(text[-TAIL:], _anywhere())


def _parse(text: str, targets: tuple[Any, ...]) -> Answer:
    import math_verify

    quiet()
    return math_verify.parse(text, targets, extraction_mode="first_match", parsing_timeout=None)


@lru_cache(maxsize=1)
def _latex() -> tuple[Any, ...]:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    clean = NormalizationConfig(units=True, basic_latex=True, malformed_operators=True, nits=True, boxed="all")
    return (
        LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False, normalization_config=clean),
    )


@lru_cache(maxsize=1)
def _anywhere() -> tuple[Any, ...]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    return (LatexExtractionConfig(), ExprExtractionConfig())


def _near(a: Any, b: Any, tolerance: float) -> bool:
    try:
        x, y = float(a), float(b)
    except (TypeError, ValueError):
        return False
    return abs(x - y) <= tolerance * max(1.0, abs(x))


def quiet() -> None:
    """The library warns at every call that nobody limits its time; the worker that calls it is killed instead."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
