"""Rewards that ask a judge: one response by a rubric, or whole groups; pairs lie in `judge_pairs.py`.

Who judges stands in the `judge` section. A reply that cannot be read is a missing score with its reason, never a low one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.ask import Ask, Reply
from rlhf_cli.judges.questions import Grade, Rank, Scale
from rlhf_cli.judges.strict import Unreadable
from rlhf_cli.rewards.per_sample import Row, groups_of, scored
from rlhf_cli.types import Sample, Scores

if TYPE_CHECKING:
    from rlhf_cli.judges.judge import Judge as Asked


class Asking:
    """What rewards that ask a judge share: questions of a group, and rows from their replies.

    The questions of a group are sent as soon as its last response is drawn, and answered while others are decoded.
    """

    judge: Asked | None = None
    begun: Sequence[Ask] = ()  # since the last call

    def connect(self, judge: Asked) -> None:
        """Get the judge, which is tried with one question of each kind before training."""
        self.judge = judge
        judge.check(self.trial())

    def trial(self) -> list[Ask]:
        """A question of each kind that will be asked."""
        sample = Sample("What is 1 + 1?", "It is 2.", references=("2",))
        return self.questions([sample, replace(sample, response="It is 3.")])[:1]

    def questions(self, samples: Sequence[Sample]) -> list[Ask]:
        """What to ask about the responses to one prompt."""
        raise NotImplementedError

    def rows(self, samples: Sequence[Sample], replies: Sequence[Reply]) -> list[Row]:
        """A row for each response of the group, from the replies to its questions."""
        raise NotImplementedError

    def begin(self, samples: Sequence[Sample]) -> None:
        """A group is drawn: ask about it now."""
        assert self.judge is not None, "connect gives the judge"
        asks = self.questions(samples)
        self.begun = [*self.begun, *asks]
        self.judge.begin(asks)

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        assert self.judge is not None, "connect gives the judge"
        groups = groups_of(group.tolist())
        asked = [self.questions([samples[i] for i in members]) for members in groups]
        replies = self.judge.ask([ask for asks in asked for ask in asks])
        self.judge.forget(self.begun)
        self.begun = ()
        found: dict[int, Row] = {}
        at = 0
        for members, asks in zip(groups, asked, strict=True):
            own = replies[at : at + len(asks)]
            at += len(asks)
            found |= zip(members, self.rows([samples[i] for i in members], own), strict=True)
        return replace(scored(found[i] for i in range(len(samples))), timing=timing(replies))


def timing(replies: Sequence[Reply]) -> dict[str, float]:
    """What the replies took: calls, seconds, retries; how many came from the cache, and how many failed."""
    return {
        "calls": float(len(replies)),
        "seconds": sum(r.seconds for r in replies if not r.cached),
        "retries": float(sum(r.retries for r in replies)),
        "cached": float(sum(r.cached for r in replies)),
        "failed": float(sum(bool(r.error) for r in replies)),
    }


def reading(read: Callable[[Reply], Any], reply: Reply) -> tuple[Any, str]:
    """(what a reply says, "") or (None, why it cannot be read)."""
    try:
        return read(reply), ""
    except Unreadable as e:
        return None, str(e)
    except ArithmeticError as e:  # one reply with strange numbers must not end a run
        return None, f"the numbers of the judge's reply cannot be computed with ({type(e).__name__})"


def text_of(value: str, key: str) -> str:
    """A text, or the content of the file that `@FILE` names."""
    if not value.startswith("@"):
        text = value
    else:
        file = Path(value[1:]).expanduser()
        if not file.is_file():
            raise ConfigError(f"{key}={value}: no such file; give a text, or @FILE")
        text = file.read_text(encoding="utf-8")
    if not text.strip():
        raise ConfigError(f"{key} is empty; say in words what is good, or name a file with {key}=@FILE")
    return text


def check_votes(votes: int, key: str) -> None:
    """Refuse no votes at all."""
    if votes < 1:
        raise ConfigError(f"{key}.votes={votes}: must be at least 1")


class Judge(Asking):
    """The judge's score of one response by a rubric, an integer in [low, high], or its expectation.

    read=reply: the judge writes its reasons, then the score. read=logits: the score is the expectation over the legal
    score tokens, sum_s s p(s) / sum_s p(s), which has fewer ties; `mass` is their probability together. Several votes
    are averaged over those that can be read.
    See Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv:2306.05685; Liu et al., "G-Eval",
    arXiv:2303.16634.
    """

    asks_judge = True

    def __init__(self, *, rubric: str, low: int, high: int, read: Literal["reply", "logits"], votes: int) -> None:
        """Args:
        rubric: what is good, in words, or @FILE
        low: lowest score
        high: highest score
        read: reply (reasons, then an integer) or logits (expectation over the score tokens)
        votes: replies to each question, averaged; they differ at a judge.temperature above 0 only
        """
        scale = Scale(low, high)
        scale.check("reward.judge", read == "logits")
        check_votes(votes, "reward.judge")
        self.question = Grade(text_of(rubric, "reward.judge.rubric"), scale, read == "logits")
        self.votes = votes

    def questions(self, samples: Sequence[Sample]) -> list[Ask]:
        return [self.question.ask(s, v) for s in samples for v in range(self.votes)]

    def rows(self, samples: Sequence[Sample], replies: Sequence[Reply]) -> list[Row]:
        return [mean_grade(self.question, replies[i : i + self.votes]) for i in range(0, len(replies), self.votes)]


def mean_grade(question: Grade, replies: Sequence[Reply]) -> Row:
    """The mean over the replies that can be read; missing where none can."""
    found = [reading(question.read, r) for r in replies]
    read = [g for g, _ in found if g is not None]
    if not read:
        return Row(None, reason=found[0][1])
    masses = [g.mass for g in read if g.mass is not None]
    parts = {"mass": sum(masses) / len(masses)} if masses else {}
    return Row(sum(g.score for g in read) / len(read), parts)


class JudgeListwise(Asking):
    """The judge's score of a response among its whole group, all in one question, minus tie_break rank / (K - 1).

    rank is 0 for the best of K. `consistent` is 1 where nobody ranks above another with a higher score.
    See Yu et al., "RewardAnything: Generalizable Principle-Following Reward Models", arXiv:2506.03637.
    """

    asks_judge = True

    def __init__(self, *, principle: str, low: int, high: int, tie_break: float) -> None:
        """Args:
        principle: what is good, in words, or @FILE
        low: lowest score
        high: highest score
        tie_break: weight of the place in the order, score units
        """
        scale = Scale(low, high)
        scale.check("reward.judge_listwise", False)
        self.question = Rank(text_of(principle, "reward.judge_listwise.principle"), scale)
        self.tie_break = tie_break

    def questions(self, samples: Sequence[Sample]) -> list[Ask]:
        return [self.question.ask(samples)]

    def rows(self, samples: Sequence[Sample], replies: Sequence[Reply]) -> list[Row]:
        found, why = reading(lambda r: self.question.read(r, samples), replies[0])
        if found is None:
            return [Row(None, reason=why)] * len(samples)
        last = max(1, len(samples) - 1)
        parts = {"consistent": float(found.consistent)}
        return [
            Row(score - self.tie_break * place / last, parts | {"score": float(score), "place": float(place)})
            for score, place in zip(found.score, found.place, strict=True)
        ]
