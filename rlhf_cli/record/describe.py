"""The numbers and texts of a batch, as they go into metrics.jsonl and samples.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.types import Experience


def describe(exp: Experience) -> dict[str, Any]:
    """The numbers of a batch. Sums are exact, so that no thread count matters; missing scores (NaN) are left out."""
    from rlhf_cli.types import NAMES

    lengths = _numbers(exp.mask.sum(-1)) if exp.mask is not None else []
    row: dict[str, Any] = {}
    if exp.score is not None:
        row |= _score_row(_numbers(exp.score), _numbers(exp.group) if exp.group is not None else [])
    parts = {k: _finite(_numbers(v)) for k, v in exp.components.items() if k.rpartition("/")[2] not in NAMES}
    row |= {f"component/{k}": mean(v) for k, v in parts.items() if v}
    if exp.reward is not None and len(exp):
        row["score/shaped"] = mean(_numbers(exp.reward.double().sum(-1)))
    if exp.advantage is not None and exp.advantage.numel():
        row["advantage/abs_max"] = float(exp.advantage.abs().max())
    if lengths:
        row |= {"response/length": mean(lengths), "response/length_max": int(max(lengths))}
    if exp.ref_logp is not None and len(exp):
        from rlhf_cli.detectors import frontier

        row |= {f"hack/{k}": mean(v) for k, v in frontier(exp).items()}
    if exp.truncated is not None and len(exp):
        row["response/truncated"] = mean(_numbers(exp.truncated))
    row["count/rows"] = len(exp)
    if exp.group is not None:
        row["count/groups"] = len(set(exp.group.tolist()))
    if exp.pairs is not None:
        row["count/pairs"] = len(exp.pairs)
    row["count/response_tokens"] = int(sum(lengths))
    row["count/tokens"] = int(exp.attention.sum()) if exp.attention is not None else 0
    return row


def rows_of(exp: Experience, limit: int) -> list[dict[str, Any]]:
    """The first rows with their texts: what samples.jsonl holds."""
    columns = {"group": exp.group, "score": exp.score, "truncated": exp.truncated}
    there: dict[str, list[Any]] = {k: v[:limit].tolist() for k, v in columns.items() if v is not None}
    if exp.mask is not None:
        there["length"] = exp.mask[:limit].sum(-1).tolist()
    parts = {k: v[:limit].tolist() for k, v in exp.components.items()}
    return [
        {"row": i, "uid": s.uid}
        | {k: v[i] for k, v in there.items()}
        | {"components": {k: v[i] for k, v in parts.items()}, "prompt": s.prompt, "response": s.response}
        | ({"turns": s.meta["turns"]} if "turns" in s.meta else {})
        for i, s in enumerate(exp.samples[:limit])
    ]


def _score_row(scores: list[float], groups: list[float]) -> dict[str, Any]:
    """Mean, population standard deviation, missing count, share of groups (of two or more) whose rows score equal."""
    there = _finite(scores)
    row: dict[str, Any] = {"score/missing": len(scores) - len(there)}
    if there:
        centre = mean(there)
        row |= {"score/mean": centre, "score/std": math.sqrt(mean([(x - centre) ** 2 for x in there]))}
    by_group: dict[float, list[float]] = {}
    for g, x in zip(groups, scores, strict=False):
        if math.isfinite(x):
            by_group.setdefault(g, []).append(x)
    many = [v for v in by_group.values() if len(v) > 1]
    if many:
        row["score/zero_variance"] = sum(min(v) == max(v) for v in many) / len(many)
    return row


def _numbers(x: Tensor) -> list[float]:
    return [float(v) for v in x.tolist()]


def _finite(values: Sequence[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]


def mean(values: Sequence[float]) -> float:
    """Exactly rounded sum over the count; NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
