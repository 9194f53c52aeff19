"""Whether a query returns what the gold query returns, on the record's own database."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from rlhf_cli.rewards.per_sample import Row, references_of, scored
from rlhf_cli.rewards.sqlite import Compare, Limits, Result, connect, limits_of, query_of, run, same

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores


class SqlExecution:
    """1 where the response's query returns what a reference's query returns, else 0, on an SQLite database read-only.

    The query is the last ```sql block, else the last <answer>, else the whole response. A query that fails, or exceeds
    instructions or rows, scores 0. Missing: a record without database, a gold query that fails, the wall clock, memory. Part
    `runs`: 1 where the query runs. ordered compares in order where the gold query ends in a top-level ORDER BY.
    See Li et al., Can LLM Already Serve as a Database Interface? (BIRD), arXiv:2305.03111 (execution accuracy: set).
    """

    needs_references = True
    pooled = True

    def __init__(
        self,
        *,
        compare: Literal["set", "multiset", "ordered"],
        empty: Literal["unequal", "equal", "missing"],
        folder: str,
        instructions: int,
        seconds: float,
        rows: int,
    ) -> None:
        """Args:
        compare: rows as a set (BIRD: a missing DISTINCT is invisible), multiset, or ordered (a multiset without ORDER BY)
        empty: what two empty results are: unequal (as in Reasoning-SQL), equal, or missing
        folder: where `meta.database` of the records lies; packaged: the databases of dataset=sql
        instructions: largest work of a query, virtual-machine instructions of SQLite; the same on every machine
        seconds: wall clock of a query, a safety net
        rows: largest result
        """
        self.compare, self.empty, self.folder = compare, empty, folder
        self.limits: Limits = limits_of("reward.sql_execution", instructions, seconds, rows)

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One score per response, in order."""
        return (self._row(s) for s in samples)

    def _row(self, sample: Sample) -> Row:
        found = compared(sample, self.folder, self.compare, self.limits)
        if isinstance(found, str):
            return Row(None, reason=found)
        result, golds = found
        runs = {"runs": float(not result.error)}
        if result.late:
            return Row(None, runs, result.error)
        if result.error:
            return Row(0.0, runs)
        if not result.rows and self.empty != "equal" and any(not g.rows for g, _ in golds):
            return Row(None, runs, "both results are empty") if self.empty == "missing" else Row(0.0, runs)
        return Row(float(any(equal for _, equal in golds)), runs)


def compared(
    sample: Sample, folder: str, compare: Compare, limits: Limits
) -> tuple[Result, list[tuple[Result, bool]]] | str:
    """The response's result, and of each reference its result and whether they are the same; or why that cannot be told."""
    references = references_of(sample)
    if not references:
        return "it has no reference"
    connection = connect(sample.meta, folder)
    if isinstance(connection, str):
        return connection
    result = run(connection, query_of(sample.response), limits)
    golds = []
    for text in references:
        query = query_of(text)
        gold = run(connection, query, limits)
        if gold.error:
            return f"its gold query fails: {gold.error}"
        how: Compare = "multiset" if compare == "ordered" and not orders(query) else compare
        golds.append((gold, not result.error and same(gold.rows, result.rows, how)))
    return result, golds


def orders(query: str) -> bool:
    """Whether a query has an ORDER BY outside all brackets and texts."""
    depth, outside = 0, []
    for part in re.findall(r"'(?:[^']|'')*'|\"[^\"]*\"|[()]|[^()'\"]+", query):
        depth += {"(": 1, ")": -1}.get(part, 0)
        if depth == 0 and part[0] not in "'\"":
            outside.append(part)
    return re.search(r"\border\s+by\b", " ".join(outside), re.IGNORECASE) is not None
