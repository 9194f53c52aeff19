"""Floating-point operations that a step's matrix multiplications need, from the model's configuration and the rows' lengths.

A multiplication of [n, a] by [a, b] is 2 n a b operations. For a decoder with L layers of width H, A query and B key heads of
width D, a gated feed-forward layer of width F and a vocabulary V, the forward pass needs

    2 L (2 H A D + 2 H B D + 3 H F)   per token in linear layers (query and output; key and value; gate, up and down),
    4 L A D                           per pair of a query and a key that it sees (scores, and their product with values),
    2 H V                             per position whose logits are wanted.

The backward pass needs the forward's operations twice, once for the gradient of the inputs and once for that of the weights. Under
LoRA frozen weights need the first only, and every adapted layer [a, b] has 2 r (a + b) per token more. Recomputation, optimizer,
normalisation, activation and sampling are not counted, so a share of the peak is never flattered by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Groups = Sequence[tuple[int, Sequence[int]]]  # per prompt: its length and the lengths of its responses


@dataclass(frozen=True)
class Decoder:
    """What the counts depend on."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    width: int  # of a head
    ffn: int
    vocabulary: int
    lora: int = 0  # rank of adapters on every linear layer of the decoder

    def linear(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one decoder layer."""
        h, q, k = self.hidden, self.heads * self.width, self.key_heads * self.width
        return [(h, q), (h, k), (h, k), (q, h), (h, self.ffn), (h, self.ffn), (self.ffn, h)]


@dataclass(frozen=True)
class Work:
    """Counts of one phase: tokens through the layers, visible query-key pairs, positions with logits."""

    tokens: int = 0
    pairs: int = 0
    logits: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.logits + other.logits)


def decoder(config: Any, lora: int = 0) -> Decoder:
    """From a Hugging Face configuration of a Llama-like model."""
    c = config.get_text_config()
    return Decoder(
        hidden=c.hidden_size,
        layers=c.num_hidden_layers,
        heads=c.num_attention_heads,
        key_heads=getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
        width=getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        ffn=c.intermediate_size,
        vocabulary=c.vocab_size,
        lora=lora,
    )


def forward(d: Decoder, work: Work) -> int:
    """Operations of a forward pass."""
    base = 2 * sum(a * b for a, b in d.linear())
    adapters = 2 * sum(d.lora * (a + b) for a, b in d.linear())
    attention = 4 * d.layers * d.heads * d.width * work.pairs
    return work.tokens * d.layers * (base + adapters) + attention + work.logits * 2 * d.hidden * d.vocabulary


def backward(d: Decoder, work: Work) -> int:
    """Operations of the backward pass that follows."""
    if not d.lora:
        return 2 * forward(d, work)
    adapters = work.tokens * d.layers * 2 * sum(d.lora * (a + b) for a, b in d.linear())
    attention = 4 * d.layers * d.heads * d.width * work.pairs
    frozen = forward(d, work) - adapters - attention
    return frozen + 2 * adapters + 2 * attention


def triangle(n: int) -> int:
    """Pairs of a causal sequence of n tokens."""
    return n * (n + 1) // 2


# -- ours: a prompt is read once for all its responses, no padding ----------------------------------------------------


def packed(groups: Groups) -> Work:
    """Rows that share their prompts, for training."""
    work = Work()
    for p, responses in groups:
        work += Work(p, triangle(p))
        for t in responses:
            work += Work(t, t * p + triangle(t), t)
    return work


def shared_rollout(groups: Groups) -> Work:
    """Prompts without their last token once, then every row's tokens one at a time."""
    work = Work()
    for p, responses in groups:
        work += Work(p - 1, triangle(p - 1))
        for t in responses:
            work += Work(t, triangle(p + t - 1) - triangle(p - 1), t)
    return work


# -- padded rows: every row has its own prompt, padded to the longest --------------------------------------------------


def padded(groups: Groups) -> Work:
    """Rows padded to one length, for training; logits of responses only."""
    rows, p, t = _rectangle(groups)
    return Work(rows * (p + t), rows * triangle(p + t), rows * t)


def padded_rollout(groups: Groups) -> Work:
    """All prompts padded to one length, then every row's tokens one at a time; the prompt's pass gives the first."""
    rows, p, t = _rectangle(groups)
    return Work(rows * (p + t - 1), rows * triangle(p + t - 1), rows * t)


def _rectangle(groups: Groups) -> tuple[int, int, int]:
    rows = sum(len(r) for _, r in groups)
    return rows, max(p for p, _ in groups), max(max(r) for _, r in groups)


def phases(d: Decoder, groups: Groups, side: str) -> dict[str, int]:
    """Operations per phase of a step with one reference pass and one update."""
    if side == "ours":
        draw, train = shared_rollout(groups), packed(groups)
    else:
        draw, train = padded_rollout(groups), padded(groups)
    plain = Decoder(**{**vars(d), "lora": 0})  # the reference runs without adapters
    return {
        "rollout": forward(d, draw),
        "annotate": forward(plain, train),
        "update": forward(d, train) + backward(d, train),
    }
