"""On-policy experience: the policy answers prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from rlhf_cli.data.record import Record, check_links, units
from rlhf_cli.engine.comm import Comm
from rlhf_cli.rollout.masking import aligned
from rlhf_cli.rollout.sampler import Decoding, Sampler
from rlhf_cli.sources.assemble import Order, align, row_seed, rows, sample_of, texts_of
from rlhf_cli.types import Experience, Sample

__all__ = ["Drawn", "Sampled", "draw", "early", "row_seed"]

Done = Callable[[int, list[list[int]]], None]


class Sampled:
    """`samples` responses to each of `prompts` prompts a step, drawn by all ranks and gathered on each.

    Args:
        records: training prompts.
        encoded: their token ids.
        sampler: draws responses from the current policy.
        publish: brings new policy weights to the sampler; called after every step.
        comm: the ranks; whole groups are drawn by one rank.
        prompts: prompts per step.
        samples: responses per prompt.
        seed: of the order and of every row.
        greedy: add a greedy response to every group, whose score is its baseline.
        begin: gets the samples of each group that this rank has drawn, at once, while it draws others.
        rest: called when the rows of a step are drawn, before the update.
    """

    def __init__(
        self,
        records: Sequence[Record],
        encoded: Sequence[Sequence[int]],
        sampler: Sampler,
        publish: Callable[[], None],
        comm: Comm,
        *,
        prompts: int,
        samples: int,
        seed: int,
        greedy: bool = False,
        begin: Callable[[Sequence[Sample]], None] | None = None,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        self.records, self.encoded, self.sampler, self.comm = records, encoded, sampler, comm
        self.prompts, self.samples, self.seed = prompts, samples, seed
        self._greedy, self._publish, self._begin, self._rest = greedy, publish, begin, rest
        check_links(records, prompts)
        self._units = units(records)  # linked records are drawn in one step
        self._order = Order(len(self._units), seed)
        self.version = 0
        self._drawn = 0  # prompts drawn at this version: a further rollout of a step has other random numbers

    def __next__(self) -> Experience:
        chosen = self._take()
        at = range(self._drawn, self._drawn + self.prompts)
        self._drawn += self.prompts
        best = self._best(chosen, at) if self._greedy else None
        seeds = [row_seed(self.seed, self.version, p, k) for p in at for k in range(self.samples)]
        done = early(self._begin, self.sampler, [self.records[i] for i in chosen], best.ids if best else ())
        prompts = [self.encoded[i] for i in chosen]
        decoding = replace(self.sampler.decoding, wave=len(seeds), longest=max(map(len, prompts), default=0))
        drawn = draw(self.sampler, prompts, self.samples, seeds, self.comm, decoding, done=done)
        self._rest()
        exp = self._experience(chosen, together(drawn, best, self.samples), self.samples + (best is not None))
        if best is None:
            return exp
        return replace(exp, greedy=(torch.arange(len(exp)) % (self.samples + 1)) == self.samples)

    def keep(self, chosen: Sequence[int]) -> None:
        """From now on draw only from these records. The position in the order stays, so this may come after a resume."""
        kept = set(chosen)
        self._units = [u for u in units(self.records) if kept.issuperset(u)]
        self._order.size = len(self._units)

    def _take(self) -> list[int]:
        """The records of the next step, linked ones side by side."""
        size = len(self._units[0]) if self._units else 1
        return [i for u in self._order.take(self.prompts // size) for i in self._units[u]]

    def _best(self, chosen: Sequence[int], at: Sequence[int]) -> Drawn:
        """The greedy response to each prompt."""
        decoding = replace(self.sampler.decoding, temperature=0.0, top_p=1.0, top_k=0, wave=len(chosen))
        seeds = [row_seed(self.seed, self.version, p, self.samples) for p in at]
        return draw(self.sampler, [self.encoded[i] for i in chosen], 1, seeds, self.comm, decoding)

    def _experience(self, chosen: Sequence[int], drawn: Drawn, each: int) -> Experience:
        owner = [i for i in chosen for _ in range(each)]
        texts = texts_of(self.sampler, drawn.ids)
        group = torch.arange(len(chosen)).repeat_interleave(each)
        samples = [sample_of(self.records[i], t) for i, t in zip(owner, texts, strict=True)]
        exp = rows([self.encoded[i] for i in owner], drawn.ids, samples, group)
        columns: dict[str, Any] = {
            "version": torch.full((len(owner),), self.version),
            "truncated": torch.as_tensor(drawn.truncated),
            "behavior_logp": align(drawn.logp, exp),
        }
        if any(sets is not None for sets in drawn.allowed):
            columns["allowed"] = aligned(drawn.allowed)
        return Experience(**{**vars(exp), **columns})

    def publish(self, version: int) -> None:
        """The policy has new weights."""
        self.version, self._drawn = version, 0
        self._publish()

    def state_dict(self) -> dict[str, Any]:
        """Position in the order."""
        return {"cursor": self._order.cursor, "version": self.version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position."""
        self._order.cursor, self.version = int(state["cursor"]), int(state["version"])


class Drawn(NamedTuple):
    """Responses of all ranks, in the order of the prompts."""

    ids: list[list[int]]
    logp: list[list[float]]
    truncated: list[bool]
    allowed: list[Any]  # None without a mask


def together(drawn: Drawn, best: Drawn | None, k: int) -> Drawn:
    """Each prompt's k responses, then its one of `best`."""
    if best is None:
        return drawn
    pairs = zip(drawn, best, strict=True)
    return Drawn(*([x for p, b in enumerate(two) for x in [*one[p * k : (p + 1) * k], b]] for one, two in pairs))


def early(
    begin: Callable[[Sequence[Sample]], None] | None,
    sampler: Sampler,
    records: Sequence[Record],
    best: Sequence[list[int]] = (),
) -> Done | None:
    """A `done` of `draw` that hands each group's samples, and the one of `best` that belongs to it, to `begin`."""
    if begin is None:
        return None
    return lambda p, ids: begin([sample_of(records[p], t) for t in texts_of(sampler, [*ids, *best[p : p + 1]])])


def draw(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    k: int,
    seeds: Sequence[int],
    comm: Comm,
    decoding: Decoding | None = None,
    done: Done | None = None,
) -> Drawn:
    """`k` responses to each prompt: ranks draw whole groups in turn, and every rank gets all of them in order.

    `done` gets each prompt's index and its responses as soon as they are complete, on the rank that draws them.
    """
    mine = range(comm.rank, len(prompts), comm.world)
    own: list[tuple[list[int], list[float], bool, Any]] = []
    if len(mine):
        drawn = sampler.sample(
            [prompts[i] for i in mine],
            k,
            [seeds[i * k + j] for i in mine for j in range(k)],
            decoding,
            done and (lambda p, ids: done(mine[p], ids)),
        )
        logp = drawn.logp.tolist()
        own = [
            (ids, logp[i][: len(ids)], bool(cut), drawn.allowed[i] if drawn.allowed else None)
            for i, (ids, cut) in enumerate(zip(drawn.ids, drawn.truncated.tolist(), strict=True))
        ]
    parts = comm.gather(own)
    everyone = [parts[p % comm.world][(p // comm.world) * k + j] for p in range(len(prompts)) for j in range(k)]
    return Drawn(*(list(column) for column in zip(*everyone, strict=True)))
