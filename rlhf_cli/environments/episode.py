"""What an environment is: it opens a dialogue and answers the policy's turns, in text.

An environment is a function of its arguments. `reset` gives the episode that a record and a seed begin, `step` what one response makes of
an episode; nothing is kept in between, so that several responses to the same episode can be tried and any of them continued, and a
resumed run plays the same dialogues. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlhf_cli.data.record import Record

Message = Mapping[str, str]


@dataclass(frozen=True)
class Episode:
    """A dialogue at the policy's turn: what it reads, as chat turns, and whatever the environment remembers."""

    messages: tuple[Message, ...]
    state: Any = None

    def after(self, response: str, observation: str, role: str = "user", state: Any = None) -> Episode:
        """The episode with the policy's response and what the other party says to it."""
        said = ({"role": "assistant", "content": response}, {"role": role, "content": observation})
        return Episode((*self.messages, *said), self.state if state is None else state)


@dataclass(frozen=True)
class Turn:
    """What a response made of an episode.

    `reward` of the turn; None is missing, and `reason` says why. `parts` are logged beside it. `done`: nothing follows, and
    `episode` is not read.
    """

    episode: Episode
    reward: float | None = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    done: bool = False
    reason: str = ""


class Environment(Protocol):
    """Opens episodes and answers turns. `seed` in [0, 2^63) is the only source of chance.

    One with `steps(episodes, responses)` is asked for a whole batch at once, so that what it asks elsewhere can run side by side.
    One with `asks_judge = True` is given the run's judge by `connect`.
    """

    def reset(self, record: Record, seed: int) -> Episode: ...
    def step(self, episode: Episode, response: str) -> Turn: ...


def steps(environment: Any, episodes: Sequence[Episode], responses: Sequence[str]) -> list[Turn]:
    """A turn for every pair of episode and response."""
    together = getattr(environment, "steps", None)
    if together is not None:
        return list(together(episodes, responses))
    return [environment.step(e, r) for e, r in zip(episodes, responses, strict=True)]
