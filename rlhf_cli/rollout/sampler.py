"""The built-in sampler: prompts in, responses and their log-probabilities out.

Every prompt is read once per group, its keys and values are copied to the group's rows, and every forward decodes the
same number of rows; a row that ends frees its slot for the next. Because the shape of a forward never changes and a
row's random numbers are its own, a row's tokens depend on its prompt, its seed and `rows`, and not on which rows
share its batch, their order, or the process that draws them. Where all rows of a step begin together, one more thing of
the step counts, alike in every process: whether its longest prompt is above `SHORT`, for then keys are read per group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf_cli.errors import GateError
from rlhf_cli.pulse import alive
from rlhf_cli.rollout.cache import Board, attending, fill, slot_cache
from rlhf_cli.rollout.choose import Decoding, choose
from rlhf_cli.rollout.decoder import Decoder, Step, agree, readable
from rlhf_cli.rollout.limits import check_context, rows_at_a_time
from rlhf_cli.rollout.masking import Mask, Shadow, beside
from rlhf_cli.rollout.tree import Slots, Tree

__all__ = ["Decoding", "Rollout", "Sampler", "eos_ids"]

SHORT = 128  # tokens of the longest prompt up to which reading it once per response is as fast as once per group and a merge
# Prompts per forward, and the multiple that lengths are padded to; elsewhere one prompt, unpadded.
PREFILL = {"cuda": (16, 64)}
AHEAD = 4  # where prompts share a forward, read so many forwards' prompts before they are needed, so that they fill it


@dataclass(frozen=True)
class Rollout:
    """N = prompts x k rows, the k rows of a prompt in a run."""

    ids: list[list[int]]  # response tokens; the EOS is included when drawn
    logp: Tensor  # [N, R] float32, 0 after the end: log-probs of the distribution that was sampled (see `choose`)
    truncated: Tensor  # [N] bool: reached max_tokens before EOS or a stop
    allowed: list[list[np.ndarray]] | None = None  # what a mask allowed at each token, packed (`masking.packed`)


@dataclass
class _Row:
    """A response being drawn."""

    prompt: int
    uniforms: np.ndarray  # [max_tokens] float64
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    complete: bool = False
    allowed: list[np.ndarray] = field(default_factory=list)


@dataclass
class _Batch:
    """The state of one `sample` call. Slot i decodes rows[slot_row[i]]; -1 is idle."""

    prompts: Sequence[Sequence[int]]
    decoding: Decoding
    rows: list[_Row]
    board: Board
    cache: Any
    slot_row: list[int]
    token: list[int]  # [slots] token to feed next
    place: list[int]  # [slots] its position
    decoder: Step | None = None  # of the weights as they are; None: the model's own forward
    tree: Tree | None = None  # where the decoder attends when all rows begin together
    shared: int = 0  # rows of a prompt when they do; 0: slots begin as others end
    started: int = 0
    read: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # prompt -> keys and values per layer
    shadow: Shadow | None = None  # the model that says which tokens may be drawn

    def busy(self) -> bool:
        return self.started < len(self.rows) or any(r >= 0 for r in self.slot_row)


class Sampler:
    """Draws responses from a Hugging Face causal language model, with or without peft adapters, in evaluation mode.

    Args:
        model: the model; its weights are used as they are at every call.
        tokenizer: names the EOS (besides the model's generation config), and decodes for stop texts.
        decoding: how to draw, unless a call says otherwise.
        device: where the model's inputs go.
    """

    def __init__(self, model: Any, tokenizer: Any, decoding: Decoding, *, device: torch.device | str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.decoding = decoding
        self.device = torch.device(device)
        self.eos = eos_ids(model, tokenizer)
        self.decoder_of: Callable[[Any, int], Step] | None = Decoder if self.device.type == "cpu" else None
        self.written_out: bool | None = None  # whether `Decoder` gives what the model gives; None: not known yet
        self.note: Callable[[str], None] = _silent  # hears what a user should know
        self.mask: Mask | None = None  # of what is drawn; the best token of all (temperature 0) needs none

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        k: int,
        seeds: Sequence[int],
        decoding: Decoding | None = None,
        done: Callable[[int, list[list[int]]], None] | None = None,
    ) -> Rollout:
        """Draw k responses to each prompt (token ids, not empty).

        `seeds`: one number in [0, 2^63) per response, prompt by prompt; equal seeds draw equal tokens.
        `done` gets each prompt's index and its k responses when the last of them is complete, while others are drawn.
        """
        decoding = decoding or self.decoding
        assert len(seeds) == len(prompts) * k, f"{len(seeds)} seeds for {len(prompts)} prompts x {k}"
        longest = max(map(len, prompts), default=0) + decoding.max_tokens
        check_context(self.model.config, prompts, decoding.max_tokens)
        mask = self.mask if decoding.temperature > 0 else None
        others = () if mask is None else (mask.model,)
        slots = rows_at_a_time(self.model, self.device, decoding.rows, longest, decoding.wave, others)
        rows = [_Row(i // k, _uniforms(seed, decoding.max_tokens)) for i, seed in enumerate(seeds)]
        open_rows = [k] * len(prompts)
        board = Board(slots, longest)
        batch = _Batch(prompts, decoding, rows, board, slot_cache(board), [-1] * slots, [0] * slots, [0] * slots)
        batch.shadow = Shadow(mask, self, batch) if mask is not None else None
        if self.decoder_of is not None and self.written_out is not False and readable(self.model):
            batch.decoder = self.decoder_of(self.model, slots)
            together = (
                self.decoder_of is Decoder
                and 0 < decoding.wave <= slots
                and len(rows) <= slots
                and k > 1
                and slots % k == 0
                and not 0 < decoding.longest <= SHORT
            )
            batch.shared = k if together and batch.shadow is None else 0
        training = self.model.training
        if training:  # as activation checkpointing wants it; it would turn the cache off
            self.model.eval()
        try:
            with attending(self.model.config), beside(mask):
                while batch.busy():
                    self._start(batch)
                    ended = self._step(batch)
                    alive()
                    for p in ended if done is not None else ():
                        open_rows[p] -= 1
                        if not open_rows[p]:
                            done(p, [r.ids for r in rows[p * k : p * k + k]])
        finally:
            if training:
                self.model.train()
        return _rollout(rows)

    def _start(self, batch: _Batch) -> None:
        """Give waiting rows to idle slots."""
        idle = [i for i, r in enumerate(batch.slot_row) if r < 0]
        first = batch.started
        batch.started = min(len(batch.rows), first + len(idle))
        taken: dict[int, list[int]] = {}  # prompt -> its slots
        for slot, r in zip(idle, range(first, batch.started), strict=False):
            prompt = batch.rows[r].prompt
            batch.slot_row[slot] = r
            batch.token[slot] = batch.prompts[prompt][-1]
            batch.place[slot] = len(batch.prompts[prompt]) - 1
            taken.setdefault(prompt, []).append(slot)
        self._load(batch, taken)
        if batch.shadow is not None:
            batch.shadow.load(taken)

    def _load(self, batch: _Batch, taken: Mapping[int, list[int]]) -> None:
        """Copy prompts into the slots that begin a row: prompt -> slots."""
        self._read(batch, list(taken))
        if batch.shared and batch.read:
            batch.tree = Tree(
                [batch.read.get(p) for p in taken], batch.board.slots, batch.shared, batch.decoding.max_tokens
            )
        for prompt, slots in taken.items() if batch.tree is None or self.written_out is None else ():
            if prompt in batch.read:
                fill(batch.cache, torch.tensor(slots, device=self.device), batch.read[prompt])
        waiting = batch.rows[batch.started].prompt if batch.started < len(batch.rows) else len(batch.prompts)
        batch.read = {p: kv for p, kv in batch.read.items() if p >= waiting}

    def _read(self, batch: _Batch, wanted: list[int]) -> None:
        """Keys and values of prompts without their last token. A forward's shape depends on a prompt's length only."""
        width, grain = PREFILL.get(self.device.type, (1, 1))
        wanted = [p for p in wanted if p not in batch.read]
        if wanted and width > 1:
            wanted += range(wanted[-1] + 1, min(len(batch.prompts), wanted[-1] + 1 + AHEAD * width))
        by_length: dict[int, list[int]] = {}
        for p in wanted:
            if len(batch.prompts[p]) > 1:
                by_length.setdefault(-(-(len(batch.prompts[p]) - 1) // grain) * grain, []).append(p)
        for length, members in by_length.items():
            for some in (members[i : i + width] for i in range(0, len(members), width)):
                ids = torch.zeros(width, length, dtype=torch.int64)  # padding follows the prompt, which cannot see it
                for i, p in enumerate(some):
                    ids[i, : len(batch.prompts[p]) - 1] = torch.as_tensor(batch.prompts[p][:-1])
                cache = DynamicCache()
                self.model(input_ids=ids.to(self.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
                for i, p in enumerate(some):
                    n = len(batch.prompts[p]) - 1
                    batch.read[p] = [(layer.keys[i, :, :n], layer.values[i, :, :n]) for layer in cache.layers]

    def _step(self, batch: _Batch) -> list[int]:
        """One token for every busy slot. Returns the prompt of every row that ended."""
        busy = [(slot, batch.rows[r]) for slot, r in enumerate(batch.slot_row) if r >= 0]
        uniform = torch.full((len(batch.token),), 0.5, dtype=torch.float64)
        for slot, row in busy:
            uniform[slot] = row.uniforms[len(row.ids)]
        logits = self._forward(batch)
        early = [slot for slot, row in busy if len(row.ids) < batch.decoding.min_tokens]
        if early and self.eos:
            logits[torch.tensor(early)[:, None], torch.tensor(self.eos)] = float("-inf")
        allowed = batch.shadow.restrict(logits) if batch.shadow is not None else None
        token, logp = choose(logits, uniform.to(self.device), batch.decoding)
        tokens, logps = token.tolist(), logp.tolist()
        ended: list[int] = []
        for slot, row in busy:
            if not math.isfinite(logps[slot]):
                raise GateError(f"sampler: prompt {row.prompt}: the model's logits are not finite; lower optim.lr")
            row.ids.append(tokens[slot])
            row.logp.append(logps[slot])
            if allowed is not None:
                row.allowed.append(allowed[slot])
            row.complete = tokens[slot] in self.eos or self._stopped(row.ids, batch.decoding)
            batch.token[slot] = tokens[slot]
            batch.place[slot] += 1
            if row.complete or len(row.ids) == batch.decoding.max_tokens:
                batch.slot_row[slot], batch.token[slot], batch.place[slot] = -1, 0, 0
                ended.append(row.prompt)
        return ended

    def _forward(self, batch: _Batch) -> Tensor:
        """Logits [slots, V] after the tokens at hand."""
        places = torch.tensor(batch.place, device=self.device)
        tokens = torch.tensor(batch.token, device=self.device)
        batch.board.aim(places, max(batch.place) + 1)
        seen = torch.arange(batch.board.span, device=self.device) <= places[:, None]
        mask = torch.zeros(seen.shape, device=self.device, dtype=self.model.dtype).masked_fill_(~seen, float("-inf"))
        own = partial(self._model_step, batch, tokens, places, mask[:, None, None])
        if batch.decoder is None:
            return own()
        first = own() if self.written_out is None or not (batch.cache.layers or batch.tree) else None
        if batch.tree is not None:
            batch.tree.aim(max(len(r.ids) for r in batch.rows))
        memory = batch.tree or Slots(batch.board, batch.cache.layers, mask[:, None, None])
        logits = batch.decoder(tokens, places, memory)
        if self.written_out is None:  # the model first: what it stores is written over, as in every later step
            assert first is not None
            self.written_out = agree(logits, first)
            if not self.written_out:
                batch.decoder = batch.tree = None
                self.note(
                    "sampler: the written-out decoding step differs from the model's own forward; the model's own is used"
                )
                own()  # and what the other stored too
                return first
        return logits

    def _model_step(self, batch: _Batch, tokens: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """The same by the model's own forward."""
        out = self.model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=places[:, None],
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def _stopped(self, ids: list[int], decoding: Decoding) -> bool:
        """Whether the newest token completes a stop text. The response keeps the tokens up to it, stop included."""
        if not decoding.stop or len(ids) < decoding.min_tokens:
            return False
        # Every token holds a byte at least, so a stop lies in this many; some more let the tail begin amid a character.
        tail = ids[-max(len(s.encode()) for s in decoding.stop) - 4 :]
        before = self.tokenizer.decode(tail[:-1], skip_special_tokens=False).rstrip("\ufffd")
        text = self.tokenizer.decode(tail, skip_special_tokens=False)
        return any(s in text[max(0, len(before) - len(s) + 1) :] for s in decoding.stop)


def _silent(_: str) -> None:
    pass


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a response: the tokenizer's EOS and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, list | tuple) else [configured]
    return sorted({int(i) for i in [*several, tokenizer.eos_token_id] if i is not None})


def _uniforms(seed: int, n: int) -> np.ndarray:
    """A row's numbers in [0, 1): a counter-based generator keyed by the row, so that they depend on nothing else."""
    return np.random.Generator(np.random.Philox(key=seed)).random(n)


def _rollout(rows: Sequence[_Row]) -> Rollout:
    width = max((len(r.ids) for r in rows), default=0)
    logp = torch.zeros(len(rows), width)
    for i, r in enumerate(rows):
        logp[i, : len(r.ids)] = torch.tensor(r.logp)
    allowed = [r.allowed for r in rows] if any(r.allowed for r in rows) else None
    return Rollout([r.ids for r in rows], logp, torch.tensor([not r.complete for r in rows], dtype=torch.bool), allowed)
