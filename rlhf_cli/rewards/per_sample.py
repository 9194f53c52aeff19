"""What the reward sources that look at one response at a time share. Imports no torch: their worker processes need none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores


class Row(NamedTuple):
    """The score of one response; a value of None is missing, and `reason` says why."""

    value: float | None
    parts: Mapping[str, float | None] = {}  # logged beside the value
    reason: str = ""


def column(values: Sequence[float | None]) -> Tensor:
    """A float32 column [N]; None becomes NaN."""
    import torch

    return torch.tensor([float("nan") if v is None else float(v) for v in values], dtype=torch.float32)


def scored(rows: Iterable[Row]) -> Scores:
    """Scores [N] of N rows; a part that a row lacks is NaN there."""
    import torch

    from rlhf_cli.types import Scores

    rows = list(rows)
    names = dict.fromkeys(name for r in rows for name in r.parts)
    return Scores(
        column([r.value for r in rows]),
        torch.tensor([r.value is None for r in rows], dtype=torch.bool),
        {name: column([r.parts.get(name) for r in rows]) for name in names},
        reasons={i: r.reason for i, r in enumerate(rows) if r.value is None},
    )


def groups_of(group: Sequence[int]) -> list[list[int]]:
    """The rows of each group, groups in the order in which they first appear."""
    members: dict[int, list[int]] = {}
    for i, g in enumerate(group):
        members.setdefault(g, []).append(i)
    return list(members.values())


def references_of(sample: Sample) -> tuple[str, ...]:
    """The references that hold any text."""
    return tuple(r for r in sample.references if r.strip())


def by_references(
    samples: Sequence[Sample], prepare: Callable[[tuple[str, ...]], Callable[[str], float | None]]
) -> Iterator[Row]:
    """Score each response against its references; `prepare` runs once for neighbours that share theirs, as a group's rows do.

    A sample without references is missing.
    """
    ready: tuple[tuple[str, ...], Callable[[str], float | None]] | None = None
    for sample in samples:
        references = references_of(sample)
        if not references:
            yield Row(None, reason="it has no reference")
            continue
        if ready is None or ready[0] != references:
            ready = references, prepare(references)
        value = ready[1](sample.response)
        yield Row(value, reason="its references cannot be compared with" if value is None else "")
