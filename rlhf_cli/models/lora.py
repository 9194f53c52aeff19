"""Low-rank adapters through peft. Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rlhf_cli.config import LoraSection
from rlhf_cli.errors import ConfigError


def add_lora(model: Any, cfg_lora: LoraSection, seed: int) -> Any:
    """`model` with trainable adapters and frozen weights; a scalar model's `score` head stays trainable.

    Rank 0 changes nothing. Adapters have the model's dtype and are drawn by `seed`; before training they add exactly 0.
    """
    if cfg_lora.r == 0:
        return model
    _check_targets(model, cfg_lora.targets)
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        r=cfg_lora.r,
        lora_alpha=cfg_lora.alpha,  # type: ignore[arg-type]
        target_modules=list(cfg_lora.targets),
        lora_dropout=0.0,
        bias="none",
        task_type=TaskType.SEQ_CLS
        if hasattr(model, "score")
        else TaskType.CAUSAL_LM,  # SEQ_CLS keeps `score` trainable
    )
    with torch.random.fork_rng(devices=[]):
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in wrapped.named_parameters():
        if "lora_A" in name:
            p.data.copy_(nn.init.kaiming_uniform_(torch.empty(p.shape), a=5**0.5, generator=generator))
    return wrapped.eval()


@contextmanager
def reference_disabled(model: Any) -> Iterator[None]:
    """Turn the adapters off meanwhile, so that `model` is its own reference; one without adapters stays as it is."""
    if not hasattr(model, "disable_adapter"):
        yield
        return
    with model.disable_adapter():
        yield


def _check_targets(model: Any, targets: list[str]) -> None:
    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    absent = [t for t in targets if t not in linear]
    if absent or not targets:
        what = f"{', '.join(absent)}: no such layer in this model" if absent else "empty"
        raise ConfigError(f"model.lora.targets: {what}; its linear layers are {', '.join(sorted(linear))}")
