"""What the reward sources that look at one response at a time share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rlhf_cli.types import Sample, Scores


def column(values: Sequence[float | None]) -> Tensor:
    """A float32 column [N]; None becomes NaN."""
    return torch.tensor([float("nan") if v is None else float(v) for v in values], dtype=torch.float32)


def scored(values: Sequence[float | None], components: Mapping[str, Sequence[float | None]] | None = None) -> Scores:
    """Scores from plain numbers; None is a missing score."""
    missing = torch.tensor([v is None for v in values], dtype=torch.bool)
    return Scores(column(values), missing, {name: column(part) for name, part in (components or {}).items()})


def references_of(sample: Sample) -> tuple[str, ...]:
    """The references that hold any text."""
    return tuple(r for r in sample.references if r.strip())


def by_references(
    samples: Sequence[Sample], prepare: Callable[[tuple[str, ...]], Callable[[str], float | None]]
) -> list[float | None]:
    """Score each response against its references; `prepare` runs once per distinct set, as a group's rows share theirs.

    A sample without references is missing.
    """
    rows: dict[tuple[str, ...], list[int]] = {}
    for i, sample in enumerate(samples):
        rows.setdefault(references_of(sample), []).append(i)
    values: list[float | None] = [None] * len(samples)
    for references, members in rows.items():
        if not references:
            continue
        score = prepare(references)
        for i in members:
            values[i] = score(samples[i].response)
    return values
