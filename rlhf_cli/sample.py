"""What a scorer sees. Apart from the other types, so that a process that only scores text imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One prompt with one response, as text: what a scorer sees. `uid` names the prompt; rows of a group share it.

    Groups that share a `link` were sampled in the same step and come to a scorer in the same call.
    """

    prompt: str
    response: str
    references: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    uid: str = ""
    link: str = ""
