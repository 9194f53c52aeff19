"""One decoding step of a Llama-like model, written out: no module calls, no copies, weights packed for the matrix unit.

What a model computes is not read from its name: the first step of a process is made by the model itself as well, and only where both
agree is this one used. Rotary embedding: Su et al., arXiv:2104.09864, equation 34; gated layers: Shazeer, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_cli.models.heads import inner
from rlhf_cli.rollout.tree import Memory

Linear = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, Tensor, Memory], Tensor]  # a `Decoder`, or what is called as it is
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the logits' norm


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    query: Linear
    key: Linear
    value: Linear
    out: Linear
    gate: Linear
    up: Linear
    down: Linear
    before: nn.Module  # norm before attention
    after: nn.Module  # norm before the gated layer


class Decoder:
    """The next-token logits of one new token per slot, from the weights as they are when it is made.

    Args:
        model: a causal language model that `readable` accepts.
        rows: slots, which weights are packed for.
    """

    def __init__(self, model: Any, rows: int) -> None:
        hf = inner(model)
        body = hf.model
        attention = body.layers[0].self_attn
        self.body, self.width = body, attention.head_dim
        self.scale = attention.scaling
        self.layers = [
            Layer(
                *(_packed(getattr(m.self_attn, f"{n}_proj"), rows) for n in "qkvo"),
                *(_packed(getattr(m.mlp, f"{n}_proj"), rows) for n in ("gate", "up", "down")),
                m.input_layernorm,
                m.post_attention_layernorm,
            )
            for m in body.layers
        ]
        self.head = _packed(hf.lm_head, rows)

    def __call__(self, tokens: Tensor, places: Tensor, memory: Memory) -> Tensor:
        """Logits [slots, V] after `tokens` [slots] at `places` [slots], which go into `memory`."""
        x = self.body.embed_tokens(tokens)
        cos, sin = (t[0][:, None] for t in self.body.rotary_emb(x, places[None]))  # [slots, 1, head_dim]
        half = sin.shape[-1] // 2
        sin = torch.cat(
            [-sin[..., :half], sin[..., half:]], -1
        )  # x turned by half a head, times this, is the second part
        for i, layer in enumerate(self.layers):
            x = x + layer.out(self._attend(i, _norm(layer.before, x), (cos, sin), memory))
            y = _norm(layer.after, x)
            x = x + layer.down(F.silu(layer.gate(y)).mul_(layer.up(y)))
        return self.head(_norm(self.body.norm, x))

    def _attend(self, i: int, x: Tensor, turn: tuple[Tensor, Tensor], memory: Memory) -> Tensor:
        """Attention of one new token per row; query heads that share a key head become its queries."""
        layer, n, w = self.layers[i], len(x), self.width
        q, k = (_turned(f(x).view(n, -1, w), *turn) for f in (layer.query, layer.key))
        v = layer.value(x).view(n, -1, w)
        return memory.attend(i, q.reshape(n, k.shape[1], -1, w), k, v, self.scale).reshape(n, -1)


def readable(model: Any) -> bool:
    """Whether a model has the parts that `Decoder` calls; what they compute is for `agree` to see."""
    hf = inner(model)
    body = getattr(hf, "model", None)
    if _base(getattr(hf, "lm_head", None)) is None or not len(getattr(body, "layers", ())):
        return False
    if (
        not all(hasattr(body, n) for n in ("embed_tokens", "rotary_emb", "norm"))
        or hf.config._attn_implementation == "eager"
    ):
        return False
    return all(_has(m) for m in body.layers)


def _has(m: Any) -> bool:
    parts = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    linears = [getattr(getattr(m, part, None), n, None) for part, names in parts.items() for n in names]
    norms = [getattr(m, n, None) for n in ("input_layernorm", "post_attention_layernorm")]
    sizes = all(hasattr(m.self_attn, n) for n in ("head_dim", "scaling")) if hasattr(m, "self_attn") else False
    plain = all(x is not None and x.weight.numel() > 0 for x in map(_base, linears))  # a sharded weight is empty
    return plain and sizes and all(hasattr(x, "variance_epsilon") for x in norms)


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether two results of the same step are equal up to the rounding of their type."""
    a, b = one.double(), other.double()
    return bool((a - b).norm() <= TOLERANCE.get(other.dtype, 0.0) * b.norm())


def _norm(m: Any, x: Tensor) -> Tensor:
    """RMS norm in fp32 at least; F.rms_norm makes twice as many passes on a CPU."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = (
        torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        .square_()
        .div_(x.shape[-1])
        .add_(m.variance_epsilon)
        .rsqrt_()
    )
    return (wide * scale).to(x.dtype) * m.weight


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [slots, heads, head_dim]."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _base(m: Any) -> nn.Linear | None:
    """A linear layer, or that inside peft's plain adapters, which add scale * B(A(x)); None for what computes otherwise."""
    if type(m) is nn.Linear:
        return m
    base = getattr(m, "base_layer", None)
    # By name, so that peft is not imported where no adapter is. `agree` cannot tell: adapters begin by adding 0.
    lora = f"{type(m).__module__}.{type(m).__qualname__}" == "peft.tuners.lora.layer.Linear"
    plain = type(base) is nn.Linear and lora and not m.merged and not m.lora_variant
    return base if plain and all(b.bias is None for b in m.lora_B.values()) else None


def _packed(m: Any, rows: int) -> Linear:
    """A linear layer with its adapters; in bf16 on a CPU with its weight in the layout of the matrix unit, half the time at few rows."""
    base = _base(m)
    assert base is not None
    whole = _ready(base, rows)
    if m is base or m.disable_adapters:
        return whole
    added = [(m.lora_A[n].weight, m.lora_B[n].weight, m.scaling[n]) for n in m.active_adapters if n in m.lora_A]

    def adapted(x: Tensor) -> Tensor:
        y = whole(x)
        for a, b, scale in added:
            y = y + F.linear(F.linear(x.to(a.dtype), a), b) * scale
        return y.to(x.dtype)

    return adapted


def _ready(m: nn.Linear, rows: int) -> Linear:
    weight, bias = m.weight.detach(), m.bias
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return lambda x: F.linear(x, weight, bias)
    ready = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, ready, bias, "none", [], "")
