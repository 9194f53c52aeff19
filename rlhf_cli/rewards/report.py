"""What a reward does on a file of responses, before anything is trained on it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli.rewards.agreement import BANDS, Agreement, agreement
from rlhf_cli.rewards.combine import Combined
from rlhf_cli.stages import first_reason
from rlhf_cli.types import Sample, Scores

LENGTH_LIMIT = 0.5
QUANTILES = (0.1, 0.5, 0.9)
TOTAL = "reward"
WIDTH = 100


@dataclass(frozen=True)
class Row:
    """Statistics of one component, over the rows that have a value; NaN where there is none."""

    name: str
    weight: float | None  # None for a part of a scorer, and for the sum
    mean: float
    std: float
    low: float
    high: float
    quantiles: tuple[float, ...]  # QUANTILES
    missing: int
    milliseconds: float | None  # per sample
    length: float  # rank correlation with the response's words
    length_within: float  # the same inside groups, averaged over groups
    flat_groups: int  # groups of two or more whose values are all equal
    agreement: Agreement  # with the recorded preferences


@dataclass(frozen=True)
class ScoreReport:
    """All components of a reward on N samples in P groups, and what looks wrong."""

    samples: int
    groups: int
    comparable_groups: int  # groups of two or more
    pairs: int
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]


def report(
    samples: Sequence[Sample],
    group: Tensor,
    combined: Combined,
    pairs: Tensor | None = None,
    recorded: Tensor | None = None,
    scores: Scores | None = None,
) -> ScoreReport:
    """Score the samples once, unless `scores` are what the reward just gave, and describe every component.

    `pairs` [M, 2] are recorded (winner, loser) rows, `recorded` [N] recorded scores of rankings, NaN where there is none.
    """
    assert len(samples), "an empty file is an error of the reader"
    scores = combined(samples, group) if scores is None else scores
    words = torch.tensor([len(s.response.split()) for s in samples], dtype=torch.float32)
    pairs = torch.zeros(0, 2, dtype=torch.int64) if pairs is None else pairs
    columns = {TOTAL: scores.value, **scores.components} if len(combined.scorers) > 1 else dict(scores.components)
    members = _members(group)
    rows = tuple(
        _row(name, x, words, members, agreement(x, pairs, words, recorded, members), combined, len(samples))
        for name, x in columns.items()
    )
    comparable = sum(len(m) > 1 for m in members)
    notes = [
        note
        for r in rows
        if r.milliseconds is not None or r.name == TOTAL
        for note in _notes(r, len(samples), comparable)
    ]
    first = first_reason(scores, samples)
    notes += [f"not scored, {first}"] if first else []
    return ScoreReport(
        len(samples), len(members), comparable, len(pairs), rows, (*notes, *_text_notes(samples, members))
    )


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two [N] columns, ties at their mean rank; NaN where one is constant or N < 3."""
    if len(a) < 3:
        return float("nan")
    x, y = (_ranks(v) - (len(v) + 1) / 2 for v in (a, b))
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = x.double().unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()


def _members(group: Tensor) -> list[Tensor]:
    order = group.argsort(stable=True)
    sizes = group[order].unique_consecutive(return_counts=True)[1].tolist()
    return list(order.split(sizes))


def _row(
    name: str, x: Tensor, words: Tensor, members: Sequence[Tensor], agrees: Agreement, combined: Combined, n: int
) -> Row:
    kept = ~x.isnan()
    v, w = x[kept].double(), words[kept]
    nan = float("nan")
    seconds: Mapping[str, float] = {**combined.seconds, TOTAL: sum(combined.seconds.values())}
    inside = [(x[m][kept[m]], words[m][kept[m]]) for m in members if len(m) > 1]
    within = [c for a, b in inside if (c := spearman(a, b)) == c]
    return Row(
        name=name,
        weight=combined.scorers[name][0] if name in combined.scorers else None,
        mean=float(v.mean()) if len(v) else nan,
        std=float(v.std(correction=0)) if len(v) else nan,
        low=float(v.min()) if len(v) else nan,
        high=float(v.max()) if len(v) else nan,
        quantiles=tuple(torch.quantile(v, torch.tensor(QUANTILES, dtype=v.dtype)).tolist())
        if len(v)
        else (nan,) * len(QUANTILES),
        missing=int((~kept).sum()),
        milliseconds=1000 * seconds[name] / n if name in seconds else None,
        length=spearman(v, w),
        length_within=sum(within) / len(within) if within else nan,
        flat_groups=sum(bool(len(a) == 0 or a.min() == a.max()) for a, _ in inside),
        agreement=agrees,
    )


def _notes(r: Row, n: int, comparable: int) -> list[str]:
    notes = []
    if r.missing:
        notes.append(f"{r.name}: {r.missing} of {n} samples could not be scored; they would be left out of training")
    if r.missing < n and r.low == r.high:
        notes.append(f"{r.name}: every sample scores {r.low:.4g}; a constant reward teaches nothing")
    elif comparable and r.flat_groups == comparable:
        notes.append(
            f"{r.name}: constant within every one of the {comparable} groups; group-relative methods get no signal"
        )
    elif r.flat_groups:
        notes.append(f"{r.name}: constant within {r.flat_groups} of {comparable} groups; those groups give no signal")
    strongest = max((x for x in (r.length, r.length_within) if x == x), key=abs, default=0.0)
    if abs(strongest) > LENGTH_LIMIT:
        found = f"{_signed(r.length)} over all samples, {_signed(r.length_within)} within groups"
        way = "longer" if strongest > 0 else "shorter"
        notes.append(
            f"{r.name}: rank correlation with response length is {found} (limit {LENGTH_LIMIT}); "
            f"writing {way} may be enough to raise it"
        )
    return notes


def _text_notes(samples: Sequence[Sample], members: Sequence[Tensor]) -> list[str]:
    notes = []
    empty = sum(not s.response.strip() for s in samples)
    if empty:
        notes.append(f"{empty} of {len(samples)} responses are empty")
    repeated = sum(len(m) - len({samples[i].response for i in m.tolist()}) for m in members)
    if repeated:
        notes.append(f"{repeated} of {len(samples)} responses repeat another response to the same prompt")
    return notes


def render(r: ScoreReport) -> str:
    """The report as plain columns, at most 100 characters wide."""
    heads = (
        "component",
        "weight",
        "mean",
        "std",
        "min",
        *(f"p{100 * q:.0f}" for q in QUANTILES),
        "max",
        "absent",
        "ms",
        "length",
        "agree",
    )
    lines = [
        f"{r.samples} samples in {r.groups} groups" + (f", {r.pairs} recorded pairs" if r.pairs else ""),
        "",
        _line(heads),
    ]
    for row in r.rows:
        numbers = (row.mean, row.std, row.low, *row.quantiles, row.high)
        cells = [_shown(row), _cell(row.weight), *map(_cell, numbers), str(row.missing)]
        lines.append(_line([*cells, _cell(row.milliseconds), _cell(row.length), _cell(row.agreement.accuracy)]))
    lines += [
        "",
        "absent: not scored · ms: per sample, or s per 1,000 · agree: share of pairs",
        "length: rank correlation with words",
        "",
        *(_agreement_table(r.rows) if r.pairs else []),
    ]
    for warning in r.warnings:
        lines += textwrap.wrap(f"warning: {warning}", WIDTH, subsequent_indent=" " * 9)
    lines += [] if r.warnings else ["no warnings"]
    return "\n".join(lines)


def _agreement_table(rows: Sequence[Row]) -> list[str]:
    """Agreement with the recorded preferences, also where the winner is shorter, alike in length, or longer."""
    lines = [_line(("agreement", "pairs", "agree", "ties", "tau-b", *BANDS))]
    for r in rows:
        a = r.agreement
        bands = [_cell(share) for share, _ in a.bands]
        lines.append(_line([_shown(r), str(a.pairs), _cell(a.accuracy), str(a.ties), _cell(a.tau), *bands]))
    counts = (
        ", ".join(f"{n} {name}" for name, (_, n) in zip(BANDS, rows[0].agreement.bands, strict=True)) if rows else ""
    )
    return [*lines, "", f"tau-b: mean over prompts · winner's length against the loser's: {counts} pairs", ""]


def _shown(row: Row) -> str:
    return "  /" + row.name.partition("/")[2] if "/" in row.name else row.name


def _signed(x: float) -> str:
    return "unknown" if x != x else f"{x:+.2f}"


def _cell(x: float | None) -> str:
    """At most six characters."""
    if x is None or x != x:
        return "-"
    for places, limit in ((3, 10), (2, 100), (1, 1000), (0, 1e5)):
        if abs(x) < limit:
            return f"{x:.{places}f}"
    return f"{x:.0e}"


def _line(cells: Sequence[str]) -> str:
    name, *rest = cells
    return f"{name[:16]:<16}" + "".join(f"{c:>7}" for c in rest)
