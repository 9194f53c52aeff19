"""Only the best tokens of another model may be drawn: NLPO's masked policy.

Ramamurthy et al., "Is Reinforcement Learning (Not) for Natural Language Processing: Benchmarks, Baselines, and Building Blocks for
Natural Language Policy Optimization", arXiv:2210.01241, section 4. The set S of a token is the nucleus of a lagged copy of the
policy; the policy that samples, and learns, is pi(a) / pi(S) on S and 0 elsewhere. What was allowed is stored with every token, so
that the learner divides by the same set, whatever rounding or a refresh did meanwhile.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_cli.rollout.cache import attending, slot_cache

NUCLEUS = 1024  # best tokens tried before the whole vocabulary is sorted


class Mask:
    """Which tokens may be drawn, from the logits of the model that says so.

    Args:
        model: a language model with the sampler's tokenizer.
        top_p: mass of its best tokens; the token that crosses it belongs to them.
        min_tokens: best tokens that belong to them in any case.
        special: ids that may always be drawn.
    """

    def __init__(self, model: Any, *, top_p: float, min_tokens: int, special: Sequence[int]) -> None:
        self.model, self.top_p, self.min_tokens = model, top_p, min_tokens
        self.special = sorted(set(special))

    def allowed(self, logits: Tensor) -> Tensor:
        """[N, V] bool of logits [N, V], which are taken at temperature 1."""
        found = best(torch.softmax(logits.float(), -1), self.top_p, self.min_tokens)
        if self.special:
            found[:, torch.tensor(self.special, device=found.device)] = True
        return found


class Shadow:
    """The mask's model beside the sampler's: it reads the same prompts and tokens, in a cache of its own.

    Args:
        mask: whose model it runs.
        sampler: the sampler, whose way of reading prompts and tokens it shares.
        batch: the sampler's batch; what is fed to a slot is fed to the shadow's too.
    """

    def __init__(self, mask: Mask, sampler: Any, batch: Any) -> None:
        self.mask, self.lead = mask, batch
        self.sampler = copy.copy(sampler)
        self.sampler.model = mask.model
        self.batch = replace(  # the lists of slots stay the same objects; what decodes the sampler's own model does not come along
            batch, cache=slot_cache(batch.board), read={}, decoder=None, tree=None, shared=0
        )

    def load(self, taken: Mapping[int, list[int]]) -> None:
        """Read the prompts of slots that begin a row: prompt -> slots."""
        self.batch.started = self.lead.started
        self.sampler._load(self.batch, taken)

    def restrict(self, logits: Tensor) -> np.ndarray:
        """Ban what may not be drawn from the policy's logits [slots, V], in place; returns what may, packed [slots, B]."""
        allowed = self.mask.allowed(self.sampler._forward(self.batch))
        logits.masked_fill_(~allowed, float("-inf"))
        return packed(allowed)


@contextmanager
def beside(mask: Mask | None) -> Iterator[None]:
    """Let the mask's model, if there is one, read a cache of slots meanwhile."""
    if mask is None:
        yield
        return
    with attending(mask.model.config):
        yield


def best(p: Tensor, top_p: float, least: int) -> Tensor:
    """The smallest set of best tokens that holds `top_p` of the mass of p [N, V], and at least `least` of them, [N, V] bool.

    A token belongs to it while the mass of the better ones is at most `top_p`. Of equals the first ones come first.
    """
    if top_p >= 1:
        return torch.ones_like(p, dtype=torch.bool)
    vocabulary = p.shape[-1]
    k = min(max(NUCLEUS, least), vocabulary)
    order = p.topk(k, -1)
    mass = order.values.cumsum(-1, dtype=torch.float64)
    if k < vocabulary and bool((mass[:, -1] <= top_p).any()):
        order = p.sort(dim=-1, descending=True, stable=True)
        mass = order.values.cumsum(-1, dtype=torch.float64)
    before = F.pad(mass[:, :-1], (1, 0))
    kept = (before <= top_p) | (torch.arange(mass.shape[-1], device=p.device) < least)
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order.indices, kept)


def packed(allowed: Tensor) -> np.ndarray:
    """[N, B] uint8, a bit per token, of [N, V] bool."""
    return np.packbits(allowed.cpu().numpy(), axis=-1)


def aligned(rows: Sequence[Sequence[np.ndarray] | None]) -> Tensor:
    """The column `allowed` [N, S, B]: each row's sets in the order of its tokens, 0 after its end and where there was no mask."""
    rows = [row or () for row in rows]
    longest, width = max(map(len, rows)), next(len(row[0]) for row in rows if row)
    column = np.zeros((len(rows), longest, width), dtype=np.uint8)
    for i, row in enumerate(rows):
        if row:
            column[i, : len(row)] = np.stack(row)
    return torch.from_numpy(column)
