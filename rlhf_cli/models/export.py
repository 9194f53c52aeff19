"""Write a model as a Hugging Face folder that plain transformers (or peft) loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.models.smollm2 import quiet


def export(
    model: Any,
    tokenizer: Any,
    folder: Path | str,
    merge: bool,
    *,
    dtype: torch.dtype = torch.float32,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write weights (safetensors), config and tokenizer aside, then rename to `folder`, replacing what was there.

    The model itself is not touched: merging in place and back would round its weights.

    Args:
        model: a transformers model, or a peft model.
        tokenizer: saved beside it.
        folder: where to.
        merge: for a peft model, write merged weights; otherwise the folder holds the adapter alone.
        dtype: of the written weights.
        state: the model's whole state dict, where its own parameters are sharded.
    """
    folder = Path(folder)
    aside = folder.parent / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    full = dict(state if state is not None else model.state_dict())
    adapted = hasattr(model, "peft_config")
    if adapted and not merge:
        model.save_pretrained(aside, state_dict={k: v.to(dtype) for k, v in full.items() if _is_trained(k)})
    else:
        plain = model.get_base_model() if adapted else model
        _save(plain, merged_state(model, full) if adapted else full, aside, dtype)
    tokenizer.save_pretrained(aside)
    _swap(aside, folder)
    return folder


def merged_state(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a peft model's base with W + scale B A in place of W, under the base model's own names."""
    adapted = {name: m for name, m in model.named_modules() if isinstance(getattr(m, "scaling", None), dict)}
    done: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("base_model.model.")
        if "lora_" in name or ".original_module." in name:
            continue
        if ".base_layer." in name:
            layer = key.partition(".base_layer.")[0]
            if key.endswith(".weight"):
                a, b = (state[f"{layer}.{part}.default.weight"].float() for part in ("lora_A", "lora_B"))
                value = value.float() + adapted[layer].scaling["default"] * (b @ a)
            name = name.replace(".base_layer.", ".")
        done[name.replace(".modules_to_save.default.", ".")] = value
    return done


def _is_trained(name: str) -> bool:
    return "lora_" in name or ".modules_to_save." in name


def _save(model: Any, state: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Weights in `dtype`; a tied weight is written once and tied again by the config."""
    tied = set(getattr(model, "all_tied_weights_keys", {})) if model.config.tie_word_embeddings else set()
    moved = {k: v.detach().to("cpu", dtype if v.is_floating_point() else v.dtype) for k, v in state.items()}
    kept = {k: v.contiguous() for k, v in moved.items() if k not in tied}
    with quiet():
        model.save_pretrained(folder, state_dict=kept)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")  # transformers writes the live model's
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _swap(aside: Path, folder: Path) -> None:
    if folder.exists():
        old = aside.with_name(aside.name + ".old")
        folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old)
        return
    aside.rename(folder)
