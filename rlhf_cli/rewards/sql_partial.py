"""Reasoning-SQL's partial rewards: execution, syntax, schema linking, n-grams, format."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.per_sample import Row, references_of, scored
from rlhf_cli.rewards.sql_execution import compared
from rlhf_cli.rewards.sqlite import Limits, limits_of, query_of

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores


class SqlPartial:
    """execution * [same results] + syntax * [it runs] + schema * S + ngram * N + format * F, in [0, sum of the weights].

    S: shared table and column names, N: Jaccard overlap of the sets of bigrams of the normalised queries, F: tags in
    [0, 1]. Results are compared as sets and two empty ones are unequal. A response without SELECT has no execution and
    schema reward. Parts `execution`, `syntax`, `schema`, `ngram`, `format` are logged unweighted, in [0, 1]. At the
    default weights a right query outscores a wrong one by at least 3 - 1 - 1 - 0.5 = 0.5, since both run; beside a judge's
    score of up to 2 a wrong look-alike can outscore a right query that is written differently, so watch `execution` itself.
    See Pourreza et al., Reasoning-SQL: Reinforcement Learning with SQL Tailored Partial Rewards, arXiv:2503.23157.
    """

    needs_references = True
    pooled = True

    def __init__(
        self,
        *,
        weights: dict[str, float],
        linking: Literal["jaccard", "recall"],
        tags: list[str],
        folder: str,
        instructions: int,
        seconds: float,
        rows: int,
    ) -> None:
        """Args:
        weights: of the five parts
        linking: schema reward: jaccard (the paper), or recall (the authors' code, maximised by naming every column)
        tags: the two blocks that the format reward wants
        folder: where `meta.database` of the records lies; packaged: the databases of dataset=sql
        instructions: largest work of a query, virtual-machine instructions of SQLite
        seconds: wall clock of a query, a safety net
        rows: largest result
        """
        if set(weights) != set(PARTS) or len(tags) != 2:
            raise ConfigError(
                f"reward.sql_partial: weights={dict(weights)}, tags={list(tags)} are not allowed; weights are those of "
                f"{', '.join(PARTS)}, tags are two words, e.g. reward.sql_partial.tags=[reasoning,answer]"
            )
        self.weights, self.linking, self.tags, self.folder = dict(weights), linking, tuple(tags), folder
        self.forms = {"format": self.weights["format"]}
        self.limits: Limits = limits_of("reward.sql_partial", instructions, seconds, rows)

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One score per response, in order."""
        return (self._row(s) for s in samples)

    def _row(self, sample: Sample) -> Row:
        found = compared(sample, self.folder, "set", self.limits)
        if isinstance(found, str):
            return Row(None, reason=found)
        result, golds = found
        if result.late:
            return Row(None, reason=result.error)
        query, gold = query_of(sample.response), [query_of(r) for r in references_of(sample)]
        select = re.search(r"\bselect\b", query, re.IGNORECASE) is not None
        parts: dict[str, float | None] = {
            "execution": float(select and any(equal and bool(g.rows) for g, equal in golds)),
            "syntax": float(not result.error),
            "schema": max(linked(g, query, self.linking) for g in gold) if select else 0.0,
            "ngram": max(jaccard(bigrams(g), bigrams(query)) for g in gold),
            "format": xmlcount(sample.response, self.tags) / 0.5,
        }
        return Row(sum(self.weights[k] * (v or 0.0) for k, v in parts.items()), parts)


PARTS = ("execution", "syntax", "schema", "ngram", "format")


def linked(gold: str, query: str, how: Literal["jaccard", "recall"]) -> float:
    """Shared table and column names over those of both (jaccard), or over those of the gold query (recall)."""
    wanted, named = items(gold), items(query)
    return jaccard(wanted, named) if how == "jaccard" else len(wanted & named) / max(1, len(wanted))


def jaccard(a: frozenset[Any], b: frozenset[Any]) -> float:
    """|A and B| / |A or B|; 0 for two empty sets."""
    return len(a & b) / max(1, len(a | b))


@lru_cache(maxsize=4096)
def items(query: str) -> frozenset[str]:
    """Lower-case names of the tables and columns of a query; none of one that cannot be parsed."""
    from sqlglot import exp

    tree = _tree(query)
    if tree is None:
        return frozenset()
    return frozenset(n.name.lower() for n in tree.find_all(exp.Table, exp.Column) if n.name)


@lru_cache(maxsize=4096)
def bigrams(query: str) -> frozenset[tuple[str, str]]:
    """Neighbouring words of a normalised query: lower case, without aliases; of its plain text where it cannot be parsed."""
    from sqlglot import exp

    tree = _tree(query)
    text, aliases = query.lower(), {"as"}
    if tree is not None:
        aliases |= {a.lower() for n in tree.find_all(exp.Table, exp.Alias, exp.Subquery) if (a := n.alias)}
        text = tree.sql(dialect="sqlite").lower()
    words = [w for w in re.findall(r"\w+", text) if w not in aliases]
    return frozenset(itertools.pairwise(words))


def _tree(query: str) -> Any:
    from sqlglot import parse_one
    from sqlglot.errors import SqlglotError

    try:
        return parse_one(query, dialect="sqlite")
    except (SqlglotError, RecursionError, ValueError):
        return None


def xmlcount(text: str, tags: tuple[str, ...]) -> float:
    """An eighth for each of four tag lines that stands once, less 0.001 a character after the last one; clamped to [0, 0.5].

    The popular rule is unbounded below, and subtracts the whole text where no newline follows the last tag: a newline is
    added at the end here, so that only what really follows counts.
    """
    first, last = tags
    text = text.rstrip() + "\n"
    total = 0.125 * (text.count(f"<{first}>\n") == 1) + 0.125 * (text.count(f"\n</{first}>\n") == 1)
    if text.count(f"\n<{last}>\n") == 1:
        total += 0.125 - 0.001 * len(text.split(f"\n</{last}>\n")[-1])
    if text.count(f"\n</{last}>") == 1:
        total += 0.125 - 0.001 * (len(text.split(f"\n</{last}>")[-1]) - 1)
    return min(max(total, 0.0), 0.5)
