"""Whether code passes the tests of its record, run where it can do no harm."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.per_sample import Row, scored
from rlhf_cli.rewards.sandbox import Box, Clock, NotStarted, passed, printed
from rlhf_cli.rewards.sandboxed import LARGEST, PRINTED, TooLong

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_CHECK = re.compile(r"^[ \t]*def check\b", re.MULTILINE)


class CodeTests:
    """1 where the Python code of a response passes all tests of its record (or the share that it passes), else 0.

    The code is the last fenced block, else the whole response. `meta.tests` is a text or list of texts with assertions
    on the code's functions, `meta.setup` what stands before each; `meta.entry_point` is the function that check(candidate)
    gets where a test defines it, and then the only name of the code that a test can call.
    `meta.cases` is a list of {input, output} for programs that read and print. Tests run in another process than the
    code, so that printing, exiting or forging a verdict passes none; arguments and results must be plain Python data.
    A record without tests, or with larger ones than the sandbox takes, is missing. Part `tests`: the share passed.
    See Chen et al., Evaluating Large Language Models Trained on Code, arXiv:2107.03374.
    """

    pooled = True

    def __init__(self, *, reward: Literal["all_or_nothing", "fraction"], seconds: float, memory_mb: int) -> None:
        """Args:
        reward: all_or_nothing, or the fraction of tests passed, which special cases can raise
        seconds: wall clock of a response with all its tests; the test in which it ends, and those after it, fail
        memory_mb: address space of the code, MB
        """
        if seconds <= 0 or memory_mb < 64:
            raise ConfigError(
                f"reward.code_tests: seconds={seconds}, memory_mb={memory_mb} are not allowed; seconds are above 0, memory_mb starts at 64"
            )
        self.whole, self.box = reward == "all_or_nothing", Box(seconds, memory_mb << 20)

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One score per response, in order."""
        return (self._row(s) for s in samples)

    def _row(self, sample: Sample) -> Row:
        tests, cases = _tests(sample.meta), list(sample.meta.get("cases") or [])
        if not tests and not cases:
            return Row(None, reason="its record has no tests: map dataset.columns.meta.tests, or meta.cases")
        if any(len(str(c["output"])) > PRINTED for c in cases):
            return Row(None, reason=f"its tests are too large: a program may print {PRINTED} characters")
        try:
            results = self._results(code_of(sample.response), tests, cases, sample.meta)
        except NotStarted as e:
            return Row(None, reason=str(e))
        except TooLong:
            results = [None]
        if None in results:
            return Row(
                None,
                reason=f"its tests are too large: all of them, an input, and an argument may take {LARGEST >> 20} MB each",
            )
        share = sum(map(bool, results)) / len(results)
        return Row(float(share == 1) if self.whole else share, {"tests": share})

    def _results(
        self, code: str, tests: list[str], cases: list[Mapping[str, Any]], meta: Mapping[str, Any]
    ) -> list[bool | None]:
        setup, entry = (str(meta.get(k) or "") for k in ("setup", "entry_point"))
        clock = Clock(self.box.seconds)
        results = passed(code, tests, setup, entry, self.box, clock) if tests else []
        return results + [_right(printed(code, str(c["input"]), self.box, clock), str(c["output"])) for c in cases]


def code_of(response: str) -> str:
    """The last fenced block, or the whole response."""
    blocks = _FENCE.findall(response)
    return blocks[-1] if blocks else response


def _tests(meta: Mapping[str, Any]) -> list[str]:
    given = meta.get("tests") or []
    tests = [given] if isinstance(given, str) else [str(t) for t in given]
    entry, setup = meta.get("entry_point"), str(meta.get("setup") or "")
    return [f"{t}\ncheck({entry})" if entry and _CHECK.search(f"{setup}\n{t}") else t for t in tests]


def _right(said: str | None, wanted: str) -> bool:
    """Equal lines, blank space at their ends and blank lines at the end aside."""
    if said is None:
        return False
    a, b = ([line.rstrip() for line in t.rstrip().splitlines()] for t in (said, wanted))
    return a == b
