"""Activations that are cheap to make again are not kept for the backward pass, but how to make them is.

Norms, gated products and reordered attention outputs are a third of what a decoder layer saves, and a few hundredths of its time.
Linear layers, which save them, stay whatever they are: adapters included. After Korthikanti et al., Reducing Activation Recomputation
in Large Transformer Models, arXiv:2205.05198, section 5 (selective recomputation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Make = Callable[[], Tensor]


@dataclass
class Recipe:
    """How to make a tensor again; kept from its first use in the backward pass until its last."""

    storage: StorageWeakRef  # of the tensor itself, which lives as long as the forward pass needs it
    make: Make
    version: int  # of the tensor when it was made: one that was changed since is not what the recipe makes
    uses: int = 0
    served: int = 0
    made: Tensor | None = None

    def serve(self) -> Tensor:
        made = self.make() if self.made is None else self.made
        self.served += 1
        self.made = made if self.served % self.uses else None
        return made


@dataclass(frozen=True)
class Saved:
    """What a linear layer keeps instead of a tensor: a recipe, and where in its memory the tensor lies."""

    recipe: Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


_known: ContextVar[dict[int, Recipe] | None] = ContextVar("recipes", default=None)


def cheap(x: Tensor, make: Make) -> Tensor:
    """x, of which whoever saves it keeps `make` only: it must return equal numbers in the same layout, and hold no more than is held anyway."""
    known = None if torch.compiler.is_compiling() else _known.get()  # a compiler chooses by itself
    if known is not None:
        for key in [k for k, r in known.items() if r.storage.expired()]:
            del known[key]
        storage = x.untyped_storage()
        known[storage._cdata] = Recipe(StorageWeakRef(storage), make, x._version)
    return x


@contextmanager
def recipes() -> Iterator[None]:
    """Where `cheap` has an effect: a forward pass whose gradients are wanted."""
    if not torch.is_grad_enabled() or _known.get() is not None:
        yield
        return
    token = _known.set({})
    try:
        with torch.autograd.graph.saved_tensors_hooks(_keep, _fetch):
            yield
    finally:
        _known.reset(token)


def _keep(x: Tensor) -> Any:
    recipe = (_known.get() or {}).get(x.untyped_storage()._cdata)
    if recipe is not None and recipe.version == x._version:
        recipe.uses += 1
        return Saved(recipe, x.size(), x.stride(), x.storage_offset())
    # A node that saved its own result would otherwise hold itself for ever, where no backward pass follows. A weight stays itself:
    # ZeRO-3 changes what it holds.
    return x if x.is_leaf else (x.detach(), x._version)


def _fetch(kept: Any) -> Tensor:
    if isinstance(kept, Saved):
        with torch.no_grad():
            return kept.recipe.serve().as_strided(kept.size, kept.stride, kept.offset)
    if isinstance(kept, Tensor):
        return kept
    x, version = kept
    if x._version != version:
        raise RuntimeError("a tensor that the backward pass needs was changed in place after the forward pass")
    return x
