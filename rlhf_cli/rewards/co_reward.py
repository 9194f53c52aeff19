"""Agreement across two wordings of a question: the majority answer to one is the label of the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from rlhf_cli.rewards.math_answer import final_number, last_boxed, only_number
from rlhf_cli.rewards.per_sample import Row, groups_of, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores

Answers = Literal["boxed", "marked", "any"]


class CoReward:
    """1 where a response's answer is the majority answer to the linked prompt, else 0. No label is used.

    Each of two linked groups votes; a response without an answer has no vote. Without any vote the other group's rewards are 0; where
    a vote is a tie they are missing (ties=missing). Two equal prompts give the majority-vote reward of test-time training.
    Components: `found`, 1 where the response has an answer; `label`, 1 where the linked prompt's vote is decided.
    See Zhang et al., Co-Reward: Self-supervised Reinforcement Learning for LLM Reasoning via Contrastive Agreement,
    arXiv:2508.00410, eq. 4-6.
    """

    needs_links = True

    def __init__(
        self, *, answer: Literal["boxed", "marked", "any"], canonical: bool, ties: Literal["missing", "first"]
    ) -> None:
        """Args:
        answer: boxed (what the last \\boxed{} holds), marked (a number after #### or boxed), any (else the last number)
        canonical: compare boxes that hold a number alone by value, so that 0.50 and 1/2 agree, and other texts without regard to case and
            blanks; off: character by character, as the authors' code does (answer=boxed only)
        ties: missing (no label, the rows leave the step) or first (the answer that came first wins, as in the authors' code)
        """
        self.answer: Answers = answer
        self.canonical, self.ties = canonical, ties

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        found = dict(self._rows(samples, groups_of(group.tolist())))
        return scored(found[i] for i in range(len(samples)))

    def _rows(self, samples: Sequence[Sample], groups: Sequence[Sequence[int]]) -> Iterator[tuple[int, Row]]:
        answers = {i: self.read(samples[i].response) for rows in groups for i in rows}
        by_link: dict[str, list[Sequence[int]]] = {}
        for rows in groups:
            by_link.setdefault(samples[rows[0]].link, []).append(rows)
        for link, views in by_link.items():
            if not link or len(views) != 2:
                why = f"link {link!r} joins {len(views)} prompt(s) of this step, wanted 2"
                yield from ((i, Row(None, reason=why)) for rows in views for i in rows)
                continue
            votes = [vote([answers[i] for i in rows]) for rows in views]
            for rows, winners in zip(views, reversed(votes), strict=True):
                yield from ((i, self._row(answers[i], winners)) for i in rows)

    def _row(self, answer: str | None, winners: Sequence[str]) -> Row:
        """The reward of an answer, given the winners of the linked prompt's vote."""
        tie = len(winners) > 1 and self.ties == "missing"
        parts = {"found": float(answer is not None), "label": float(bool(winners) and not tie)}
        if tie:
            return Row(None, parts, f"the vote on the linked prompt is a tie of {', '.join(winners)}")
        return Row(float(bool(winners) and answer == winners[0]), parts)

    def read(self, text: str) -> str | None:
        """The answer that a response gives, as it is compared; None where there is none."""
        box = last_boxed(text)
        if self.answer == "boxed":
            if box is None or not box.strip():
                return None
            return (_number(box) or " ".join(box.lower().split())) if self.canonical else box
        number = final_number(text, "marked" if self.answer == "marked" else "any")
        return None if number is None else str(number)


def vote(answers: Sequence[str | None]) -> list[str]:
    """The most frequent answers, in the order in which they first appear; one if the vote is decided, none without answers."""
    counts = Counter(a for a in answers if a is not None)
    most = max(counts.values(), default=0)
    return [a for a, n in counts.items() if n == most]


def _number(box: str) -> str | None:
    """The number that a box holds alone, in lowest terms; None for x = 3, (1, 2), 2^{10} or 1:2, which are texts."""
    number = only_number(box)
    return None if number is None else str(number)
