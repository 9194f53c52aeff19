"""Rewards from a judge that sees two responses at a time, in both orders: within a group, or against a recorded response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.ask import Ask, Reply
from rlhf_cli.judges.questions import Compare
from rlhf_cli.judges.text import unit_hash
from rlhf_cli.rewards.judge import Asking, check_votes, reading, text_of
from rlhf_cli.rewards.per_sample import Row, references_of
from rlhf_cli.types import Sample


class Verdict:
    """What the votes on one pair say, each asked in both orders: `ahead` and `behind` are the judge's opinion of i over j,
    in the order (i, j) and, with its sign turned, in the order (j, i).
    """

    def __init__(self, ahead: Sequence[float], behind: Sequence[float]) -> None:
        self.ahead, self.behind = list(ahead), list(behind)

    @property
    def inconsistent(self) -> float:
        """Share of the votes whose two orders name different winners, a tie beside a winner included."""
        signs = [(_sign(a), _sign(b)) for a, b in zip(self.ahead, self.behind, strict=True)]
        return sum(a != b for a, b in signs) / len(signs)

    def strict(self) -> float:
        """1 where every vote in both orders prefers i, -1 where every one prefers j, else 0."""
        signs = {_sign(x) for x in (*self.ahead, *self.behind)}
        return float(signs.pop()) if len(signs) == 1 else 0.0

    def mean(self) -> float:
        """The mean of all votes' signs, in [-1, 1]."""
        both = [_sign(x) for x in (*self.ahead, *self.behind)]
        return sum(both) / len(both)

    def probability(self) -> float:
        """Mean over orders and votes of the probability that i is better, 0.5 [P(i | i, j) + 1 - P(j | j, i)]."""
        both = [_sigmoid(x) for x in (*self.ahead, *self.behind)]
        return sum(both) / len(both)

    def logit(self) -> float:
        """Mean over orders and votes of the log-odds that i is better; an opinion of the place cancels."""
        both = [*self.ahead, *self.behind]
        return sum(both) / len(both)


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


def _sigmoid(x: float) -> float:
    small = math.exp(-abs(x))  # never overflows
    return (1 if x >= 0 else small) / (1 + small)


def ask_pair(question: Compare, prompt: Sample, i: str, j: str, votes: int) -> list[Ask]:
    """Both orders of a pair, vote by vote."""
    return [q for v in range(votes) for q in (question.ask(prompt, i, j, v), question.ask(prompt, j, i, v))]


def read_pair(question: Compare, replies: Sequence[Reply]) -> tuple[Verdict | None, str]:
    """The verdict on a pair from the replies to `ask_pair`; a vote counts where both its orders can be read."""
    ahead, behind, why = [], [], ""
    for one, two in zip(replies[::2], replies[1::2], strict=True):
        (a, no), (b, nor) = reading(question.read, one), reading(question.read, two)
        if a is None or b is None:
            why = why or no or nor
        else:
            ahead.append(a)
            behind.append(-b)
    return (Verdict(ahead, behind), "") if ahead else (None, why)


class JudgePairwise(Asking):
    """How a response does against others of its group, by a judge that sees two at a time in both orders.

    against=group: the mean over all other responses; against=pivot: one comparison with a member that the group's texts
    draw, itself 0. A comparison is 1, 0 or -1: strict counts a win only if every vote in both orders says so (Sun et
    al., "SALMON", arXiv:2310.05910), mean averages them. scale=rate maps [-1, 1] to [0, 1]. `inconsistent` says what a
    comparison without a winner gives under strict: a tie 0, or a loss -1 to both.
    The pivot is that of "Writing-Zero: Bridge the Gap Between Non-verifiable Tasks and Verifiable Rewards", arXiv:2506.00103.
    """

    asks_judge = True

    def __init__(
        self,
        *,
        rubric: str,
        against: Literal["group", "pivot"],
        answer: Literal["verdict", "scores", "logits"],
        rule: Literal["strict", "mean"],
        scale: Literal["rate", "sign"],
        inconsistent: Literal["tie", "loss"],
        votes: int,
    ) -> None:
        """Args:
        rubric: what is better, in words, or @FILE
        against: group (every other response) or pivot (one drawn response)
        answer: verdict, scores (principles, a critique and two scores) or logits (one token)
        rule: strict (all votes in both orders) or mean
        scale: rate ([0, 1], a win rate) or sign ([-1, 1])
        inconsistent: what no winner gives under strict, tie (0) or loss (-1)
        votes: replies to each order of a pair
        """
        check_votes(votes, "reward.judge_pairwise")
        self.question = Compare(text_of(rubric, "reward.judge_pairwise.rubric"), answer)
        self.against, self.rule, self.scale, self.votes = against, rule, scale, votes
        self.no_winner = -1.0 if inconsistent == "loss" else 0.0

    def pairs(self, samples: Sequence[Sample]) -> list[tuple[int, int]]:
        """Which members are compared."""
        k = len(samples)
        if self.against == "group":
            return [(i, j) for i in range(k) for j in range(i + 1, k)]
        pivot = pivot_of(samples)
        return [(i, pivot) for i in range(k) if i != pivot]

    def questions(self, samples: Sequence[Sample]) -> list[Ask]:
        return [
            ask
            for i, j in self.pairs(samples)
            for ask in ask_pair(self.question, samples[0], samples[i].response, samples[j].response, self.votes)
        ]

    def rows(self, samples: Sequence[Sample], replies: Sequence[Reply]) -> list[Row]:
        gains: list[list[float]] = [[] for _ in samples]
        doubts: list[list[float]] = [[] for _ in samples]
        reasons = ["it has no other response to compare with"] * len(samples)
        step = 2 * self.votes
        for n, (i, j) in enumerate(self.pairs(samples)):
            verdict, why = read_pair(self.question, replies[n * step : (n + 1) * step])
            if verdict is None:
                reasons[i] = reasons[j] = why
                continue
            for member, gain in zip((i, j), self._gains(verdict), strict=True):
                gains[member].append(gain)
                doubts[member].append(verdict.inconsistent)
        if self.against == "pivot" and len(samples) > 1:
            pivot = pivot_of(samples)
            gains[pivot] = [0.0] if gains[pivot] else []
        return [self._row(g, d, why) for g, d, why in zip(gains, doubts, reasons, strict=True)]

    def _gains(self, verdict: Verdict) -> tuple[float, float]:
        if self.rule == "mean":
            gain = 2 * verdict.probability() - 1 if self.question.answer == "logits" else verdict.mean()
        else:
            gain = verdict.strict()
            if gain == 0:
                return self.no_winner, self.no_winner
        return gain, -gain

    def _row(self, gains: Sequence[float], doubts: Sequence[float], why: str) -> Row:
        if not gains:
            return Row(None, reason=why)
        gain = sum(gains) / len(gains)
        value = gain if self.scale == "sign" else (gain + 1) / 2
        return Row(value, {"position_inconsistency": sum(doubts) / len(doubts)})


def pivot_of(samples: Sequence[Sample]) -> int:
    """The member of a group that the others are compared with: uniform, and a function of the group's texts alone."""
    return int(unit_hash("pivot", samples[0].uid, *(s.response for s in samples)) * len(samples))


class JudgeAnchor(Asking):
    """How likely a response beats the recorded one, in both orders: 0.5 [P(y | y, a) + 1 - P(a | a, y)], or the mean log-odds.

    scale=prob lies in [0, 1], parity is 0.5; scale=logit is unbounded, an opinion of the place cancels in it. The
    first reference is the anchor; which side it stands on is never said.
    See Xu et al., "A Unified Pairwise Framework for RLHF: Bridging Generative Reward Modeling and Policy Optimization",
    arXiv:2504.04950.
    """

    asks_judge = True
    needs_references = True

    def __init__(
        self,
        *,
        rubric: str,
        answer: Literal["verdict", "scores", "logits"],
        scale: Literal["prob", "logit"],
        votes: int,
    ) -> None:
        """Args:
        rubric: what is better, in words, or @FILE
        answer: logits (one token), verdict or scores; the latter two take part with their sign
        scale: prob ([0, 1]) or logit (unbounded)
        votes: replies to each order
        """
        check_votes(votes, "reward.judge_anchor")
        if scale == "logit" and answer != "logits":
            raise ConfigError(f"reward.judge_anchor.scale=logit needs log-odds, and answer={answer} gives none; type "
                              "reward.judge_anchor.answer=logits")  # fmt: skip
        self.question = Compare(text_of(rubric, "reward.judge_anchor.rubric"), answer)
        self.scale, self.votes = scale, votes

    def questions(self, samples: Sequence[Sample]) -> list[Ask]:
        return [
            ask
            for s in samples
            if references_of(s)
            for ask in ask_pair(self.question, s, s.response, references_of(s)[0], self.votes)
        ]

    def rows(self, samples: Sequence[Sample], replies: Sequence[Reply]) -> list[Row]:
        rows, at = [], 0
        for s in samples:
            if not references_of(s):
                rows.append(Row(None, reason="it has no reference"))
                continue
            verdict, why = read_pair(self.question, replies[at : at + 2 * self.votes])
            at += 2 * self.votes
            rows.append(Row(None, reason=why) if verdict is None else self._row(verdict))
        return rows

    def _row(self, verdict: Verdict) -> Row:
        prob = verdict.probability() if self.question.answer == "logits" else (verdict.mean() + 1) / 2
        value = verdict.logit() if self.scale == "logit" else prob
        return Row(value, {"position_inconsistency": verdict.inconsistent})
