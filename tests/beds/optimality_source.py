"""Rows of a step on a table: each possible group as often as its probability says, sampled or recorded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from optimality_envs import Env, Law
from torch import Tensor

from rlhf_cli.types import Experience, Sample

GOLDEN = 0.6180339887498949


def code(ids: Tensor, mask: Tensor) -> Tensor:
    """A number for each row of binary tokens [.., T]: its digits in base 3, 0 where there is no token."""
    return (torch.where(mask, ids + 1, 0) * 3 ** torch.arange(ids.shape[-1])).sum(-1)


class Systematic:
    """`prompts` groups of `samples` responses, each possible group as often as its probability says, to within one.

    Responses are drawn from the table, or from the law `data` of a record. `paired` groups are (winner, loser): two responses of
    the record, and who wins is as likely as Bradley and Terry say, sigmoid(r - r').
    """

    def __init__(
        self,
        env: Env,
        table: Any,
        prompts: int,
        samples: int,
        greedy: bool,
        *,
        data: Law | None = None,
        paired: bool = False,
    ) -> None:
        self.env, self.table, self.prompts, self.samples, self.greedy = env, table, prompts, samples, greedy
        self.data, self.paired = data, paired
        self.names = list(env.reward)
        self.groups = torch.tensor(list(itertools.product(range(len(self.names)), repeat=samples)))  # [G, k]
        self.version = 0
        width = max(map(len, self.names))
        self.tokens = torch.tensor([[int(c) for c in y.ljust(width, "0")] for y in self.names])
        self.lengths = torch.tensor([len(y) for y in self.names])
        self.rewards = torch.tensor([env.reward[y] for y in self.names])
        most = prompts * (samples + bool(greedy))
        self.made = [[Sample("", y, uid=str(n)) for y in self.names] for n in range(most)]  # of each row, by response

    def __next__(self) -> Experience:
        edges = self._weights().cumsum(0)
        offset = (0.5 + GOLDEN * self.version) % 1
        at = (torch.arange(self.prompts, dtype=torch.float64) + offset) / self.prompts * edges[-1]
        chosen = self.groups[torch.searchsorted(edges, at).clamp(max=len(edges) - 1)]  # [P, k]
        if self.greedy:
            best = self.names.index(self._greedy())
            chosen = torch.cat([chosen, torch.full((self.prompts, 1), best)], -1)
        rows = chosen.flatten()
        mask = torch.arange(self.tokens.shape[1]) < self.lengths[rows, None]
        exp = Experience(
            samples=tuple(of_row[i] for of_row, i in zip(self.made, rows.tolist(), strict=True)),
            ids=self.tokens[rows],
            attention=mask,
            mask=mask,
            group=torch.arange(self.prompts).repeat_interleave(chosen.shape[1]),
            version=torch.full((len(rows),), self.version),
            greedy=(torch.arange(len(rows)) % (self.samples + 1) == self.samples) if self.greedy else None,
        )
        return exp.filled(self._recorded(rows) if self.data is not None else self._sampled(exp))

    def _weights(self) -> Tensor:
        """[G] how likely each group is."""
        law = self.data if self.data is not None else self.table.law()
        likely = torch.tensor([law[y] for y in self.names], dtype=torch.float64)[self.groups].prod(-1)
        first, *others = self.rewards[self.groups].unbind(-1)
        return likely * torch.sigmoid(first - others[0]) if self.paired else likely

    def _sampled(self, exp: Experience) -> dict[str, Tensor]:
        logp = self.table.infer(exp, frozenset({"logp"}))["logp"]
        return {"behavior_logp": logp, "truncated": torch.zeros(len(exp), dtype=torch.bool)}

    def _recorded(self, rows: Tensor) -> dict[str, Tensor]:
        pairs = {"pairs": torch.arange(len(rows)).reshape(-1, 2)} if self.paired else {}
        return {"label": self.rewards[rows], **pairs}

    def _greedy(self) -> str:
        y = ""
        while y not in self.env.reward:
            p = self.table.theta[self.table.contexts.index(self.env.context(y))]
            y += str(int(p.argmax()))
        return y

    def publish(self, version: int) -> None:
        """The offset moves on, so that rounding averages out."""
        self.version = version

    def state_dict(self) -> dict[str, Any]:
        """Nothing is resumed here."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is resumed here."""
