"""What a learner returns: log-probs and entropy from a language model, a number per token or per row from a scalar head.

Every module here takes rows and returns the columns asked for, [N, T] or [N], zero off the mask. How the rows become model calls is
private (`packing.py`). The full [tokens, V] logits never exist: positions go through the output layer in chunks that are recomputed
in the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_cli.models.packing import pack, shifted, to_device
from rlhf_cli.models.saving import recipes

CHUNK = 256  # positions whose logits exist at a time, where all of the vocabulary is needed at once
BLOCK = {"cpu": 1 << 21}  # logits that exist at a time where it is not: on a CPU what its cache holds
MULTIPLE = 256  # tokens of the vocabulary in a block are a multiple of it


class PolicyHead(nn.Module):
    """A causal language model that returns `logp` and `entropy` [N, T] of the trained tokens.

    Where rows say which tokens were `allowed` [N, S, B], these are of the distribution on them, and `full_logp` is of the whole one.

    Args:
        model: a Hugging Face causal language model, with or without peft adapters.
        temperature: logits are divided by it, as the sampler did.
        packing: share prefixes and drop padding; off: padded rows and the model's own attention.
    """

    def __init__(self, model: nn.Module, *, temperature: float, packing: bool) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.packing = packing

    def forward(
        self,
        ids: Tensor,
        attention: Tensor,
        mask: Tensor,
        group: Tensor,
        want: frozenset[str],
        allowed: Tensor | None = None,
    ) -> dict[str, Tensor]:
        hidden, place = run_backbone(inner(self.model).get_decoder(), ids, attention, group, self.packing)
        return self.token_outputs(hidden, place, ids, mask, want, allowed)

    def token_outputs(
        self, hidden: Tensor, place: Tensor, ids: Tensor, mask: Tensor, want: frozenset[str], allowed: Tensor | None
    ) -> dict[str, Tensor]:
        """`logp`, `entropy` and `full_logp` from hidden states [L, D] and the flat position [N, T] of every token."""
        hf = inner(self.model)
        source = shifted(place)[mask]  # [n]
        targets = ids[mask].to(hidden.device)
        where = mask.to(hidden.device)
        outs: dict[str, Tensor] = {}
        if "full_logp" in want:
            outs["full_logp"] = self._columns(hf, hidden, source, targets, where, False, None)["logp"]
        if want & {"logp", "entropy"}:
            bits = None if allowed is None else of_tokens(allowed, mask)
            found = self._columns(hf, hidden, source, targets, where, "entropy" in want, bits)
            outs |= {k: v for k, v in found.items() if k in want}
        return outs

    def _columns(
        self,
        hf: Any,
        hidden: Tensor,
        source: Tensor,
        targets: Tensor,
        where: Tensor,
        entropy: bool,
        allowed: Tensor | None,
    ) -> dict[str, Tensor]:
        """`logp`, and `entropy` where asked for, [N, T] of the trained tokens, over what is `allowed` [n, B]."""
        weight = plain_weight(hf.get_output_embeddings())
        if weight is not None and not entropy and not _cap(hf) and allowed is None:
            chosen = hidden[source.to(hidden.device)]
            return {"logp": _scatter(where, LinearLogp.apply(chosen, weight, targets, self.temperature))}
        parts = []
        sets = [None] * len(source.split(CHUNK)) if allowed is None else allowed.split(CHUNK)
        for rows, target, bits in zip(source.split(CHUNK), targets.split(CHUNK), sets, strict=True):
            chunk = hidden[rows.to(hidden.device)]
            args = (hf.get_output_embeddings(), chunk, target, self.temperature, _cap(hf), entropy, bits)
            parts.append(
                checkpoint(_token_logp, *args, use_reentrant=False) if torch.is_grad_enabled() else _token_logp(*args)
            )
        names = ("logp", "entropy") if entropy else ("logp",)
        columns = [torch.cat(x) for x in zip(*parts, strict=True)] if parts else [precise(hidden[:0].sum(-1))] * 2
        return {name: _scatter(where, x) for name, x in zip(names, columns, strict=False)}


class SharedHead(PolicyHead):
    """A `PolicyHead` with a linear value head on the same hidden states: `logp`, `entropy` and `value_new`, [N, T] each.

    The value head starts as `load_scalar`'s: normal of variance 1 / (hidden + 1), without bias.

    Args:
        model: a Hugging Face causal language model, with or without peft adapters.
        temperature: logits are divided by it, as the sampler did.
        packing: share prefixes and drop padding; off: padded rows and the model's own attention.
        seed: of the value head.
    """

    def __init__(self, model: nn.Module, *, temperature: float, packing: bool, seed: int) -> None:
        super().__init__(model, temperature=temperature, packing=packing)
        like = inner(model).get_input_embeddings().weight
        self.value = nn.Linear(like.shape[1], 1, bias=False, dtype=like.dtype)
        drawn = torch.empty(1, like.shape[1])
        drawn.normal_(std=(like.shape[1] + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))
        self.value.weight.data.copy_(drawn)

    def forward(
        self,
        ids: Tensor,
        attention: Tensor,
        mask: Tensor,
        group: Tensor,
        want: frozenset[str],
        allowed: Tensor | None = None,
    ) -> dict[str, Tensor]:
        hidden, place = run_backbone(inner(self.model).get_decoder(), ids, attention, group, self.packing)
        tokens = want - {"value_new"}
        outs = self.token_outputs(hidden, place, ids, mask, tokens, allowed) if tokens else {}
        return outs | (token_values(self.value, hidden, place, mask) if "value_new" in want else {})


class ScalarHead(nn.Module):
    """A backbone with a linear head to one number.

    `value_new` [N, T]: the number read one token earlier, before token t is seen. `score_new` [N]: the number at the last real token.

    Args:
        model: a Hugging Face sequence-classification model with one label.
        packing: as for `PolicyHead`.
    """

    def __init__(self, model: nn.Module, *, packing: bool) -> None:
        super().__init__()
        self.model = model
        self.packing = packing

    def forward(
        self,
        ids: Tensor,
        attention: Tensor,
        mask: Tensor,
        group: Tensor,
        want: frozenset[str],
        allowed: Tensor | None = None,
    ) -> dict[str, Tensor]:
        hf = inner(self.model)
        hidden, place = run_backbone(hf.base_model, ids, attention, group, self.packing)
        outs: dict[str, Tensor] = {}
        if "value_new" in want:
            outs |= token_values(hf.score, hidden, place, mask)
        if "score_new" in want:
            last = place.gather(1, attention.sum(-1, keepdim=True) - 1).squeeze(1).to(hidden.device)
            outs["score_new"] = precise(hf.score(hidden[last]).squeeze(-1))
        return outs


def token_values(head: nn.Module, hidden: Tensor, place: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """`value_new` [N, T] of a linear head: the number read one token earlier, before token t is seen."""
    at = shifted(place)[mask].to(hidden.device)
    return {"value_new": _scatter(mask.to(hidden.device), precise(head(hidden[at]).squeeze(-1)))}


def inner(model: nn.Module) -> Any:
    """The Hugging Face model inside a peft wrapper, whose adapters live in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def run_backbone(backbone: Any, ids: Tensor, attention: Tensor, group: Tensor, packing: bool) -> tuple[Tensor, Tensor]:
    """Last hidden states [L, D] of rows [N, T], and the flat position [N, T] of every token."""
    device = next(backbone.parameters()).device
    if packing:
        layout = to_device(pack(ids, attention, group), device)
        no_mask = torch.empty(
            1, 1, 1, 1, device=device
        )  # 4D: transformers passes it on untouched; the layout is the mask
        with recipes():
            out = backbone(
                input_ids=layout.ids,
                attention_mask=no_mask,
                position_ids=layout.positions,
                use_cache=False,
                layout=layout,
            )
        return out.last_hidden_state[0], layout.place.cpu()
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    moved = {"input_ids": ids.to(device), "attention_mask": attention.to(device), "position_ids": positions.to(device)}
    with recipes():
        out = backbone(**moved, use_cache=False)
    return out.last_hidden_state.flatten(0, 1), torch.arange(ids.numel()).view_as(ids)


def of_tokens(allowed: Tensor, mask: Tensor) -> Tensor:
    """The sets [n, B] of the trained tokens of rows, in the order of `mask` [N, T], of the column `allowed` [N, S, B]."""
    return allowed[torch.arange(allowed.shape[1]) < mask.sum(-1, keepdim=True)]


def unpacked_bits(bits: Tensor, size: int) -> Tensor:
    """[n, size] bool of a bit per entry, [n, B] uint8, the highest bit first."""
    shift = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] >> shift) & 1).bool().flatten(1)[:, :size]


def _token_logp(
    head: nn.Module,
    hidden: Tensor,
    target: Tensor,
    temperature: float,
    cap: float | None,
    entropy: bool,
    allowed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    logits = head(hidden)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    if temperature != 1.0:
        logits = precise(logits) / temperature
    if allowed is not None:
        ban = ~unpacked_bits(allowed.to(logits.device), logits.shape[-1])
        logits = logits.masked_fill(ban, float("-inf"))
    if not entropy:
        return (TargetLogp.apply(logits, target),)
    wide = precise(logits)
    total = wide.logsumexp(-1)
    logp = wide.gather(-1, target[:, None]).squeeze(-1) - total
    p = (wide - total[:, None]).exp()
    return logp, total - (p * (wide if allowed is None else wide.masked_fill(ban, 0.0))).sum(-1)


class LinearLogp(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[target], [n], of hidden [n, D] and weight [V, D], at least in fp32.

    Logits exist for all positions and a block of the vocabulary at a time, and are made again in the backward pass. So the weight is
    read once a pass, its gradient is written once, and a block stays in the processor's cache. One number per row is saved.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> Tensor:
        wide = _wide(hidden.dtype)
        picked, total = (hidden.new_zeros(len(hidden), dtype=wide) for _ in range(2))
        top = hidden.new_full((len(hidden),), float("-inf"), dtype=wide)
        for at in _blocks(hidden, weight):
            x = _logits(hidden, weight[at], temperature)
            rows, column = _inside(target, at)
            picked[rows] = x[rows, column]
            before, top = top, torch.maximum(top, x.amax(-1))
            total.mul_((before - top).exp_()).add_(x.sub_(top[:, None]).exp_().sum(-1))
        total = total.log_().add_(top)
        ctx.save_for_backward(hidden, weight, target, total)
        ctx.temperature = temperature
        return picked - total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        hidden, weight, target, total = ctx.saved_tensors
        grad = grad / ctx.temperature
        hidden_grad = torch.zeros_like(hidden, dtype=grad.dtype) if ctx.needs_input_grad[0] else None
        weight_grad = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for at in _blocks(hidden, weight):
            x = _logits(hidden, weight[at], ctx.temperature)
            x.sub_(total[:, None]).exp_().mul_(-grad[:, None])
            rows, column = _inside(target, at)
            x[rows, column] += grad[rows]
            x = x.to(weight.dtype)
            if hidden_grad is not None:
                hidden_grad += x @ weight[at]
            if weight_grad is not None:
                torch.mm(x.t(), hidden, out=weight_grad[at])
        return None if hidden_grad is None else hidden_grad.to(hidden.dtype), weight_grad, None, None


def plain_weight(head: nn.Module) -> Tensor | None:
    """The weight of an output layer that is only a matrix, whole on this rank; None for adapters, biases and ZeRO-3 shards."""
    if type(head) is not nn.Linear or head.bias is not None or hasattr(head.weight, "ds_id"):
        return None
    return head.weight


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[n, V] in fp32 at least, a tensor of its own."""
    x = precise(hidden @ weight.t())
    return x if temperature == 1.0 else x.div_(temperature)


def _blocks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Parts of the vocabulary whose logits, with all positions, are BLOCK numbers or few more."""
    v = len(weight)
    size = max(MULTIPLE, BLOCK.get(hidden.device.type, 1 << 25) // max(1, len(hidden)) // MULTIPLE * MULTIPLE)
    return [slice(i, min(v, i + size)) for i in range(0, v, size)]


def _inside(target: Tensor, at: slice) -> tuple[Tensor, Tensor]:
    """The positions whose target [n] lies in a block, and its column there."""
    rows = ((target >= at.start) & (target < at.stop)).nonzero().flatten()
    return rows, target[rows] - at.start


class TargetLogp(torch.autograd.Function):
    """log softmax(logits)[target], at least in fp32, with half the passes over [n, V] that autograd's own would make."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        x = precise(logits)
        x = x.clone() if x is logits else x
        top = x.amax(-1, keepdim=True)
        picked = x.gather(-1, target[:, None])
        total = x.sub_(top).exp_().sum(-1, keepdim=True).log_() + top
        ctx.save_for_backward(logits, total, target)
        return (picked - total).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, total, target = ctx.saved_tensors
        x = (precise(logits) - total).exp_().mul_(-grad[:, None])
        x.scatter_add_(-1, target[:, None], grad[:, None])
        return x.to(logits.dtype), None


def _cap(hf: Any) -> float | None:
    return getattr(hf.config, "final_logit_softcapping", None)


def precise(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(_wide(x.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scatter(mask: Tensor, values: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def stage_inputs(exp: Any, rows: Tensor) -> Mapping[str, Tensor]:
    """The tensors a head takes, for some rows, cut to their longest."""
    attention = exp.attention[rows]
    width = int(attention.sum(-1).max())
    return {
        "ids": exp.ids[rows, :width],
        "attention": attention[:, :width],
        "mask": exp.mask[rows, :width],
        "group": exp.group[rows],
        **({} if exp.allowed is None else {"allowed": exp.allowed[rows]}),
    }
