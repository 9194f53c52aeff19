"""Recorded experience: demonstrations, preference pairs, rankings, thumbs. Objectives cannot tell it from sampled rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rlhf_cli.data.record import Record
from rlhf_cli.sources.assemble import Order, rows, sample_of
from rlhf_cli.types import Experience


class Recorded:
    """`prompts` records a step, each with all its responses.

    Args:
        records: training records with responses.
        encoded: their prompts' token ids.
        answers: token ids of every response of every record, end of turn included.
        publish: brings new policy weights to the sampler that evaluates.
        prompts: records per step.
        seed: of the order.
    """

    def __init__(
        self,
        records: Sequence[Record],
        encoded: Sequence[Sequence[int]],
        answers: Sequence[Sequence[Sequence[int]]],
        publish: Callable[[], None],
        *,
        prompts: int,
        seed: int,
    ) -> None:
        self.records, self.encoded, self.answers, self.prompts = records, encoded, answers, prompts
        self._publish = publish
        self._order = Order(len(records), seed)
        self._paired = any(r.pairs for r in records)  # a step of ties then has no pairs, rather than no column of pairs

    def __next__(self) -> Experience:
        return self.experience(self._order.take(self.prompts))

    def experience(self, chosen: Sequence[int]) -> Experience:
        """The rows of some records, with their pairs as edges over rows."""
        owner = [(i, j) for i in chosen for j in range(len(self.answers[i]))]
        counts = torch.tensor([len(self.answers[i]) for i in chosen])
        first = counts.cumsum(0) - counts
        samples = [sample_of(self.records[i], self.records[i].responses[j]) for i, j in owner]
        group = torch.arange(len(chosen)).repeat_interleave(counts)
        exp = rows([self.encoded[i] for i, _ in owner], [self.answers[i][j] for i, j in owner], samples, group)
        return replace(exp, **self._labels(chosen, first.tolist(), len(owner)))

    def _labels(self, chosen: Sequence[int], first: Sequence[int], n: int) -> dict[str, Any]:
        edges = [(at + w, at + lo) for i, at in zip(chosen, first, strict=True) for w, lo in self.records[i].pairs]
        margins = [m for i in chosen for m in self.records[i].margins]
        labels = [
            x
            for i in chosen
            for x in (self.records[i].scores or (self.records[i].label,) * len(self.records[i].responses))
        ]
        columns: dict[str, Any] = {"version": torch.zeros(n, dtype=torch.int64)}
        if self._paired:
            columns["pairs"] = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2)
        if self._paired and len(margins) == len(edges):
            columns["margin"] = torch.tensor(margins, dtype=torch.float32)
        if all(x is not None for x in labels):
            columns["label"] = torch.tensor(labels, dtype=torch.float32)
        return columns

    def publish(self, version: int) -> None:
        """A recording does not change with the policy; the sampler that evaluates does."""
        self._publish()

    def state_dict(self) -> dict[str, Any]:
        """Position in the order."""
        return {"cursor": self._order.cursor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position."""
        self._order.cursor = int(state["cursor"])
