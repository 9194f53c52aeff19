"""A judge in this process: a language model of a folder, a run or the Hub, generating or read at its next-token distribution."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch

from rlhf_cli import standins
from rlhf_cli.config import ModelSection
from rlhf_cli.data.text import end_id, render
from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.ask import Ask, Reply, Sampling
from rlhf_cli.judges.rule import done
from rlhf_cli.judges.text import unit_hash
from rlhf_cli.models import loading
from rlhf_cli.rollout.sampler import Decoding, Sampler

AT_ONCE = 16  # questions per forward


class Local:
    """Asks a causal language model that lies in this process's memory.

    Generated replies are drawn by the built-in sampler, with a seed per question; log-probabilities are those of the whole
    vocabulary. It holds no schema to a reply: small models should be read by their log-probabilities.

    Args:
        path: a folder, a run, a Hub id, `smollm2`, or `tiny:SEED`.
        sampling: how it draws.
        device: where it lies.
        dtype: of its weights.
    """

    early = False

    def __init__(self, path: str, sampling: Sampling, device: torch.device, dtype: torch.dtype) -> None:
        self.path, self.sampling, self.device, self.dtype = path, sampling, device, dtype
        self.section = ModelSection(
            path="" if path == "smollm2" else path, source="smollm2" if path == "smollm2" else "auto"
        )
        if standins.seed_of(path) is None:
            loading.resolve(self.section)
        self._sampler: Sampler | None = None

    def name(self, ask: Ask) -> str:
        """The path; one model judges and refines."""
        return self.path

    def check(self, asks: Sequence[Ask]) -> None:
        """Load the model."""
        self.sampler()

    def sampler(self) -> Sampler:
        """The model with its tokenizer, loaded once."""
        if self._sampler is None:
            tokenizer = loading.load_tokenizer(self.section)
            model = loading.load_causal(self.section, dtype=self.dtype, seed=0).to(self.device).requires_grad_(False)
            self._sampler = Sampler(model, tokenizer, Decoding(), device=self.device)
            self._sampler.eos = sorted({*self._sampler.eos, end_id(tokenizer)})
        return self._sampler

    def start(self, asks: Sequence[Ask]) -> list[Future[Reply]]:
        """Answer now, neighbours together."""
        began = time.perf_counter()
        replies: list[Reply] = [Reply()] * len(asks)
        for wants_odds in (True, False):
            chosen = [i for i, a in enumerate(asks) if bool(a.top) == wants_odds]
            for at in range(0, len(chosen), AT_ONCE):
                part = chosen[at : at + AT_ONCE]
                found = (self._odds if wants_odds else self._generate)([asks[i] for i in part])
                for i, reply in zip(part, found, strict=True):
                    replies[i] = reply
        each = (time.perf_counter() - began) / max(1, len(asks))
        return [done(replace(r, seconds=each)) for r in replies]

    def _ids(self, ask: Ask) -> list[int]:
        return render(ask.messages, self.sampler().tokenizer, True)

    def _room(self) -> int:
        config: Any = self.sampler().model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 1 << 62)

    @torch.no_grad()
    def _odds(self, asks: Sequence[Ask]) -> list[Reply]:
        """The likeliest next tokens of each question; rows are padded on the right, which no earlier position sees."""
        sampler = self.sampler()
        ids = [self._ids(a) for a in asks]
        fits = [i for i, x in enumerate(ids) if len(x) <= self._room()]
        replies = [_too_long(len(x), self._room()) for x in ids]
        if not fits:
            return replies
        lengths = torch.tensor([len(ids[i]) for i in fits])
        rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in fits], batch_first=True)  # [N, T]
        attention = torch.arange(rows.shape[1]) < lengths[:, None]
        hidden = sampler.model.base_model(
            input_ids=rows.to(self.device), attention_mask=attention.long().to(self.device), use_cache=False
        ).last_hidden_state
        last = hidden[torch.arange(len(fits)), (lengths - 1).to(hidden.device)]
        logp = sampler.model.get_output_embeddings()(last).float().log_softmax(-1)  # [N, V]
        for row, i in enumerate(fits):
            best = logp[row].topk(min(asks[i].top, logp.shape[-1]))
            words = [sampler.tokenizer.decode([t]) for t in best.indices.tolist()]
            top = tuple(zip(words, best.values.tolist(), strict=True))
            replies[i] = Reply(words[0], top)
        return replies

    def _generate(self, asks: Sequence[Ask]) -> list[Reply]:
        replies = []
        for ask in asks:  # one at a time: limits and temperatures differ, and a reply must not depend on its neighbours
            sampler, ids = self.sampler(), self._ids(ask)
            p = self.sampling.of(ask)
            limit = int(p.get("max_tokens", 256))
            if len(ids) + limit > self._room():
                replies.append(_too_long(len(ids) + limit, self._room()))
                continue
            seed = int(unit_hash(ask.system, ask.user, ask.draw) * 2**62)
            decoding = Decoding(max_tokens=limit, temperature=float(p["temperature"]), rows=1)
            drawn = sampler.sample([ids], 1, [seed], decoding)
            text = sampler.tokenizer.decode(drawn.ids[0], skip_special_tokens=True)
            replies.append(Reply(text, finish="length" if bool(drawn.truncated[0]) else "stop"))
        return replies


def _too_long(tokens: int, room: int) -> Reply:
    return Reply(error=f"the question and its reply take {tokens} tokens, the judge holds {room}")


def device_of(name: str, run_device: str) -> torch.device:
    """`auto` follows the run."""
    chosen = run_device if name == "auto" else name
    if chosen in ("auto", ""):
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    if chosen == "cuda" and not torch.cuda.is_available():
        raise ConfigError("judge.device=cuda: there is no GPU; type judge.device=cpu")
    return torch.device(chosen)
