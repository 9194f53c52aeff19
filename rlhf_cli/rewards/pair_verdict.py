"""The reward of a policy that thinks and then names the better of two responses, its reasons checked by a judge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from rlhf_cli.judges.ask import Ask, Quality, Reply
from rlhf_cli.judges.strict import one_of, parse_object, whole
from rlhf_cli.judges.text import GUARD, fenced
from rlhf_cli.rewards.judge import Asking, reading
from rlhf_cli.rewards.per_sample import Row
from rlhf_cli.types import Sample

FORM = re.compile(
    r"\s*<think>(?P<thought>(?:(?!</?think>|</?answer>).)*)</think>\s*<answer>\s*(?P<answer>[12])\s*</answer>\s*", re.S
)
LAST = 3  # lines of the reasons that the judge sees
TASK = "Below are the last lines of somebody's reasons for preferring one of two responses, and the response that he then named."
REPLY = 'Reply with one JSON object and nothing else: {"agree": "yes" if the reasons lead to that response, otherwise "no"}.'
SCHEMA = {
    "type": "object",
    "properties": {"agree": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["agree"],
    "additionalProperties": False,
}


class PairVerdict(Asking):
    """R = right (1 + 0.5 consistency) + 0.5 format, with right and format 0 or 1.

    The response is `<think>...</think><answer>1 or 2</answer>`; `meta.better` is 1 or 2. A judge says whether the last
    lines of the reasons lead to the verdict: consistency is 1, or `disagreement`. It is asked about right verdicts only, since
    nothing else changes with its answer. Where it gives none the score is missing (the authors' code takes 0).
    See Zhang et al., "R1-Reward: Training Multimodal Reward Model Through Stable Reinforcement Learning", arXiv:2505.02835.
    """

    asks_judge = True

    def __init__(self, *, disagreement: Literal[-1, 0]) -> None:
        """Args:
        disagreement: consistency of reasons that lead elsewhere: -1 (the authors' code) or 0 (the paper)
        """
        self.disagreement = disagreement

    def trial(self) -> list[Ask]:
        return [_question("So the first one is better.", "1")]

    def questions(self, samples: Sequence[Sample]) -> list[Ask]:
        found = [(s, FORM.fullmatch(s.response)) for s in samples]
        return [_question(m["thought"], m["answer"]) for s, m in found if m and _right(s, m)]

    def rows(self, samples: Sequence[Sample], replies: Sequence[Reply]) -> list[Row]:
        left = iter(replies)
        rows = []
        for s in samples:
            match = FORM.fullmatch(s.response)
            if str(s.meta.get("better")) not in ("1", "2"):
                rows.append(
                    Row(None, reason="meta.better is neither 1 nor 2; map it with dataset.columns.meta.better=COLUMN")
                )
            elif match and _right(s, match):
                rows.append(self._agreement(next(left)))
            else:
                form = float(match is not None)
                rows.append(Row(0.5 * form, {"right": 0.0, "format": form, "consistency": None}))
        return rows

    def _agreement(self, reply: Reply) -> Row:
        agree, why = reading(_agrees, reply)
        if agree is None:
            return Row(None, reason=why)
        consistency = 1.0 if agree else float(self.disagreement)
        return Row(1 + 0.5 * consistency + 0.5, {"right": 1.0, "format": 1.0, "consistency": consistency})


def _right(sample: Sample, match: re.Match[str]) -> bool:
    return str(sample.meta.get("better")) == match["answer"]


def _question(thought: str, answer: str) -> Ask:
    last = "\n".join(thought.strip().splitlines()[-LAST:])
    fence, texts = fenced([("reasons", last), ("named", f"response {answer}")])

    def stand_in(quality: Quality) -> Reply:
        return Reply('{"agree": "yes"}' if quality(last) >= 0.5 else '{"agree": "no"}')

    return Ask(f"{TASK}\n\n{GUARD.format(fence=fence)}\n\n{REPLY}", texts, stand_in, SCHEMA)


def _agrees(reply: Reply) -> bool:
    found: dict[str, Any] = parse_object(whole(reply))
    return one_of(found.get("agree") if set(found) == {"agree"} else None, ("yes", "no"), "agree") == "yes"
