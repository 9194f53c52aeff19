"""Relevance of a response to its prompt, or likeness to the references, by a frozen text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_cli.errors import ConfigError
from rlhf_cli.pulse import alive
from rlhf_cli.rewards.encoder import device_of, folder_of, load_encoder, mean_pool, padded, shapes
from rlhf_cli.rewards.per_sample import Row, references_of, scored
from rlhf_cli.types import Sample, Scores

KEPT = 100_000  # vectors of prompts and references that are remembered


class Embedding:
    """Similarity of masked mean-pooled embeddings: cosine in [-1, 1], or an unbounded dot product.

    With the prompt, with the references (the best or their mean counts), or the mean of both; parts `prompt` and
    `references` hold each. What exceeds max_tokens is cut at its end. The empty response has the encoding of nothing.
    See Reimers and Gurevych, Sentence-BERT, arXiv:1908.10084; relevance as reward: Kim et al., R^3, arXiv:2402.03469.
    """

    loads_model = True
    path_is = "FOLDER"

    def __init__(
        self,
        *,
        path: str,
        to: Literal["prompt", "references", "both"],
        references: Literal["best", "mean"],
        similarity: Literal["cosine", "dot"],
        batch_size: int,
        max_tokens: int,
        device: Literal["auto", "cpu", "cuda"],
        dtype: Literal["fp32", "bf16"],
    ) -> None:
        """Args:
        path: packaged (all-MiniLM-L6-v2), a Hugging Face folder or a Hub id
        to: what the response is compared with: prompt, references or both (the mean of the two)
        references: of several references, the best one counts, or their mean
        similarity: cosine, or dot (as contriever was trained)
        batch_size: texts per forward, filled up: a text's numbers do not depend on its company
        max_tokens: longest text, tokens
        device: auto takes the accelerator where there is one
        dtype: precision of weights and forward
        """
        if batch_size < 1 or max_tokens < 3:
            raise ConfigError(
                f"reward.embedding: batch_size={batch_size}, max_tokens={max_tokens} are not allowed; type larger numbers"
            )
        self.folder = folder_of(path, "reward.embedding")
        self.to, self.best, self.cosine = to, references == "best", similarity == "cosine"
        self.needs_references = to != "prompt"
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.device, self.dtype = device_of(device), torch.bfloat16 if dtype == "bf16" else torch.float32
        self.model: Any = None
        self.tokenizer: Any = None
        self._known: dict[str, Tensor] = {}

    def load(self) -> None:
        """Read weights and tokenizer, unless they are here already; the first call does it by itself."""
        if self.model is None:
            self.model, self.tokenizer = load_encoder(self.folder, "reward.embedding", self.dtype)
            self.model.to(self.device)
            self.max_tokens = min(
                self.max_tokens, getattr(self.model.config, "max_position_embeddings", self.max_tokens)
            )

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self._row(near) for near in self.near(samples))

    def near(self, samples: Sequence[Sample]) -> list[dict[str, float]]:
        """Similarity of each response with its `prompt` and its `references`, as far as they are asked for and there."""
        self._remember([t for s in samples for t in self._fixed(s)])
        vectors = self.encode([s.response for s in samples])
        return [self._near(s, v) for s, v in zip(samples, vectors, strict=True)]

    def _fixed(self, sample: Sample) -> list[str]:
        """What the response is compared with."""
        prompt = [sample.prompt] if self.to != "references" else []
        return prompt + (list(references_of(sample)) if self.to != "prompt" else [])

    def _remember(self, texts: Sequence[str]) -> None:
        new = [t for t in dict.fromkeys(texts) if t not in self._known]
        if len(self._known) + len(new) > KEPT:
            self._known.clear()
            new = list(dict.fromkeys(texts))
        self._known |= zip(new, self.encode(new), strict=True)

    def _near(self, sample: Sample, vector: Tensor) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.to != "references":
            found["prompt"] = float(vector @ self._known[sample.prompt])
        near = [float(vector @ self._known[r]) for r in references_of(sample)] if self.to != "prompt" else []
        if near:
            found["references"] = max(near) if self.best else sum(near) / len(near)
        return found

    def _row(self, near: dict[str, float]) -> Row:
        if self.needs_references and "references" not in near:
            return Row(None, reason="it has no reference")
        return Row(sum(near.values()) / len(near), near if len(near) > 1 else {})

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """[N, H] float32 vectors, of length 1 for cosine."""
        self.load()
        found = torch.zeros(len(texts), self.model.config.hidden_size)
        if not texts:
            return found
        ids = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        for rows, width in shapes([len(x) for x in ids], self.batch_size, self.max_tokens):
            alive()
            batch = padded([ids[i] for i in rows], self.batch_size, width, self.tokenizer.pad_token_id)
            found[rows] = self._forward(*batch)[: len(rows)]
        return found

    def _forward(self, ids: Tensor, attention: Tensor) -> Tensor:
        ids, attention = ids.to(self.device), attention.to(self.device)
        pooled = (
            mean_pool(self.model(input_ids=ids, attention_mask=attention).last_hidden_state, attention).float().cpu()
        )
        return torch.nn.functional.normalize(pooled, dim=-1) if self.cosine else pooled
