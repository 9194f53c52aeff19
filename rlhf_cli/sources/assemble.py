"""From token lists and texts to an `Experience`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.data.record import Record
from rlhf_cli.types import Experience, Sample


def row_seed(*parts: int) -> int:
    """A 63-bit seed from integers; rows with different parts are independent, whatever batch they are drawn in."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample_of(record: Record, response: str) -> Sample:
    """The text view of one row; the whole conversation travels in `meta["messages"]`."""
    meta = {**record.meta, "messages": [dict(m) for m in record.messages], "where": record.where}
    return Sample(record.prompt, response, record.references, meta, record.uid, record.link)


def texts_of(sampler: Any, ids: Sequence[Sequence[int]]) -> list[str]:
    """What scorers read: the response without special tokens, cut before a stop text, stripped."""
    texts = []
    for row in ids:
        text = sampler.tokenizer.decode(row, skip_special_tokens=True)
        for stop in sampler.decoding.stop:
            text = text.partition(stop)[0]
        texts.append(text.strip())
    return texts


def rows(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], samples: Sequence[Sample], group: Tensor
) -> Experience:
    """N rows, right-padded with 0: prompt then response; the mask covers the response."""
    lengths = torch.tensor([[len(p), len(r)] for p, r in zip(prompts, responses, strict=True)])  # [N, 2]
    total = lengths.sum(-1)
    ids = torch.zeros(len(prompts), int(total.max()), dtype=torch.int64)
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        ids[i, : int(total[i])] = torch.tensor([*p, *r])
    at = torch.arange(ids.shape[1])
    attention = at < total[:, None]
    mask = attention & (at >= lengths[:, :1])
    return Experience(samples=tuple(samples), ids=ids, attention=attention, mask=mask, group=group)


def align(values: Sequence[Sequence[float]], exp: Experience) -> Tensor:
    """Per-response numbers as an [N, T] column on the masked tokens."""
    column = torch.zeros(exp.ids.shape, dtype=torch.float32)
    column[exp.mask] = torch.tensor([v for row in values for v in row], dtype=torch.float32)
    return column


class Order:
    """An endless, reproducible order of records: every epoch is a permutation that depends on the seed and the epoch alone."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.cursor = 0

    def take(self, n: int) -> list[int]:
        """The next `n` indices."""
        out = []
        while len(out) < n:
            epoch, at = divmod(self.cursor, self.size)
            chunk = self._epoch(epoch)[at : at + n - len(out)]
            out += chunk
            self.cursor += len(chunk)
        return out

    def _epoch(self, epoch: int) -> list[int]:
        g = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.size, generator=g).tolist()
