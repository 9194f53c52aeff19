"""What runs inside vLLM's workers: reading weights that the learner left in a file, and fingerprints of what is loaded.

vLLM imports this module through its setting `worker_extension_cls`; nothing here is imported by the learner.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (  # pyrefly: ignore[missing-import]
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import (  # pyrefly: ignore[missing-import]
    WeightTransferEngineFactory,
)

from rlhf_cli.rollout.fingerprint import PACKED, block, column_sum, whole_sum

BACKEND = "rlhf_files"


@dataclass
class NoInit(WeightTransferInitInfo):
    """Files need no rendezvous."""


@dataclass
class File(WeightTransferUpdateInfo):
    """One safetensors file under the model's own parameter names."""

    path: str


class FileTransfer(WeightTransferEngine[NoInit, File]):
    """Loads a safetensors file, on any device, by the same reload that vLLM's NCCL and IPC engines use.

    The reload repacks layers whose kernels keep their own copy of a weight; a plain `load_weights` would leave that
    copy as it was.
    """

    init_info_cls = NoInit
    update_info_cls = File

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to meet."""

    def start_weight_update(self) -> None:
        """Begin a reload of every layer."""
        from vllm.model_executor.model_loader.reload import (  # pyrefly: ignore[missing-import]
            initialize_layerwise_reload,
        )

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one file. The base method also waits for an accelerator, which a CPU has not."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: File) -> None:
        """Load one file."""
        from safetensors import safe_open

        with safe_open(update_info.path, framework="pt", device=str(self.device)) as f:
            names = f.keys()
            self.model.load_weights([(name, f.get_tensor(name)) for name in names])

    def finish_weight_update(self) -> None:
        """End the reload."""
        from vllm.model_executor.model_loader.reload import (  # pyrefly: ignore[missing-import]
            finalize_layerwise_reload,
        )

        finalize_layerwise_reload(self.model, self.model_config)
        # On a CPU an output layer tied to the embedding packs a copy of it, and no weight of its own is ever reloaded.
        for module in self.model.modules():
            if hasattr(module, "cpu_linear") and module.weight.numel():
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing is held."""


WeightTransferEngineFactory.register_engine(BACKEND, FileTransfer)


class Extension:
    """Methods that `collective_rpc` finds on every worker."""

    def rlhf_pid(self: Any) -> list[int]:
        """The worker's process, which also counts the workers."""
        return [os.getpid()]

    def rlhf_fingerprints(self: Any, turn: int) -> dict[str, int]:
        """Checkpoint name(s) -> fingerprint of the columns that `turn` selects, as the kernels of this rank hold them.

        Layers that fuse several checkpoint tensors give one number under their names joined by `+`.
        """
        model = self.model_runner.get_model()
        fused = getattr(model, "packed_modules_mapping", {})
        found: dict[str, int] = {}
        with torch.no_grad():
            for name, module in model.named_modules():
                for part, value in _loaded(module, turn):
                    parent, _, leaf = name.rpartition(".")
                    names = [f"{parent}.{x}.{part}".lstrip(".") for x in fused.get(leaf, [leaf])]
                    found["+".join(names)] = value
        return found


def _loaded(module: Any, turn: int) -> Iterator[tuple[str, int]]:
    """(parameter, fingerprint) of this rank's share of a module's own parameters; shares of all ranks add up."""
    split = getattr(module, "tp_size", 1) > 1
    rank = getattr(module, "tp_rank", 0)
    if getattr(module, "num_kv_head_replicas", 1) > 1:
        return  # some rows lie on several ranks
    for part, p in module.named_parameters(recurse=False):
        by_input = split and getattr(module, "input_size", 0) > getattr(module, "input_size_per_partition", 1 << 62)
        if rank and (not split or (by_input and p.ndim == 1)):
            continue  # replicated; rank 0 speaks
        if part == "weight" and hasattr(module, "cpu_linear"):
            yield f"{part}{PACKED}", _packed(module, p, turn)
        if not p.numel():  # what packing leaves behind
            continue
        if p.ndim == 1:
            yield part, whole_sum(p)
        elif p.ndim == 2:
            offset, width = (rank * p.shape[1], module.input_size) if by_input else (0, p.shape[1])
            columns = [c for c in block(width, turn) if offset <= c < offset + p.shape[1]]
            local = torch.tensor([c - offset for c in columns], dtype=torch.int64, device=p.device)
            yield part, column_sum(p.index_select(1, local), columns)


def _packed(module: Any, weight: Tensor, turn: int) -> int:
    """Columns of a weight that a CPU kernel keeps packed: the layer's answer to unit vectors, which is exact."""
    width = getattr(module, "input_size_per_partition", None) or module.embedding_dim
    columns = block(width, turn)
    unit = torch.zeros(len(columns), width, dtype=weight.dtype)
    unit[torch.arange(len(columns)), torch.tensor(columns)] = 1
    return column_sum(module.cpu_linear(unit, weight, None).t(), columns)
