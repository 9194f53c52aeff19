"""The reward that a preference-trained language model implies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_cli.data.text import render, response_ids
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.pulse import alive
from rlhf_cli.rewards.encoder import device_of
from rlhf_cli.rewards.per_sample import Row, groups_of, scored
from rlhf_cli.rewards.spans import Span, token_ends
from rlhf_cli.types import Sample, Scores

FREE = "none"


class Implicit:
    """beta sum_t [log pi(y_t) - log pi_ref(y_t)] over the tokens of the response and its end, summed and not averaged.

    Comparable within a prompt only: beta log Z(x) is unknown. Without a reference it is beta times the mean log pi(y_t). With
    `token_level` each token's term falls on its characters, and the end token's on the end of the response: they sum to the value.
    See Rafailov et al., Direct Preference Optimization, arXiv:2305.18290, eq. 5; per token: From r to Q*, arXiv:2404.12358.
    """

    path_is = "RUN"
    loads_model = True
    gives_spans = "token_level"

    def __init__(
        self,
        *,
        path: str,
        reference: str,
        beta: float,
        token_level: bool,
        batch_size: int,
        max_tokens: int,
        device: Literal["auto", "cpu", "cuda"],
        dtype: Literal["fp32", "bf16"],
    ) -> None:
        """Args:
        path: the trained language model; a run, a Hugging Face folder or a Hub id
        reference: the model it was trained against, with the same tokenizer; none for mean log-probabilities alone
        beta: reward per nat
        token_level: place the value on tokens, for credits that read token rewards
        batch_size: responses per forward
        max_tokens: longest input, tokens; a long prompt loses its beginning, a longer response is missing
        device: auto takes the accelerator where there is one
        dtype: precision of weights and forward
        """
        if batch_size < 1 or max_tokens < 2:
            raise ConfigError(
                f"reward.implicit: batch_size={batch_size}, max_tokens={max_tokens} are not allowed; type larger numbers"
            )
        self.paths = {"path": path, "reference": reference}
        for name, given in self.paths.items():
            if not given:
                raise ConfigError(
                    f"reward.implicit.{name} is empty; type reward.implicit.{name}=RUN (or a folder, or a Hub id)"
                )
        self.beta, self.token_level = beta, token_level
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.device, self.dtype = device_of(device), torch.bfloat16 if dtype == "bf16" else torch.float32
        self.models: list[Any] = []
        self.tokenizer: Any = None

    def load(self) -> None:
        """Read both models, unless they are here already; the first call does it by itself."""
        if self.models:
            return
        from rlhf_cli.config import ModelSection
        from rlhf_cli.models import loading

        sections = [ModelSection(path=p) for p in self.paths.values() if p != FREE]
        tokenizers = [loading.load_tokenizer(s) for s in sections]
        if any(t.get_vocab() != tokenizers[0].get_vocab() for t in tokenizers):
            raise ConfigError(
                f"reward.implicit.reference: {self.paths['reference']} has another tokenizer than {self.paths['path']}; "
                "give the model that it was trained against, or reward.implicit.reference=none"
            )
        self.tokenizer = tokenizers[0]
        self.models = [
            loading.load_causal(s, dtype=self.dtype, seed=0).requires_grad_(False).to(self.device) for s in sections
        ]

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        self.load()
        ids = [self._ids(s) for s in samples]
        terms: dict[int, Tensor] = {}
        for members in groups_of(
            group.tolist()
        ):  # a forward never mixes groups, as its last bits follow from its shape
            fits = sorted((i for i in members if ids[i]), key=lambda i: sum(map(len, ids[i])))
            for start in range(0, len(fits), self.batch_size):
                alive()
                rows = fits[start : start + self.batch_size]
                terms |= zip(rows, self._terms([ids[i] for i in rows]), strict=True)
        why = {i: f"it is longer than {self.max_tokens} tokens" for i in range(len(samples)) if i not in terms}
        spans: list[Span] = []
        for i, t in terms.items() if self.token_level else ():
            try:
                spans += self._spans(i, t, ids[i][1], samples[i].response)
            except GateError:
                why[i] = (
                    "the tokenizer of reward.implicit does not give its text back, so its characters have no tokens"
                )
        found = scored(
            Row(None, reason=why[i]) if i in why else Row(float(terms[i].sum())) for i in range(len(samples))
        )
        return replace(found, spans=spans) if self.token_level else found

    def _terms(self, rows: Sequence[Any]) -> list[Tensor]:
        """Each row's reward per scored token, float64."""
        own = self._logp(self.models[0], rows)
        if len(self.models) == 1:
            return [self.beta * x / len(x) for x in own]
        return [self.beta * (x - y) for x, y in zip(own, self._logp(self.models[1], rows), strict=True)]

    def _logp(self, model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        """Log-probabilities of each row's second part, given its first."""
        lengths = torch.tensor([len(a) + len(b) for a, b in rows])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(a + b) for a, b in rows], batch_first=True)  # [N, T]
        attention = torch.arange(ids.shape[1]) < lengths[:, None]
        inputs = {"input_ids": ids.to(self.device), "attention_mask": attention.long().to(self.device)}
        logits = model(**inputs, use_cache=False).logits  # [N, T, V]
        found = []
        for i, (a, b) in enumerate(rows):
            logp = logits[i, len(a) - 1 : len(a) + len(b) - 1].double().log_softmax(-1)
            found.append(logp.gather(-1, torch.tensor(b, device=logp.device)[:, None])[:, 0].cpu())
        return found

    def _ids(self, sample: Sample) -> tuple[list[int], list[int]] | tuple[()]:
        """(context, response and its end); nothing where the response alone is too long."""
        turns = sample.meta.get("messages") or [{"role": "user", "content": sample.prompt}]
        head, tail = render(turns, self.tokenizer, True), response_ids(sample.response, self.tokenizer)
        room = self.max_tokens - len(tail)
        return (head[max(0, len(head) - room) :], tail) if room > 0 else ()

    def _spans(self, row: int, terms: Tensor, ids: Sequence[int], text: str) -> Iterator[Span]:
        """Raises GateError where the tokens do not say the text.

        The term of each token on the characters that it completes, together with those of tokens before that complete none."""
        at, held = 0, 0.0
        for end, value in zip(token_ends(ids[:-1], text, self.tokenizer), terms[:-1].tolist(), strict=True):
            held += value
            if end > at:
                yield row, at, end, held
                at, held = end, 0.0
