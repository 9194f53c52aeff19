"""Held-out evaluation with the training reward's own code, and what can be claimed from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_cli.data.record import Record
from rlhf_cli.engine.comm import Comm
from rlhf_cli.report.diversity import diversity
from rlhf_cli.rollout.sampler import Decoding, Sampler
from rlhf_cli.sources.assemble import sample_of, texts_of
from rlhf_cli.sources.episodes import grouped, play
from rlhf_cli.sources.play import Player, with_wave
from rlhf_cli.sources.sampled import draw, early, row_seed
from rlhf_cli.stages import score_sharded
from rlhf_cli.types import NAMES, Experience, Sample, Scorer

Row = dict[str, Any]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0


def bootstrap(values: Sequence[float], resamples: int, seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean of `values` (B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13)."""
    x = torch.tensor(values, dtype=torch.float64)
    if not len(x):
        return Interval(float("nan"), float("nan"), float("nan"))
    g = torch.Generator().manual_seed(seed)
    at_once = max(1, 2**22 // len(x))  # resamples whose indices exist at a time
    sizes = [min(at_once, resamples - done) for done in range(0, resamples, at_once)]
    means = torch.cat([x[torch.randint(len(x), (n, len(x)), generator=g)].mean(-1) for n in sizes])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(x.mean()), low, high)


def by_prompt(rows: Sequence[Row]) -> list[float]:
    """One mean score per prompt: the samples of one prompt are not independent. Rows without a score are left out."""
    found: dict[str, list[float]] = {}
    for r in rows:
        if r.get("score") is not None:
            found.setdefault(str(r["uid"]), []).append(r["score"])
    return [sum(x) / len(x) for x in found.values()]


def paired(before: Sequence[Row], after: Sequence[Row], resamples: int) -> Interval:
    """Interval of the mean difference of scores, prompt by prompt; rows without a score on either side are left out."""
    first = {(r["uid"], r["sample"]): r["score"] for r in before}
    changes: list[Row] = []
    for r in after:
        old = first.get((r["uid"], r["sample"]))
        if old is not None and r["score"] is not None:
            changes.append({"uid": r["uid"], "score": r["score"] - old})
    return bootstrap(by_prompt(changes), resamples)


def generate_and_score(
    sampler: Sampler,
    scorer: Scorer | None,
    records: Sequence[Record],
    encoded: Sequence[Sequence[int]],
    comm: Comm,
    decoding: Decoding,
    *,
    k: int,
    seed: int,
    player: Player | None = None,
) -> list[Row]:
    """`k` responses to every record, or `k` dialogues with the player's environment, and their scores: one row each, on every rank."""
    seeds = [row_seed(seed, -1, p, j) for p in range(len(records)) for j in range(k)]
    if player is not None:
        rows, samples, group = _dialogues(player, records, k, seeds, comm, decoding)
    else:
        drawn = draw(
            sampler, encoded, k, seeds, comm, decoding, early(getattr(scorer, "begin", None), sampler, records)
        )
        owner = [records[i] for i in range(len(records)) for _ in range(k)]
        samples = tuple(sample_of(r, t) for r, t in zip(owner, texts_of(sampler, drawn.ids), strict=True))
        group = torch.arange(len(records)).repeat_interleave(k)
        rows = [
            _row(s, n % k, len(ids), cut)
            for n, (s, ids, cut) in enumerate(zip(samples, drawn.ids, drawn.truncated, strict=True))
        ]
    if scorer is None:
        return rows
    scores = score_sharded(
        scorer, Experience(samples=samples, ids=torch.zeros(len(rows), 1, dtype=torch.int64), group=group), comm
    )
    missing = scores.missing if scores.missing is not None else torch.zeros(len(rows), dtype=torch.bool)
    parts = {c: x for c, x in scores.components.items() if c.rpartition("/")[2] not in NAMES}
    for n, row in enumerate(rows):
        row["score"] = None if missing[n] else float(scores.value[n])
        row["components"] = {c: float(x[n]) for c, x in parts.items() if not torch.isnan(x[n])}
    return rows


def _row(sample: Sample, number: int, tokens: int, truncated: bool) -> Row:
    names = {"uid": sample.uid, "sample": number, "prompt": sample.prompt, "response": sample.response}
    turns = {"turns": [t["response"] for t in sample.meta["turns"]]} if "turns" in sample.meta else {}
    return names | turns | {"tokens": tokens, "truncated": bool(truncated)}


def _dialogues(
    player: Player, records: Sequence[Record], k: int, seeds: Sequence[int], comm: Comm, decoding: Decoding
) -> tuple[list[Row], tuple[Sample, ...], torch.Tensor]:
    """Rows, samples and groups [N] of dialogues, or of their turns."""
    played = play(player, records, k, seeds, comm, with_wave(decoding, len(seeds)))
    flat = [(j, row) for rows in played for j, row in enumerate(rows)]
    samples = tuple(row.sample() for _, row in flat)
    spoken = [sum(len(ids) for ids, logp in row.pieces if logp is not None) for _, row in flat]
    rows = [_row(s, j, n, row.truncated) for s, (j, row), n in zip(samples, flat, spoken, strict=True)]
    return rows, samples, grouped(played)


def summarise(rows: Sequence[Row], resamples: int, varied: bool = False) -> dict[str, float]:
    """Means over rows: score with its interval, each component, length, truncation; how `varied` they are, where asked."""
    scored = by_prompt(rows)
    found = {
        "tokens": sum(r["tokens"] for r in rows) / len(rows),
        "truncated": sum(r["truncated"] for r in rows) / len(rows),
    }
    if scored:
        ci = bootstrap(scored, resamples)
        found |= {
            "reward": ci.mean,
            "reward_low": ci.low,
            "reward_high": ci.high,
            "missing": float(sum(r.get("score") is None for r in rows)),
        }
    names = sorted({c for r in rows for c in r.get("components", {})})
    for c in names:
        have = [r["components"][c] for r in rows if c in r.get("components", {})]
        found[f"reward/{c}"] = sum(have) / len(have)
    return found | ({f"diversity/{k}": v for k, v in diversity(rows).items()} if varied else {})


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line, written aside and renamed."""
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    aside.replace(path)


def read_rows(path: Path) -> list[Row]:
    """What `write_rows` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
