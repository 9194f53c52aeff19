"""A question to a judge, and what came back. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Quality = Callable[[str], float]
"""How good a text is, in [0, 1): the rule that stands in for a judge."""


@dataclass(frozen=True)
class Reply:
    """What a judge answered. Where `error` says why there is no answer, the rest is empty."""

    text: str = ""
    top: tuple[tuple[str, float], ...] = ()  # the likeliest first tokens and their log-probabilities, nats
    finish: str = "stop"  # stop | length (cut at the limit) | what the endpoint says
    error: str = ""
    seconds: float = 0.0  # from the first attempt to the answer
    retries: int = 0
    cached: bool = False


@dataclass(frozen=True)
class Ask:
    """One question. `draw` numbers repeated questions, so that samples differ and each has its own place in the cache."""

    system: str
    user: str
    stand_in: Callable[
        [Quality], Reply
    ]  # the answer, in the right format, of the rule that knows only a text's quality
    schema: Mapping[str, Any] | None = None  # of the reply, where it is JSON
    top: int = 0  # log-probabilities of so many first tokens; the reply is then one token
    temperature: float | None = None  # None: that of the judge
    max_tokens: int | None = None  # None: that of the judge
    draw: int = 0
    meta: bool = False  # for the judge of the judge

    @property
    def messages(self) -> list[dict[str, str]]:
        """As chat turns."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]


@dataclass(frozen=True)
class Sampling:
    """How the judge draws, unless a question says otherwise."""

    temperature: float
    max_tokens: int
    structured: bool  # send the JSON schema of the reply as response_format
    extra: Mapping[str, Any]  # more fields of the request

    def of(self, ask: Ask) -> dict[str, Any]:
        """The sampling parameters of one question, as the protocol names them."""
        p: dict[str, Any] = {"temperature": self.temperature if ask.temperature is None else ask.temperature}
        limit = 1 if ask.top else self.max_tokens if ask.max_tokens is None else ask.max_tokens
        if limit and "max_completion_tokens" not in self.extra:
            p["max_tokens"] = limit
        if ask.draw:
            p["seed"] = ask.draw
        if ask.top:
            p |= {"logprobs": True, "top_logprobs": ask.top}
        if ask.schema is not None and self.structured:
            p["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "reply", "schema": dict(ask.schema), "strict": True},
            }
        return p


def key_of(model: str, ask: Ask, parameters: Mapping[str, Any]) -> str:
    """Where a reply lies in a cache: a hash of the model, the full messages and the sampling parameters."""
    whole = [model, ask.messages, parameters]
    text = json.dumps(whole, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
