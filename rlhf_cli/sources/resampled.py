"""Steps that are full in spite of what `select` drops: further rollouts until enough groups survive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.errors import GateError
from rlhf_cli.types import COLUMNS, Experience, Source

Stage = Callable[[Experience], Experience]


class Resampled:
    """Scored and selected groups, `prompts` a step: the source is asked again until so many survive, and the surplus is cut.

    The dynamic sampling of Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv:2503.14476,
    section 3.2. It judges the score before any shaping. A function of the source's position, so a resumed run repeats it.
    Linked groups survive together or not at all, so that no cut parts them.

    Args:
        source: gives the groups of one rollout.
        score: makes scores.
        select: drops groups.
        prompts: groups of a step.
        rounds: rollouts that a step may take; GateError beyond.
        count: gets what a step took and dropped.
        phase: times scoring.
    """

    def __init__(
        self,
        source: Source,
        score: Stage,
        select: Stage,
        *,
        prompts: int,
        rounds: int,
        count: Callable[[Mapping[str, float]], None],
        phase: Callable[[str], AbstractContextManager[Any]],
    ) -> None:
        self.source, self.score, self.select = source, score, select
        self.prompts, self.rounds = prompts, rounds
        self.count, self.phase = count, phase

    def __next__(self) -> Experience:
        kept: list[Experience] = []
        drawn = found = used = 0
        while found < self.prompts:
            if used == self.rounds:
                raise GateError(
                    f"after {used} rollouts {found} of {drawn} groups survived select, and a step needs {self.prompts}; "
                    "raise batch.resample, choose easier or harder prompts, or type batch.resample=1 for smaller steps"
                )
            exp = next(self.source)
            drawn, used = drawn + groups_in(exp), used + 1
            with self.phase("score"):
                exp = unparted(exp, self.select(self.score(exp)))
            found += groups_in(exp)
            kept.append(exp)
        whole = join(kept)
        exp = first_groups(whole, self.prompts)
        self.count(
            {"rollouts": used, "groups_drawn": drawn, "groups_survived": found, "groups_cut": found - self.prompts}
        )
        return exp

    def publish(self, version: int) -> None:
        """New weights."""
        self.source.publish(version)

    def state_dict(self) -> dict[str, Any]:
        """The source's: nothing is kept from one step to the next."""
        return self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The source's."""
        self.source.load_state_dict(state)


def groups_in(exp: Experience) -> int:
    """How many groups the rows form."""
    return len(torch.unique(exp.group)) if len(exp) else 0


def unparted(drawn: Experience, kept: Experience) -> Experience:
    """What is kept, without groups that are linked to one that was drawn and is not there any more.

    Linked groups are drawn side by side and their number divides a step, so that the first groups of the rest are whole links.
    """
    links = {g: s.link for s, g in zip(drawn.samples, drawn.group.tolist(), strict=True) if s.link}
    lost = {links[g] for g in links.keys() - set(kept.group.tolist())}
    stays = [i for i, s in enumerate(kept.samples) if s.link not in lost]
    return kept if len(stays) == len(kept) else kept.rows(torch.tensor(stays, dtype=torch.int64))


def first_groups(exp: Experience, n: int) -> Experience:
    """The rows of the first `n` groups, in their order."""
    names = torch.unique(exp.group)[:n]
    return exp.rows(torch.isin(exp.group, names).nonzero().flatten())


def join(parts: Sequence[Experience]) -> Experience:
    """Rows of several rollouts as one: columns padded to the widest, groups numbered on, pairs pointing at the new rows."""
    parts = [p for p in parts if len(p)] or list(parts[:1])
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, Any] = {}
    for f in fields(Experience):
        if f.name not in COLUMNS or getattr(parts[0], f.name) is None:
            continue
        columns[f.name] = torch.cat(_widened([getattr(p, f.name) for p in parts]))
    columns["group"] = torch.cat([g + start for g, start in zip(*_numbered(parts), strict=True)])
    if columns.get("pairs") is not None:
        starts = torch.tensor([0, *[len(p) for p in parts[:-1]]]).cumsum(0).tolist()
        columns["pairs"] = torch.cat([p.pairs + start for p, start in zip(parts, starts, strict=True)])
    names = dict.fromkeys(k for p in parts for k in p.components)
    empty = [torch.full((len(p),), float("nan")) for p in parts]
    components = {k: torch.cat([p.components.get(k, e) for p, e in zip(parts, empty, strict=True)]) for k in names}
    return replace(parts[0], samples=tuple(s for p in parts for s in p.samples), components=components, **columns)


def _numbered(parts: Sequence[Experience]) -> tuple[list[Tensor], list[int]]:
    """Groups of each part, and what is added to them so that no two parts share a number."""
    sizes = [int(p.group.max()) + 1 for p in parts]
    return [p.group for p in parts], torch.tensor([0, *sizes[:-1]]).cumsum(0).tolist()


def _widened(parts: Sequence[Tensor]) -> list[Tensor]:
    """All with the largest size of each dimension but the first, zeros behind."""
    most = [max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True)]
    pads = [[n for size, m in zip(p.shape[:0:-1], most[::-1], strict=True) for n in (0, m - size)] for p in parts]
    return [torch.nn.functional.pad(p, pad) for p, pad in zip(parts, pads, strict=True)]
