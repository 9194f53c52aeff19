"""The simulated user whose part a judge plays: it speaks as the user, counts points of the profile, and judges replies."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_cli.environments.simulated_user import Script, SimulatedUser, View
from rlhf_cli.judges.ask import Ask, Reply
from rlhf_cli.judges.strict import Unreadable, integer, json_reply
from rlhf_cli.judges.text import GUARD, fenced

if TYPE_CHECKING:
    from rlhf_cli.judges.judge import Judge

CRITERIA = ("naturalness", "relevance", "logic", "engagement", "informativeness")
PLAY = (
    "You play a user who talks with an assistant. Your profile is given. Answer the assistant's last message in at most two sentences. "
    "Never volunteer anything of your profile; where you are asked, reveal at most {most} of its points. Do not list it."
)
COUNT = "Two profiles of one person are given. Count how many points of the true profile are covered by the inferred profile."
VERDICT = (
    "Judge the assistant's last reply in a dialogue, given what the assistant has inferred about the user. Say of each whether it holds: "
    "naturalness (it sounds like a person), relevance (it fits the user's message and interests), logic (it is coherent with the dialogue), "
    "engagement (it makes the user want to go on), informativeness (it has substance)."
)
SHARE = 0.15  # of the profile that the user reveals in a turn, at most


class JudgedUser(SimulatedUser):
    """`SimulatedUser` whose user, counts and verdicts come from the model of the `judge` section.

    The verdict is 1 where all of naturalness, relevance, logic, engagement and informativeness hold. A count or verdict that cannot
    be had is a missing reward; a user who does not answer has left, and the dialogue ends.
    See Zhao et al., arXiv:2505.15456, appendices B, C.
    """

    asks_judge = True

    def __init__(self, *, strip_tags: bool, reply_weight: float, instruct: bool) -> None:
        """Args:
        strip_tags: in what the policy reads, only its newest turn keeps profile and tags; needs environment.rows=turn
        reply_weight: of the verdict on the reply beside the profile's F1
        instruct: say in a system turn which form a turn has
        """
        super().__init__(strip_tags=strip_tags, reply_weight=reply_weight, instruct=instruct)

    def connect(self, judge: Judge) -> None:
        """Get the judge, which is tried with one question before training."""
        self.mind = JudgedMind(judge)
        said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
        judge.check([reply_question(View(["name: Ann"], said, None, 0))])


class JudgedMind:
    """Asks a judge.

    Args:
        judge: of the `judge` section.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def replies(self, asked: Sequence[View]) -> list[str | None]:
        """What the user says; None where nothing came."""
        found = self._ask(asked, reply_question, lambda r: str(json_reply(r, ("message",))["message"]).strip())
        return [None if isinstance(x, Unreadable) or not x else x for x in found]

    def hits(self, asked: Sequence[View]) -> list[int | str]:
        """Points of the hidden profile that the inferred one covers."""
        found = self._ask(
            asked, count_question, lambda r: integer(json_reply(r, ("covered",))["covered"], 0, 10**6, "count")
        )
        return [str(x) if isinstance(x, Unreadable) else x for x in found]

    def verdicts(self, asked: Sequence[View]) -> list[float | str]:
        """1 where all criteria hold, else 0."""
        found = self._ask(asked, verdict_question, lambda r: float(all(holds(json_reply(r, CRITERIA)))))
        return [str(x) if isinstance(x, Unreadable) else x for x in found]

    def _ask(self, asked: Sequence[View], question: Callable[[View], Ask], read: Callable[[Reply], Any]) -> list[Any]:
        found: list[Any] = []
        for reply in self.judge.ask([question(v) for v in asked]):
            try:
                found.append(read(reply))
            except Unreadable as e:
                found.append(e)
        return found


def reply_question(view: View) -> Ask:
    """What the user says next."""
    fence, texts = fenced([("profile", "\n".join(view.gold)), ("dialogue", transcript(view))])
    task = PLAY.format(most=max(1, int(SHARE * len(view.gold))))
    line = Script().replies([view])[0] or ""
    form = 'Reply with one JSON object and nothing else: {"message": "what you say"}.'
    return _ask(task, fence, form, texts, lambda quality: {"message": line}, {"message": {"type": "string"}})


def count_question(view: View) -> Ask:
    """How much of the hidden profile has been found out."""
    inferred = view.said.profile if view.said else ()
    fence, texts = fenced([("true profile", "\n".join(view.gold)), ("inferred profile", "\n".join(inferred))])
    most = min(len(inferred), len(view.gold))
    form = f'Reply with one JSON object and nothing else: {{"covered": an integer from 0 to {len(view.gold)}}}.'
    return _ask(
        COUNT, fence, form, texts,
        lambda quality: {"covered": int(quality("\n".join(inferred)) * (most + 1))}, {"covered": {"type": "integer"}},
    )  # fmt: skip


def verdict_question(view: View) -> Ask:
    """Whether the reply is good, given what the policy believes about the user."""
    inferred = view.said.profile if view.said else ()
    fence, texts = fenced([("inferred profile", "\n".join(inferred)), ("dialogue", transcript(view))])
    names = ", ".join(f'"{c}": true or false' for c in CRITERIA)
    form = f"Reply with one JSON object and nothing else: {{{names}}}."
    return _ask(
        VERDICT, fence, form, texts,
        lambda quality: dict.fromkeys(CRITERIA, quality(view.reply) >= 0.5), {c: {"type": "boolean"} for c in CRITERIA},
    )  # fmt: skip


def holds(found: dict[str, Any]) -> list[bool]:
    """The criteria as booleans; anything else is no answer."""
    odd = [c for c in CRITERIA if not isinstance(found[c], bool)]
    if odd:
        raise Unreadable(f"the judge's {odd[0]} is {found[odd[0]]!r}, wanted true or false")
    return [found[c] for c in CRITERIA]


def transcript(view: View) -> str:
    """The dialogue as the user sees it, without profile and tags."""
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in view.dialogue)


def _ask(
    task: str, fence: str, form: str, texts: str, answer: Callable[[Any], dict[str, Any]], properties: dict[str, Any]
) -> Ask:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    system = f"{task}\n\n{GUARD.format(fence=fence)}\n\n{form}"
    return Ask(system, texts, lambda quality: Reply(json.dumps(answer(quality))), schema)
