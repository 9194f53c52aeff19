"""How far a response is from its demonstration, clause by clause."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from rlhf_cli.rewards.embedding import Embedding
from rlhf_cli.rewards.per_sample import Row, references_of, scored
from rlhf_cli.types import Sample, Scores

_END = re.compile(r"[.!?;,:\n]+|\s(?:and|but|or|because|while)\s", re.I)


class ClauseDistance:
    """delta = 1 - mean over the response's clauses of the largest cosine with a clause of the demonstration, in [0, 2].

    The first reference is the demonstration. A response without a clause is at distance 1. Component `hardness` is delta again, the
    column of credit=difficulty_scaled. See Cheng et al., arXiv:2503.18991, section 4.2, with a text encoder in place of CLIP's.
    """

    needs_references = True
    loads_model = True
    path_is = "FOLDER"
    columns = "hardness"

    def __init__(self, *, path: str, batch_size: int, max_tokens: int, device: Literal["auto", "cpu", "cuda"]) -> None:
        """Args:
        path: packaged (all-MiniLM-L6-v2), a Hugging Face folder or a Hub id
        batch_size: clauses per forward
        max_tokens: longest clause, tokens
        device: auto takes the accelerator where there is one
        """
        self.encoder = Embedding(
            path=path, to="prompt", references="best", similarity="cosine", batch_size=batch_size, max_tokens=max_tokens,
            device=device, dtype="fp32",
        )  # fmt: skip
        self.encode: Callable[[Sequence[str]], Tensor] = self.encoder.encode  # [n, H], of length 1

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self._rows(samples))

    def _rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        texts = dict.fromkeys(c for s in samples for t in (s.response, *references_of(s)[:1]) for c in clauses(t))
        vectors = dict(zip(texts, self.encode(list(texts)), strict=True)) if texts else {}
        for s in samples:
            references = references_of(s)
            if not references:
                yield Row(None, reason="it has no demonstration")
                continue
            delta = distance([vectors[c] for c in clauses(s.response)], [vectors[c] for c in clauses(references[0])])
            yield Row(delta, {"hardness": delta})


def clauses(text: str) -> list[str]:
    """The pieces of a text between marks and joining words, in lower case."""
    return [c.strip().lower() for c in _END.split(text) if c and c.strip()]


def distance(own: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """1 - mean_k max_l own_k . other_l of vectors of length 1; 1 where either has nothing."""
    if not own or not other:
        return 1.0
    cosine = torch.stack(list(own)) @ torch.stack(list(other)).T
    return float(1 - cosine.amax(-1).mean())
