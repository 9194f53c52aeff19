"""Fluency: the mean log-probability of a response under a frozen language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_cli.data.text import render, response_ids
from rlhf_cli.errors import ConfigError
from rlhf_cli.pulse import alive
from rlhf_cli.rewards.encoder import device_of, padded, shapes
from rlhf_cli.rewards.per_sample import Row, scored
from rlhf_cli.types import Sample, Scores


class Perplexity:
    """(1/T) sum_t log p(y_t | x, y_<t) in nats, at most 0; its negative is the log of the perplexity.

    A mean and not a sum, which would reward shortness. Conditional on the prompt, or on the beginning of text alone.
    Repetition maximises it: pair it with reward=repetition. An empty response is scored by its end token. A response
    that alone exceeds max_tokens is missing; a long prompt loses its beginning.
    See Jelinek et al., Perplexity: a measure of the difficulty of speech recognition tasks, JASA 62, 1977.
    """

    loads_model = True
    path_is = "FOLDER"

    def __init__(
        self,
        *,
        path: str,
        conditional: bool,
        end_token: bool,
        batch_size: int,
        max_tokens: int,
        device: Literal["auto", "cpu", "cuda"],
        dtype: Literal["fp32", "bf16"],
    ) -> None:
        """Args:
        path: a Hugging Face folder, a run or a Hub id of a language model
        conditional: given the prompt through the chat template; off, the text by itself
        end_token: the token that ends the turn counts too
        batch_size: responses per forward, filled up: a response's number does not depend on its company
        max_tokens: longest input, tokens
        device: auto takes the accelerator where there is one
        dtype: precision of weights and forward
        """
        if batch_size < 1 or max_tokens < 2:
            raise ConfigError(
                f"reward.perplexity: batch_size={batch_size}, max_tokens={max_tokens} are not allowed; type larger numbers"
            )
        if not path:
            raise ConfigError("reward.perplexity.path is empty; type reward.perplexity.path=FOLDER (or a Hub id)")
        self.path, self.conditional, self.end_token = path, conditional, end_token
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.device, self.dtype = device_of(device), torch.bfloat16 if dtype == "bf16" else torch.float32
        self.model: Any = None
        self.tokenizer: Any = None

    def load(self) -> None:
        """Read weights and tokenizer, unless they are here already; the first call does it by itself."""
        if self.model is not None:
            return
        from rlhf_cli.config import ModelSection
        from rlhf_cli.models import loading

        section = ModelSection(path=self.path)
        self.tokenizer = loading.load_tokenizer(section)
        self.model = loading.load_causal(section, dtype=self.dtype, seed=0).requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        self.load()
        ids = [self._ids(s) for s in samples]
        fits = [i for i, x in enumerate(ids) if x is not None]
        found = self._score([x for x in ids if x is not None])
        values: list[float | None] = [None] * len(samples)
        for i, value in zip(fits, found, strict=True):
            values[i] = value
        return scored(Row(v, reason=f"it is longer than {self.max_tokens} tokens" if v is None else "") for v in values)

    def _score(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Mean log-probability of each row's second part, given its first."""
        found = [0.0] * len(rows)
        for index, width in shapes([len(a) + len(b) for a, b in rows], self.batch_size, self.max_tokens):
            alive()
            for i, value in zip(index, self._forward([rows[i] for i in index], width), strict=True):
                found[i] = value
        return found

    def _ids(self, sample: Sample) -> tuple[list[int], list[int]] | None:
        """(context, scored tokens); None where the response alone is too long."""
        tok = self.tokenizer
        turns = sample.meta.get("messages") or [{"role": "user", "content": sample.prompt}]
        start = tok.bos_token_id if tok.bos_token_id is not None else tok.eos_token_id
        head = render(turns, tok, True) if self.conditional else [start]
        tail = response_ids(sample.response, tok)
        tail = tail if self.end_token or len(tail) == 1 else tail[:-1]
        room = self.max_tokens - len(tail)
        return (head[max(0, len(head) - room) :], tail) if room > 0 else None

    def _forward(self, rows: Sequence[tuple[list[int], list[int]]], width: int) -> list[float]:
        pad = self.tokenizer.pad_token_id or 0
        ids, attention = padded([a + b for a, b in rows], self.batch_size, width, pad)
        logits = self.model(
            input_ids=ids.to(self.device), attention_mask=attention.to(self.device), use_cache=False
        ).logits  # [N, T, V]
        values = []
        for i, (a, b) in enumerate(rows):
            logp = logits[i, len(a) - 1 : len(a) + len(b) - 1].float().log_softmax(-1)
            values.append(float(logp.gather(-1, torch.tensor(b, device=logp.device)[:, None]).double().mean()))
        return values
