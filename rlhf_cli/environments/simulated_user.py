"""A simulated user with a hidden profile, which the policy has to find out and to suit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from rlhf_cli.data.record import Record
from rlhf_cli.environments.calculator import instructed
from rlhf_cli.environments.episode import Episode, Message, Turn
from rlhf_cli.environments.profile import Said, bare, equal_points, f1, parse, points, words
from rlhf_cli.errors import ConfigError

INSTRUCTIONS = (
    "Talk with the user and learn who they are. Every turn has this form:\n<profile>\n- one thing you know about the user\n"
    "- another one\n</profile>\n\n<response>\nyour reply to the user\n</response>"
)


class Mind(Protocol):
    """Who plays the user and judges a turn. Each gets a batch; None is an answer that did not come, and `str` says why."""

    def replies(self, asked: Sequence[View]) -> list[str | None]: ...
    def hits(self, asked: Sequence[View]) -> list[int | str]: ...
    def verdicts(self, asked: Sequence[View]) -> list[float | str]: ...


class View:
    """One turn as the user's side sees it: bare replies only.

    Args:
        gold: the hidden profile.
        dialogue: turns so far, without system turn and tags, ending with the new reply.
        said: the turn's parts; None for a malformed one.
        told: how many points of the profile the scripted user has told.
    """

    def __init__(self, gold: Sequence[str], dialogue: Sequence[Message], said: Said | None, told: int) -> None:
        self.gold, self.dialogue, self.said, self.told = tuple(gold), tuple(dialogue), said, told

    @property
    def reply(self) -> str:
        """What the policy said to the user."""
        return self.dialogue[-1]["content"]


class SimulatedUser:
    """Every turn the policy writes what it has learnt about the user, and a reply. Reward of a turn: profile F1 + verdict, in [0, 2].

    A turn that is not `<profile>\\n...</profile>\\n\\n<response>\\n...</response>` earns 0. The F1 counts points of the hidden profile
    that the inferred one holds; the verdict is 1 where the reply is natural, relevant, logical, engaging and informative, judged
    against the inferred profile. The profile stands in `meta.profile` of the record and never in what the policy reads.
    Parts: `profile`, `reply`, `form`. Here the user is a script and points count word for word; `judged_user.py` asks a model.
    See Zhao et al., Teaching Language Models to Evolve with Users: Dynamic Profile Modeling for
    Personalized Alignment, arXiv:2505.15456, sections 2-4.
    """

    def __init__(self, *, strip_tags: bool, reply_weight: float, instruct: bool) -> None:
        """Args:
        strip_tags: in what the policy reads, only its newest turn keeps profile and tags; needs environment.rows=turn
        reply_weight: of the verdict on the reply beside the profile's F1
        instruct: say in a system turn which form a turn has
        """
        self.strip_tags, self.reply_weight, self.instruct = strip_tags, reply_weight, instruct
        self.mind: Mind = Script()

    def reset(self, record: Record, seed: int) -> Episode:
        """The record's first message."""
        gold = record.meta.get("profile")
        if not isinstance(gold, list | tuple) or not all(isinstance(x, str) and points(x) for x in gold) or not gold:
            raise ConfigError(
                f"{record.where}: environment=simulated_user needs a list of texts as profile; type dataset.columns.meta.profile=COLUMN"
            )
        opened = instructed(record, INSTRUCTIONS if self.instruct else "")
        return Episode(opened, {"profile": tuple(gold), "told": 0})

    def step(self, episode: Episode, response: str) -> Turn:
        """One turn."""
        return self.steps([episode], [response])[0]

    def steps(self, episodes: Sequence[Episode], responses: Sequence[str]) -> list[Turn]:
        """The turns of a batch; what is asked of a judge is asked for all of them at once."""
        views = [self._view(e, r) for e, r in zip(episodes, responses, strict=True)]
        formed = [v for v in views if v.said is not None]
        found = dict(
            zip(map(id, formed), zip(self.mind.hits(formed), self.mind.verdicts(formed), strict=True), strict=True)
        )
        replies = self.mind.replies(views)
        return [
            self._turn(e, r, v, found.get(id(v)), reply)
            for e, r, v, reply in zip(episodes, responses, views, replies, strict=True)
        ]

    def _view(self, episode: Episode, response: str) -> View:
        before = [m if m["role"] != "assistant" else {**m, "content": bare(m["content"])} for m in episode.messages]
        spoken = [m for m in before if m["role"] != "system"]
        return View(
            episode.state["profile"],
            [*spoken, {"role": "assistant", "content": bare(response)}],
            parse(response),
            episode.state["told"],
        )

    def _turn(
        self,
        episode: Episode,
        response: str,
        view: View,
        found: tuple[int | str, float | str] | None,
        reply: str | None,
    ) -> Turn:
        after = self._after(episode, response, view, reply or "")
        done = reply is None  # a user who does not answer has left
        if found is None or view.said is None:
            return Turn(after, 0.0, {"profile": 0.0, "reply": 0.0, "form": 0.0}, done)
        hits, verdict = found
        if isinstance(hits, str) or isinstance(verdict, str):
            return Turn(after, None, {"form": 1.0}, done, str(hits if isinstance(hits, str) else verdict))
        profile = f1(hits, len(view.said.profile), len(view.gold))
        parts = {"profile": profile, "reply": float(verdict), "form": 1.0}
        return Turn(after, profile + self.reply_weight * verdict, parts, done)

    def _after(self, episode: Episode, response: str, view: View, reply: str) -> Episode:
        told = view.told + (reply in view.gold)
        older: Sequence[Mapping[str, str]] = episode.messages
        if self.strip_tags:
            older = [m if m["role"] != "assistant" else {**m, "content": bare(m["content"])} for m in older]
        state = {**episode.state, "told": told}
        return Episode(tuple(older), episode.state).after(response, reply, state=state)


class Script:
    """A user by rule, and a judge by rule: for tests, and where no model can be asked.

    The user tells the next point of the profile when the reply asks something, and says so little otherwise. A reply is good when it
    says something new in at most 60 words and takes up a word of the user's or of the inferred profile.
    """

    def replies(self, asked: Sequence[View]) -> list[str | None]:
        """The next point, or an acknowledgement."""
        return [v.gold[v.told] if "?" in v.reply and v.told < len(v.gold) else "I see." for v in asked]

    def hits(self, asked: Sequence[View]) -> list[int | str]:
        """Points that are equal word for word."""
        return [equal_points(v.said.profile if v.said else (), v.gold) for v in asked]

    def verdicts(self, asked: Sequence[View]) -> list[float | str]:
        """By rule."""
        return [float(self._good(v)) for v in asked]

    def _good(self, view: View) -> bool:
        said = words(view.reply)
        earlier = [m["content"] for m in view.dialogue[:-1] if m["role"] == "assistant"]
        known = words(view.dialogue[-2]["content"]).union(*(words(p) for p in (view.said.profile if view.said else ())))
        return bool(said & known) and len(view.reply.split()) <= 60 and view.reply not in earlier
