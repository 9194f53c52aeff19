"""What a run's own objects remember between steps: found when they are built, written with every checkpoint, equal on all ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.config import build
from rlhf_cli.engine.comm import Comm
from rlhf_cli.errors import GateError

TENSOR = "tensor:"  # stands before the name of a tensor that lies in the other file


class Builder:
    """`build`, which keeps what has `state_dict` and `load_state_dict` by its place in the configuration.

    Args:
        allow: modules outside the package that may be built.
    """

    def __init__(self, allow: list[str]) -> None:
        self.allow = list(allow)
        self.state: dict[str, Any] = {}

    def __call__(self, node: Mapping[str, Any], key: str) -> Callable[..., Any]:
        """The node's target with its settings bound; `key` is its place."""
        return self.keep(key, build(node, key, allow=self.allow))

    def keep(self, key: str, made: Any) -> Any:
        """Remember `made` if it has state; returns it."""
        if hasattr(made, "state_dict") and hasattr(made, "load_state_dict"):
            self.state[key] = made
        return made


def save(objects: Mapping[str, Any], folder: Path, comm: Comm) -> dict[str, Any]:
    """Everybody's state as JSON; tensors in it go to a file of `folder`. All ranks must call; raises GateError where they differ."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    plain = {key: _without_tensors(x.state_dict(), key, tensors) for key, x in objects.items()}
    check_equal(plain, tensors, comm)
    if tensors and comm.rank == 0:
        save_file(tensors, folder / "state.safetensors")
    return plain


def load(objects: Mapping[str, Any], folder: Path, plain: Mapping[str, Any]) -> None:
    """What `save` wrote, back into the objects."""
    from safetensors.torch import load_file

    path = folder / "state.safetensors"
    tensors = load_file(path) if path.exists() else {}
    for key, x in objects.items():
        x.load_state_dict(_with_tensors(plain[key], tensors))


def check_equal(plain: Mapping[str, Any], tensors: Mapping[str, Tensor], comm: Comm) -> None:
    """Every rank must remember the same, or one rank's checkpoint would not be another's."""
    mine = {key: _digest(state, key, tensors) for key, state in plain.items()}
    for rank, theirs in enumerate(comm.gather(mine)):
        wrong = [key for key in mine if theirs.get(key) != mine[key]]
        if wrong:
            raise GateError(
                f"{wrong[0]}: rank {rank} remembers something else than rank {comm.rank}; its state must follow from "
                "columns that every rank has, not from a rank's own share"
            )


def _digest(state: Any, key: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name in sorted(n for n in tensors if n.startswith(f"{key}/")):
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _without_tensors(x: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(x, Tensor):
        tensors[name + "/"] = x.detach().cpu().contiguous().clone()
        return f"{TENSOR}{name}/"
    if isinstance(x, Mapping):
        return {str(k): _without_tensors(v, f"{name}/{k}", tensors) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_without_tensors(v, f"{name}/{i}", tensors) for i, v in enumerate(x)]
    return x


def _with_tensors(x: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(x, str) and x.startswith(TENSOR):
        return tensors[x.removeprefix(TENSOR)]
    if isinstance(x, Mapping):
        return {k: _with_tensors(v, tensors) for k, v in x.items()}
    return [_with_tensors(v, tensors) for v in x] if isinstance(x, list) else x
