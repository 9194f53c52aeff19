"""Training on some of the prompts only: those on which the initial policy does worst, or another band of its scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_cli.data.record import Record, units
from rlhf_cli.engine.comm import Comm
from rlhf_cli.errors import ConfigError
from rlhf_cli.prepass import Prepass

FILE = "chosen.json"


def choose(score: Mapping[int, float], groups: Sequence[Sequence[int]], k: int, band: str, seed: int) -> list[int]:
    """`k` records of a band, in their order in the file: the k lowest scores, the k highest, the window in the middle, or any k.

    `score` of records; those without one are never chosen. `groups` are records that stay together, all of one size: they are judged
    by their mean. Equal scores keep the order of the file.
    """
    known = [g for g in groups if all(i in score for i in g)]
    many = k // max(1, len(groups[0]) if groups else 1)
    if len(known) < many:
        raise ConfigError(
            f"dataset.hardest={k}: only {sum(map(len, known))} training prompts have a score of the initial policy; type a smaller number"
        )
    ranked = sorted(known, key=lambda g: sum(score[i] for i in g) / len(g))
    start = {"hardest": 0, "medium": (len(ranked) - many) // 2, "easiest": len(ranked) - many}
    if band == "random":
        mixed = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
        picked = [known[i] for i in mixed[:many]]
    else:
        picked = ranked[start[band] : start[band] + many]
    return sorted(i for g in picked for i in g)


@dataclass
class Banded:
    """A prepass, and after it a source that draws from the chosen prompts only; which they are is written to the run.

    Args:
        prepass: gives every training prompt its scores.
        keep: tells the source which records it may draw.
        records: training records.
        weights: of the rewards in a score.
        hardest, band: how many, and which.
        path: where they are written.
    """

    prepass: Prepass
    keep: Callable[[Sequence[int]], None]
    records: Sequence[Record]
    weights: Mapping[str, float]
    hardest: int
    band: str
    seed: int
    path: Path
    comm: Comm

    def run(self, at: int, asked: Callable[[], bool], note: Callable[[str], None]) -> bool:
        """False where a signal asked to stop."""
        if not self.prepass.run(at, asked, note):
            return False
        score = self.scores()
        chosen = choose(score, units(self.records), self.hardest, self.band, self.seed)
        self.keep(chosen)
        mean, whole = (sum(score[i] for i in some) / len(some) for some in (chosen, list(score)))
        if at == 0:
            note(
                f"{len(chosen)} of {len(self.records)} training prompts are drawn ({self.band}): the initial policy scores "
                f"{mean:.4f} on them, {whole:.4f} on all; {self.path.name} lists them"
            )
        if self.comm.rank == 0:
            listed = [{"uid": self.records[i].uid, "where": self.records[i].where, "score": score[i]} for i in chosen]
            self.path.write_text(json.dumps({"band": self.band, "chosen": listed}, indent=1), encoding="utf-8")
        return True

    def scores(self) -> dict[int, float]:
        """Record -> mean over its responses of the weighted sum of rewards; those that lack one in every response are left out."""
        found = self.prepass.references()
        total = sum(w * found.scores[n].double() for n, w in self.weights.items() if w)
        assert isinstance(total, torch.Tensor), "a run with rewards has a weight that is not 0"
        means = total.nanmean(-1).tolist()
        rows = {i: found.row[r.uid] for i, r in enumerate(self.records)}
        return {i: means[row] for i, row in rows.items() if means[row] == means[row]}


def banded(cfg: Any, prepass: Prepass | None, source: Any, scorer: Any, folder: Path | None) -> Any:
    """The prepass, and what chooses prompts by it where `dataset.hardest` says so."""
    if prepass is None or not cfg.dataset.hardest:
        return prepass
    path = (folder or Path(cfg.run.dir) / cfg.run.name) / FILE
    return Banded(
        prepass, source.keep, prepass.records, scorer.weights, cfg.dataset.hardest, cfg.dataset.band, cfg.seed, path, prepass.comm
    )  # fmt: skip
