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

CHUNK = 512  # positions whose logits exist at a time


class PolicyHead(nn.Module):
    """A causal language model that returns `logp` and `entropy` [N, T] of the trained tokens.

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
        self, ids: Tensor, attention: Tensor, mask: Tensor, group: Tensor, want: frozenset[str]
    ) -> dict[str, Tensor]:
        hf = inner(self.model)
        hidden, place = run_backbone(hf.get_decoder(), ids, attention, group, self.packing)  # [L, D], [N, T]
        source = shifted(place)[mask]  # [n]
        targets = ids[mask].to(hidden.device)
        entropy = "entropy" in want
        parts = []
        for rows, target in zip(source.split(CHUNK), targets.split(CHUNK), strict=True):
            chunk = hidden[rows.to(hidden.device)]
            args = (hf.get_output_embeddings(), chunk, target, self.temperature, _cap(hf), entropy)
            parts.append(
                checkpoint(_token_logp, *args, use_reentrant=False) if torch.is_grad_enabled() else _token_logp(*args)
            )
        where = mask.to(hidden.device)
        names = ("logp", "entropy") if entropy else ("logp",)
        columns = [torch.cat(x) for x in zip(*parts, strict=True)] if parts else [precise(hidden[:0].sum(-1))] * 2
        return {name: _scatter(where, x) for name, x in zip(names, columns, strict=False) if name in want}


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
        self, ids: Tensor, attention: Tensor, mask: Tensor, group: Tensor, want: frozenset[str]
    ) -> dict[str, Tensor]:
        hf = inner(self.model)
        hidden, place = run_backbone(hf.base_model, ids, attention, group, self.packing)
        outs: dict[str, Tensor] = {}
        if "value_new" in want:
            at = shifted(place)[mask].to(hidden.device)
            outs["value_new"] = _scatter(mask.to(hidden.device), precise(hf.score(hidden[at]).squeeze(-1)))
        if "score_new" in want:
            last = place.gather(1, attention.sum(-1, keepdim=True) - 1).squeeze(1).to(hidden.device)
            outs["score_new"] = precise(hf.score(hidden[last]).squeeze(-1))
        return outs


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
        out = backbone(
            input_ids=layout.ids, attention_mask=no_mask, position_ids=layout.positions, use_cache=False, layout=layout
        )
        return out.last_hidden_state[0], layout.place.cpu()
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    moved = {"input_ids": ids.to(device), "attention_mask": attention.to(device), "position_ids": positions.to(device)}
    out = backbone(**moved, use_cache=False)
    return out.last_hidden_state.flatten(0, 1), torch.arange(ids.numel()).view_as(ids)


def _token_logp(
    head: nn.Module, hidden: Tensor, target: Tensor, temperature: float, cap: float | None, entropy: bool
) -> tuple[Tensor, ...]:
    logits = head(hidden)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    if temperature != 1.0:
        logits = precise(logits) / temperature
    if not entropy:
        return (TargetLogp.apply(logits, target),)
    wide = precise(logits)
    total = wide.logsumexp(-1)
    logp = wide.gather(-1, target[:, None]).squeeze(-1) - total
    return logp, total - ((wide - total[:, None]).exp() * wide).sum(-1)


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
    return x if x.dtype == torch.float64 else x.float()


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
    }
