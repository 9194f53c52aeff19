"""From the learner's weights to vLLM's, and the proof that they arrived.

LoRA adapters are merged into what is sent: the engine then runs a plain model, on every layer that peft can adapt, and one
path and one proof serve full and low-rank training.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.engine.comm import Comm
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.hardware import free_port
from rlhf_cli.models.export import merged_state
from rlhf_cli.rollout import fingerprint
from rlhf_cli.rollout.vllm_engine import Engine

CHUNK = 1 << 28  # bytes of weights in a file at a time
Weights = Callable[[], Iterator[tuple[str, Tensor]]]


def plain_weights(model: Any, state: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, whole tensor in `dtype`) of every parameter and saved buffer, adapters merged.

    Args:
        model: a transformers model, or a peft model.
        state: its parameters and buffers under its own names, one at a time; a tensor is read before the next one comes.
        dtype: of the engine.
    """
    saved = set(model.state_dict())
    adapted = hasattr(model, "peft_config")
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, value in state:
        if name not in saved:
            continue
        layer = name.partition(".base_layer.")[0].partition(".lora_")[0]
        if adapted and layer != name and not name.endswith(".bias"):
            parts = waiting.setdefault(layer, {})
            parts[name] = value.detach().clone()  # the rest of the layer comes later
            if len(parts) == 3:  # W, A and B
                yield from _cast(merged_state(model, waiting.pop(layer)).items(), dtype)
        elif adapted:
            yield from _cast(merged_state(model, {name: value}).items(), dtype)
        else:
            yield from _cast([(name, value)], dtype)
    if waiting:
        raise ConfigError(f"rollout=vllm cannot merge the adapter of {next(iter(waiting))}; use rollout=builtin")


def _cast(items: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, value in items:
        yield name, value.detach().to(dtype) if value.is_floating_point() else value.detach()


class Sync:
    """Sends the learner's weights to the engine and proves that the engine holds them. Every rank calls it.

    Args:
        engine: None on a rank whose engine another rank drives; that rank only joins the collectives.
        weights: gives the weights, as `plain_weights` does; a collective under ZeRO-3.
        send: how they travel, of `SENDERS`.
        comm: the ranks.
        tied: names that are not sent -> the sent weight that they share.
    """

    def __init__(
        self, engine: Engine | None, weights: Weights, send: str, comm: Comm, tied: Mapping[str, str] | None = None
    ) -> None:
        self.engine, self.weights, self.comm = engine, weights, comm
        self.tied = dict(tied or {})
        self.turn = 0
        self._send = SENDERS[send](self)
        self._whole: int | None = None  # the learner's weights when last sent

    def __call__(self, moved: bool) -> dict[str, float]:
        """Send and prove. `moved`: the learner took a step since the last call. Returns what was checked."""
        self.turn += 1
        before = self._held()
        sent: dict[str, int] = {}
        total = [0]
        self._send(self._watched(sent, total))
        if self.engine is not None:
            self.engine.reset_prefix_cache()
        stats = self._prove(sent, before)
        if moved and self._whole == total[0]:
            raise GateError("the weights that are sent to vLLM did not change after an update; raise optim.lr")
        self._whole = total[0]
        self.comm.barrier()
        return stats

    def _watched(self, sent: dict[str, int], total: list[int]) -> Iterator[tuple[str, Tensor]]:
        """The weights, noting fingerprints on their way."""
        for name, value in self.weights():
            sent[name] = fingerprint.of_tensor(value, self.turn)
            total[0] = fingerprint.add([total[0], fingerprint.checksum(value)])
            yield name, value

    def _held(self) -> dict[str, int]:
        """Fingerprints of what the engine holds, over all its workers."""
        if self.engine is None:
            return {}
        parts: dict[str, list[int]] = {}
        for found in self.engine.call("rlhf_fingerprints", self.turn):
            for name, value in found.items():
                parts.setdefault(name, []).append(int(value))
        return {name: fingerprint.add(values) for name, values in parts.items()}

    def _prove(self, sent: dict[str, int], before: Mapping[str, int]) -> dict[str, float]:
        if self.engine is None:
            return {}
        sent = {**sent, **{alias: sent[name] for alias, name in self.tied.items() if name in sent}}
        after = self._held()
        wanted = {k: [sent.get(n.removesuffix(fingerprint.PACKED)) for n in k.split("+")] for k in after}
        known = {k: fingerprint.add(v) for k, v in wanted.items() if None not in v}  # type: ignore[arg-type]
        if not known:
            raise GateError("no weight that vLLM holds has the name of a weight that was sent; use rollout=builtin")
        wrong = [k for k, v in known.items() if after[k] != v]
        if wrong:
            why = "its weights did not change" if after == before else "it holds other weights than were sent"
            raise GateError(
                f"rank {self.comm.rank}: vLLM after the sync: {why} ({len(wrong)} of {len(known)} tensors, first {wrong[0]}); "
                "do not trust these rollouts: try rollout.vllm.transfer=files, or rollout=builtin"
            )
        changed = sum(after[k] != before[k] for k in known)
        return {"synced_tensors": float(len(known)), "changed_tensors": float(changed)}


# -- how weights travel ------------------------------------------------------------------------------------------------


class Files:
    """Through files in shared memory, a few tensors at a time: any device, any process of this machine."""

    def __init__(self, sync: Sync) -> None:
        self.engine = sync.engine
        if self.engine is not None:
            self.engine.init_weight_transfer_engine({})

    def __call__(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """One update."""
        if self.engine is None:
            for _ in weights:
                pass
            return
        folder = Path(tempfile.mkdtemp(prefix="rlhf-weights-", dir=_shared_memory()))
        try:
            self.engine.start_weight_update()
            for number, chunk in enumerate(chunks(weights, CHUNK)):
                self._load(folder / f"{number}.safetensors", chunk)
            self.engine.finish_weight_update()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _load(self, path: Path, chunk: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        assert self.engine is not None
        save_file({k: v.cpu().contiguous() for k, v in chunk.items()}, path)
        self.engine.update_weights({"path": str(path)})
        path.unlink()


class Direct:
    """Through vLLM's own trainer side, which drives the engine: NCCL between devices, or CUDA IPC on one.

    Not run on the machines where this project is tested; written against vLLM 0.32.
    """

    def __init__(self, sync: Sync) -> None:
        self.sync = sync
        self.trainer: Any = None
        self._weights: Iterator[tuple[str, Tensor]] = iter(())

    def __call__(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """One update."""
        self._weights = weights
        if self.trainer is None:
            factory: Any = importlib.import_module("vllm.distributed.weight_transfer.factory")
            self.trainer = factory.WeightTransferTrainerFactory.trainer_init(
                self.info(), client=self.sync.engine, source=self._source()
            )
        self.trainer.send_weights()

    def info(self) -> Any:
        """What vLLM's trainer side needs to know."""
        raise NotImplementedError

    def _source(self) -> Any:
        """vLLM's view of the weights: their shapes once, and one pass per update."""
        base: Any = importlib.import_module("vllm.distributed.weight_transfer.base")
        shapes = [base.ParamMeta(name, v.dtype, tuple(v.shape)) for name, v in self.sync.weights()]
        methods = {"metadata": lambda _: shapes, "__iter__": lambda _: self._weights}
        return type("LearnerWeights", (base.WeightSource,), methods)()


class Ipc(Direct):
    """CUDA IPC: learner and engine of a rank share its device."""

    def info(self) -> Any:
        """Every rank drives the engine on its own device, and joins the exchange of handles."""
        ipc: Any = importlib.import_module("vllm.distributed.weight_transfer.ipc_engine")
        return ipc.IPCTrainerInitInfo(rank=0, packed=True)


class Nccl(Direct):
    """NCCL from rank 0 to a server on other devices of this machine."""

    def info(self) -> Any:
        """Rank 0 sends; the others join the learner's collectives."""
        nccl: Any = importlib.import_module("vllm.distributed.weight_transfer.nccl_engine")
        workers = len(self.sync.engine.call("rlhf_pid")) if self.sync.engine is not None else 1
        return nccl.NCCLTrainerInitInfo(
            rank=self.sync.comm.rank, master_address="127.0.0.1", master_port=free_port(), world_size=1 + workers
        )


SENDERS: dict[str, Callable[[Sync], Callable[[Iterator[tuple[str, Tensor]]], None]]] = {
    "files": Files,
    "ipc": Ipc,
    "nccl": Nccl,
}


def chunks(weights: Iterable[tuple[str, Tensor]], most: int) -> Iterator[dict[str, Tensor]]:
    """Weights in groups of about `most` bytes, never empty."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, value in weights:
        if group and size + value.nbytes > most:
            yield group
            group, size = {}, 0
        # under ZeRO-3 the tensor is gone when the next one comes
        group[name] = value.to("cpu", copy=True)
        size += value.nbytes
    if group:
        yield group


def _shared_memory() -> str | None:
    """A folder in memory with room for a chunk; None for the usual temporary folder."""
    folder = "/dev/shm"
    if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 4 * CHUNK:
        return folder
    return None
