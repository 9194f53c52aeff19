"""What the environment gave for the turns of a dialogue, as a reward like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_cli.rewards.per_sample import Row, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores


class Environment:
    """The sum of what the environment gave for each turn of the row; missing where one of them is.

    Components: the mean over turns of every part that the environment names, and `turns`, their number.
    """

    needs_environment = True

    def __init__(self) -> None:
        pass

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(_row(s.meta.get("turns") or [], str(s.meta.get("reason", ""))) for s in samples)


def _row(turns: Sequence[Mapping[str, Any]], reason: str) -> Row:
    names = dict.fromkeys(name for t in turns for name in t["parts"])
    parts: dict[str, float | None] = {"turns": float(len(turns))}
    for name in names:
        found = [float(t["parts"][name]) for t in turns if name in t["parts"]]
        parts[name] = sum(found) / len(found)
    rewards = [t["reward"] for t in turns]
    if not rewards or None in rewards:
        return Row(None, parts, reason or "no environment played it")
    return Row(sum(map(float, rewards)), parts)
