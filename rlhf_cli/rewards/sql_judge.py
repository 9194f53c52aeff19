"""What a wrong query is still worth, by a judge that sees the gold query: asked only where execution fails."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.ask import Ask, Quality, Reply
from rlhf_cli.judges.strict import json_reply, number
from rlhf_cli.judges.text import GUARD, conversation, fenced
from rlhf_cli.rewards.judge import Asking, reading, text_of
from rlhf_cli.rewards.per_sample import Row, references_of
from rlhf_cli.rewards.sql_execution import compared
from rlhf_cli.rewards.sqlite import Limits, limits_of, query_of
from rlhf_cli.types import Sample, Scores

if TYPE_CHECKING:
    from torch import Tensor

TASK = "You know databases well. Say how correct an SQL query is that did not return what it should, beside the gold query, by this rubric:"
FORM = (
    'Reply with one JSON object and nothing else: {{"rationale": "your reasons in at most three sentences", "score": a number '
    "from 0 (completely wrong) to {most:g} (almost right)}}."
)


class Verdict(NamedTuple):
    """Of the database: the query is right, it is worth asking about, or why nothing can be told."""

    right: bool = False
    ask: bool = False
    unknown: str = ""


class SqlJudge(Asking):
    """0 where the query returns what a gold query returns, else a judge's score in [0, most], a real number.

    Beside the execution reward of `sql_partial` it makes the paper's: 3 for equal results, else the judge's score. The judge is asked about
    nothing else; it sees the question, the first reference as gold query, and the query. A response without SELECT gets 0 unasked. Part
    `asked`: 1 where the judge was asked. A reply that cannot be read is missing (the authors' code takes 0).
    See Pourreza et al., Reasoning-SQL: Reinforcement Learning with SQL Tailored Partial Rewards, arXiv:2503.23157.
    """

    asks_judge = True
    needs_references = True

    def __init__(self, *, rubric: str, most: float, folder: str, instructions: int, seconds: float, rows: int) -> None:
        """Args:
        rubric: what makes a query better, in words, or @FILE
        most: highest score; below the weight of execution. The weights alone do not order right before wrong: a wrong query may
            collect this and every part of `sql_partial` but execution, which a right one that is written differently may lack
        folder: where `meta.database` of the records lies; packaged: the databases of dataset=sql
        instructions: largest work of a query, virtual-machine instructions of SQLite
        seconds: wall clock of a query, a safety net
        rows: largest result
        """
        if most <= 0:
            raise ConfigError(f"reward.sql_judge.most={most:g}: must be above 0")
        self.rubric, self.most, self.folder = text_of(rubric, "reward.sql_judge.rubric"), float(most), folder
        self.limits: Limits = limits_of("reward.sql_judge", instructions, seconds, rows)
        self._known: dict[
            tuple[object, ...], Verdict
        ] = {}  # of this step: a group is looked at when drawn, asked about, and read

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        try:
            return super().__call__(samples, group)
        finally:
            self._known.clear()  # the wall clock may say something else in another step

    def trial(self) -> list[Ask]:
        return [self._question(Sample("Which names are there?", "SELECT id FROM users", ("SELECT name FROM users",)))]

    def questions(self, samples: Sequence[Sample]) -> list[Ask]:
        return [self._question(s) for s in samples if self._verdict(s).ask]

    def rows(self, samples: Sequence[Sample], replies: Sequence[Reply]) -> list[Row]:
        left = iter(replies)
        return [self._row(self._verdict(s), left) for s in samples]

    def _row(self, verdict: Verdict, replies: Iterator[Reply]) -> Row:
        if verdict.unknown:
            return Row(None, reason=verdict.unknown)
        parts = {"asked": float(verdict.ask)}
        if not verdict.ask:
            return Row(0.0, parts)
        score, why = reading(self._score, next(replies))
        return Row(score, parts, why)

    def _score(self, reply: Reply) -> float:
        return number(json_reply(reply, ("rationale", "score"))["score"], 0, self.most)

    def _verdict(self, sample: Sample) -> Verdict:
        record = tuple((k, str(sample.meta[k])) for k in ("script", "database") if sample.meta.get(k))
        key = (sample.response, references_of(sample), record)
        if key not in self._known:
            self._known[key] = verdict_of(sample, self.folder, self.limits)
        return self._known[key]

    def _question(self, sample: Sample) -> Ask:
        query, most = query_of(sample.response), self.most
        fence, texts = fenced(
            [("question", conversation(sample)), ("gold query", query_of(references_of(sample)[0])), ("query", query)]
        )
        schema = {
            "type": "object",
            "properties": {"rationale": {"type": "string"}, "score": {"type": "number", "minimum": 0, "maximum": most}},
            "required": ["rationale", "score"],
            "additionalProperties": False,
        }

        def stand_in(quality: Quality) -> Reply:
            return Reply(json.dumps({"rationale": "by rule", "score": most * quality(query)}))

        system = f"{TASK}\n\n{self.rubric.strip()}\n\n{GUARD.format(fence=fence)}\n\n{FORM.format(most=most)}"
        return Ask(system, texts, stand_in, schema)


def verdict_of(sample: Sample, folder: str, limits: Limits) -> Verdict:
    """Run the response's query, and the references', on the record's database."""
    found = compared(sample, folder, "set", limits)
    if isinstance(found, str):
        return Verdict(unknown=found)
    result, golds = found
    if result.late:
        return Verdict(unknown=result.error)
    if re.search(r"\bselect\b", query_of(sample.response), re.IGNORECASE) is None:
        return Verdict()
    right = any(equal and bool(gold.rows) for gold, equal in golds)  # two empty results are unequal
    return Verdict(right=right, ask=not right)
