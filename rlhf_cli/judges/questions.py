"""What a judge is asked, and how its reply is read: one response by a scale, two side by side, or a whole group.

Every question says how it is answered by the rule that stands in for a judge, so that the format has one home.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.ask import Ask, Reply
from rlhf_cli.judges.strict import Unreadable, integer, json_reply, number, one_of, permutation, token_odds
from rlhf_cli.judges.text import GUARD, conversation, fenced, shuffled

if TYPE_CHECKING:
    from rlhf_cli.sample import Sample

TOP = 20  # alternatives of a token that endpoints give at most
FIRST, SECOND = "A", "B"


class Graded(NamedTuple):
    """A score, and the probability of all legal scores together where it was read from log-probabilities."""

    score: float
    mass: float | None = None


@dataclass(frozen=True)
class Scale:
    """Integers that a response may get."""

    low: int
    high: int

    def check(self, key: str, by_token: bool) -> None:
        """Refuse an empty scale, and one whose scores are not single tokens where one token is read."""
        if self.low >= self.high:
            raise ConfigError(f"{key}.high={self.high}: must be above {key}.low={self.low}")
        if by_token and not (self.low >= 0 and self.high <= 9):
            raise ConfigError(
                f"{key}.read=logits reads one token, so scores have one digit; type {key}.low=0 {key}.high=9 or less"
            )

    def place(self, quality: float) -> int:
        """The score of a quality in [0, 1)."""
        return self.low + int(quality * (self.high - self.low + 1))


def _object(**properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT = {"type": "string"}
NUMBER = {"type": "number"}


def _integer(scale: Scale) -> dict[str, Any]:
    return {"type": "integer", "minimum": scale.low, "maximum": scale.high}


def _system(task: str, rubric: str, fence: str, form: str) -> str:
    return f"{task}\n\n{rubric.strip()}\n\n{GUARD.format(fence=fence)}\n\n{form}"


# -- one response ------------------------------------------------------------------------------------------------------

GRADE = "You are a strict and fair judge. Grade one response to a prompt by this rubric:"


@dataclass(frozen=True)
class Grade:
    """One response by a rubric, on an integer scale.

    by_token: the score is the expectation over the legal score tokens of the reply's first token,
    sum_s s p(s) / sum_s p(s): Liu et al., "G-Eval: NLG Evaluation using GPT-4 with Better Human Alignment",
    arXiv:2303.16634, eq. 1. Otherwise the judge writes its reasons first and then one integer.
    """

    rubric: str
    scale: Scale
    by_token: bool
    temperature: float | None = None

    def ask(self, sample: Sample, draw: int = 0) -> Ask:
        """The question about one response."""
        fence, texts = fenced([("prompt", conversation(sample)), ("response", sample.response)])
        low, high = self.scale.low, self.scale.high
        if self.by_token:
            form = f"Reply with the score alone: one integer from {low} to {high}, and nothing else."
            schema = None
        else:
            form = (
                'Reply with one JSON object and nothing else: {"rationale": "your reasons in at most three sentences", '
                f'"score": an integer from {low} to {high}}}.'
            )
            schema = _object(rationale=TEXT, score=_integer(self.scale))
        return Ask(
            _system(GRADE, self.rubric, fence, form),
            texts,
            lambda quality: self._stand_in(quality(sample.response)),
            schema,
            top=TOP if self.by_token else 0,
            temperature=self.temperature,
            draw=draw,
        )

    def read(self, reply: Reply) -> Graded:
        """The score of a reply."""
        if self.by_token:
            odds, mass = token_odds(reply, {str(s): (str(s),) for s in range(self.scale.low, self.scale.high + 1)})
            seen = [(int(s), math.exp(p)) for s, p in odds.items() if _listed(reply, s)]
            return Graded(sum(s * p for s, p in seen) / sum(p for _, p in seen), mass)
        found = json_reply(reply, ("rationale", "score"))
        return Graded(float(integer(found["score"], self.scale.low, self.scale.high)))

    def _stand_in(self, quality: float) -> Reply:
        if not self.by_token:
            return Reply(json.dumps({"rationale": "by rule", "score": self.scale.place(quality)}))
        low, n = self.scale.low, self.scale.high - self.scale.low
        at = quality * n  # probability on the two integers around it, so that the expectation is low + quality n
        below = int(at)
        chances = {low + below: 1 - (at - below), low + below + 1: at - below}
        top = tuple((str(s), math.log(p)) for s, p in chances.items() if p > 0)
        return Reply(top[0][0], top)


def _listed(reply: Reply, answer: str) -> bool:
    """Whether any alternative spells this answer; what is not listed adds nothing to an expectation."""
    return any(token.strip() == answer for token, _ in reply.top)


# -- two responses -----------------------------------------------------------------------------------------------------

COMPARE = "You are a strict and fair judge. Compare two responses to the same prompt by this rubric:"
MOST = 10.0  # of the two scores of a generative reward model


@dataclass(frozen=True)
class Compare:
    """Two responses, in the order in which they are shown.

    answer: verdict (reasons, then first, second or tie), scores (principles, a critique and a score in [0, 10] for each:
    the generative reward model of Writing-Zero, arXiv:2506.00103), or logits (one token, whose log-odds are read).
    """

    rubric: str
    answer: str

    def ask(self, prompt: Sample, first: str, second: str, draw: int = 0) -> Ask:
        """The question about two responses to the prompt of a sample."""
        fence, texts = fenced([("prompt", conversation(prompt)), ("response A", first), ("response B", second)])
        form, schema = _FORMS[self.answer]
        return Ask(
            _system(COMPARE, self.rubric, fence, form),
            texts,
            lambda quality: _compared(self.answer, quality(first), quality(second)),
            schema,
            top=TOP if self.answer == "logits" else 0,
            draw=draw,
        )

    def read(self, reply: Reply) -> float:
        """How much the first is better: log-odds under `logits`, a difference of scores, or 1, 0, -1."""
        if self.answer == "logits":
            odds, _ = token_odds(reply, {FIRST: (FIRST,), SECOND: (SECOND,)})
            return odds[FIRST] - odds[SECOND]
        if self.answer == "scores":
            found = json_reply(reply, _SCORED)
            first, second = (number(found[k], 0, MOST, k) for k in ("score_A", "score_B"))
            return first - second
        verdict = one_of(json_reply(reply, ("rationale", "better"))["better"], (FIRST, SECOND, "tie"), "verdict")
        return {FIRST: 1.0, SECOND: -1.0, "tie": 0.0}[verdict]


_SCORED = ("principles", "critique", "score_A", "score_B")
_FORMS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "verdict": (
        'Reply with one JSON object and nothing else: {"rationale": "your reasons in at most three sentences", '
        '"better": "A", "B" or "tie"}.',
        _object(rationale=TEXT, better={"type": "string", "enum": [FIRST, SECOND, "tie"]}),
    ),
    "scores": (
        'Reply with one JSON object and nothing else: {"principles": "what matters for this prompt", "critique": "how each response '
        'meets that", "score_A": a number from 0 to 10, "score_B": a number from 0 to 10}.',
        _object(principles=TEXT, critique=TEXT, score_A=NUMBER, score_B=NUMBER),
    ),
    "logits": ("Reply with one letter, A or B, for the better response, and nothing else.", None),
}


def _compared(answer: str, first: float, second: float) -> Reply:
    """The rule's reply: the better quality wins; its log-odds are ten times the difference."""
    gap = first - second
    if answer == "logits":
        top = tuple((name, -math.log1p(math.exp(-sign * 10 * gap))) for name, sign in ((FIRST, 1), (SECOND, -1)))
        return Reply(FIRST if gap >= 0 else SECOND, top)
    if answer == "scores":
        found: dict[str, Any] = {"principles": "by rule", "critique": "by rule"}
        return Reply(json.dumps(found | {"score_A": MOST * first, "score_B": MOST * second}))
    better = "tie" if gap == 0 else FIRST if gap > 0 else SECOND
    return Reply(json.dumps({"rationale": "by rule", "better": better}))


# -- a whole group -----------------------------------------------------------------------------------------------------

RANK = "You are a strict and fair judge. Score and rank all responses to a prompt by this principle:"


class Ranked(NamedTuple):
    """Per response, in the order of the group."""

    score: list[int]
    place: list[int]  # 0 is best
    consistent: bool  # nobody ranks above another with a higher score


@dataclass(frozen=True)
class Rank:
    """A whole group in one question: a score for each and one order, best first.

    Responses are shown as model-1, model-2, ... in an order that the group's own texts decide.
    See Yu et al., "RewardAnything: Generalizable Principle-Following Reward Models", arXiv:2506.03637.
    """

    principle: str
    scale: Scale

    def order(self, samples: Sequence[Sample]) -> list[int]:
        """Which response is shown at each place."""
        return shuffled(len(samples), samples[0].uid, *(s.response for s in samples))

    def ask(self, samples: Sequence[Sample], draw: int = 0) -> Ask:
        """The question about one group."""
        order = self.order(samples)
        names = _names(len(samples))
        shown = [(f"response of {name}", samples[i].response) for name, i in zip(names, order, strict=True)]
        fence, texts = fenced([("prompt", conversation(samples[0])), *shown])
        listed = ", ".join(names)
        form = (
            'Reply with one JSON object and nothing else: {"rationale": "your reasons, briefly", "scores": {one integer from '
            f'{self.scale.low} to {self.scale.high} for each of {listed}}}, "best-to-worst": [the names, best first]}}.'
        )
        schema = _object(
            rationale=TEXT,
            scores=_object(**{n: _integer(self.scale) for n in names}),
            **{"best-to-worst": {"type": "array", "items": {"type": "string", "enum": names}}},
        )
        return Ask(
            _system(RANK, self.principle, fence, form),
            texts,
            lambda quality: self._stand_in([quality(samples[i].response) for i in order]),
            schema,
            draw=draw,
        )

    def read(self, reply: Reply, samples: Sequence[Sample]) -> Ranked:
        """Scores and places in the group's own order."""
        names, order = _names(len(samples)), self.order(samples)
        found = json_reply(reply, ("rationale", "scores", "best-to-worst"))
        scores = found["scores"]
        if not isinstance(scores, dict) or set(scores) != set(names):
            raise Unreadable(f"the judge's scores do not name each of {', '.join(names)} once")
        best = permutation(found["best-to-worst"], names)
        by_name = {n: integer(scores[n], self.scale.low, self.scale.high, f"score of {n}") for n in names}
        score, place = [0] * len(samples), [0] * len(samples)
        for name, i in zip(names, order, strict=True):
            score[i], place[i] = by_name[name], best.index(name)
        along = [by_name[n] for n in best]
        return Ranked(score, place, all(a >= b for a, b in pairwise(along)))

    def _stand_in(self, qualities: Sequence[float]) -> Reply:
        names = _names(len(qualities))
        scores = {n: self.scale.place(q) for n, q in zip(names, qualities, strict=True)}
        best = [names[i] for i in sorted(range(len(names)), key=lambda i: -qualities[i])]
        return Reply(json.dumps({"rationale": "by rule", "scores": scores, "best-to-worst": best}))


def _names(n: int) -> list[str]:
    return [f"model-{i + 1}" for i in range(n)]
