"""Models that are only read: the reference, those of the configuration's `frozen`, and how they follow the policy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rlhf_cli import frozen
from rlhf_cli.engine.comm import Comm
from rlhf_cli.engine.deepspeed import DeepSpeedEngine, Frozen, Setup
from rlhf_cli.engine.following import Follower
from rlhf_cli.models import loading, soup
from rlhf_cli.models.lora import reference_disabled
from rlhf_cli.rollout.masking import Mask

HeadOf = Callable[[Any], nn.Module]  # from a language model to what gives its log-probs


def make(
    cfg: Any,
    heads: Mapping[str, nn.Module],
    wants_reference: bool,
    head_of: HeadOf,
    dtype: torch.dtype,
    setup: Setup,
    comm: Comm,
) -> dict[str, Frozen]:
    """By name: `reference`, behind `ref_logp`, where it is wanted, and every model of `frozen`."""

    def reader(path: str) -> Frozen:
        return Frozen(module_of(cfg, heads, path, head_of, dtype), setup, comm)

    made = {name: reader(section.path) for name, section in cfg.frozen.items()}
    m, own = cfg.model, heads.get("policy")
    if not wants_reference:
        return made
    if m.lora.r and own is not None and not m.refresh.every:
        base: Any = own
        return {"reference": Frozen(own, setup, comm, around=lambda: reference_disabled(base.model)), **made}
    return {"reference": reader(frozen.INITIAL if m.reference == "auto" else m.reference), **made}


def module_of(cfg: Any, heads: Mapping[str, nn.Module], path: str, head_of: HeadOf, dtype: torch.dtype) -> nn.Module:
    """The policy before training, a soup, or another model."""
    if path == frozen.INITIAL and "policy" in heads:
        head = heads["policy"]
        # Weights under adapters are never trained, so a copy shares them.
        fixed = [] if cfg.hardware.zero == 3 else [p for p in head.parameters() if not p.requires_grad]
        return copy.deepcopy(head, {id(p): p for p in fixed}).eval().requires_grad_(False)
    if path == frozen.SOUP:
        mix = cfg.model.soup
        return head_of(soup.averaged(cfg.model, elsewhere(cfg.model, mix.path), mix.weight, dtype=dtype, seed=cfg.seed))
    section = cfg.model if path == frozen.INITIAL else elsewhere(cfg.model, path)
    return head_of(loading.load_causal(section, dtype=dtype, seed=cfg.seed))


def elsewhere(cfg_model: Any, path: str) -> Any:
    """The model section with another path."""
    made = copy.deepcopy(cfg_model)
    made.path, made.source, made.revision = path, "auto", ""
    return made


def followers(cfg: Any, readers: Mapping[str, Frozen], engines: Mapping[str, DeepSpeedEngine]) -> dict[str, Follower]:
    """What brings the policy's weights to models that follow it; checkpointed under these names."""
    return {
        f"frozen.{name}": Follower(name, readers[name].module, engines["policy"], every=r.every, decay=r.decay)
        for name, r in {"reference": cfg.model.refresh, **{k: v.refresh for k, v in cfg.frozen.items()}}.items()
        if r.every and name in readers
    }


def follow(some: Sequence[Follower], step: int) -> None:
    """Every model that follows the policy, after `step` steps' updates."""
    for follower in some:
        follower(step)


def mask_sampler(cfg: Any, sampler: Any, readers: Mapping[str, Frozen], tokenizer: Any) -> None:
    """Let the sampler draw only what `rollout.mask` allows."""
    m = cfg.rollout.mask
    model: Any = readers[m.model].module.model
    special = [*tokenizer.all_special_ids, *sampler.eos]
    sampler.mask = Mask(model, top_p=m.top_p, min_tokens=m.min_tokens, special=special)
