"""On-policy dialogues: the policy and an environment take turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.data.record import Record
from rlhf_cli.engine.comm import Comm
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.rollout.sampler import Decoding
from rlhf_cli.sources.assemble import align, row_seed
from rlhf_cli.sources.play import Played, Player, rewards_of, with_wave
from rlhf_cli.sources.sampled import Sampled
from rlhf_cli.types import Experience


class Episodes(Sampled):
    """`samples` dialogues to each of `prompts` records a step, or as many candidates for each turn, as the player's form says.

    Args:
        player: the environment and the sampler.
        others: as for `Sampled`.
    """

    def __init__(self, player: Player, *others: Any, **more: Any) -> None:
        super().__init__(*others, **more)
        self.player = player
        if self._greedy:
            raise ConfigError(
                "credit: a greedy response as baseline belongs to single responses; type environment=none, or another credit"
            )

    def __next__(self) -> Experience:
        chosen = self._take()
        at = range(self._drawn, self._drawn + self.prompts)
        self._drawn += self.prompts
        seeds = [row_seed(self.seed, self.version, p, k) for p in at for k in range(self.samples)]
        decoding = with_wave(self.sampler.decoding, len(seeds))
        played = play(self.player, [self.records[i] for i in chosen], self.samples, seeds, self.comm, decoding)
        self._rest()
        exp = experience([row for rows in played for row in rows], grouped(played))
        return Experience(**{**vars(exp), "version": torch.full((len(exp),), self.version)})


def play(
    player: Player, records: Sequence[Record], k: int, seeds: Sequence[int], comm: Comm, decoding: Decoding
) -> list[list[Played]]:
    """The rows of every record, on every rank: ranks play whole records in turn."""
    mine = range(comm.rank, len(records), comm.world)
    own: list[list[Played]] = []
    if len(mine):
        own = player.play([records[i] for i in mine], k, [seeds[i * k + j] for i in mine for j in range(k)], decoding)
    parts = comm.gather(own)
    return [parts[p % comm.world][p // comm.world] for p in range(len(records))]


def grouped(played: Sequence[Sequence[Played]]) -> Tensor:
    """[N] group numbers: the rows that answered one prompt."""
    numbers: dict[tuple[int, int], int] = {}
    keys = [(p, row.group) for p, rows in enumerate(played) for row in rows]
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int64)


def experience(played: Sequence[Played], group: Tensor) -> Experience:
    """N rows, right-padded with 0. The mask covers the policy's turns; `turn_reward` stands at the last token of each."""
    whole = [row.context() for row in played]
    width = max(map(len, whole))
    ids = torch.zeros(len(whole), width, dtype=torch.int64)
    mask = torch.zeros(len(whole), width, dtype=torch.bool)
    reward = torch.zeros(len(whole), width)
    logp: list[list[float]] = []
    for i, row in enumerate(played):
        ids[i, : len(whole[i])] = torch.tensor(whole[i])
        logp.append([x for _, own in row.pieces for x in own or ()])
        for (start, stop), earned in zip(own_turns(row), rewards_of(row), strict=True):
            mask[i, start:stop] = True
            reward[i, stop - 1] = 0.0 if math.isnan(earned) else earned  # a row with a missing reward leaves the step
    lengths = torch.tensor([len(x) for x in whole])
    exp = Experience(
        samples=tuple(row.sample() for row in played),
        ids=ids,
        attention=torch.arange(width) < lengths[:, None],
        mask=mask,
        group=group,
        truncated=torch.tensor([row.truncated for row in played]),
        turn_reward=reward,
    )
    return Experience(**{**vars(exp), "behavior_logp": align(logp, exp)})


def own_turns(row: Played) -> list[tuple[int, int]]:
    """[start, stop) of each of the policy's turns among the row's tokens."""
    spans, at = [], len(row.prompt)
    for ids, logp in row.pieces:
        if logp is not None:
            if len(logp) != len(ids):
                raise GateError(f"a turn of {len(ids)} tokens has {len(logp)} log-probs")
            spans.append((at, at + len(ids)))
        at += len(ids)
    return spans
