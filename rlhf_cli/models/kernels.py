"""Faster ways to compute what the plain path computes: `model.kernels`. Imports no torch before one is used.

A kernel changes a model in place and says how to undo it. On real rows, before training, its outputs and its gradients are compared
with the plain path's, and where it fails or differs it is undone and a note says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_cli.errors import ConfigError
from rlhf_cli.nodes import nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_cli.types import Experience

Undo = Callable[[], None]
OUTPUTS = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 3e-2}
GRADIENTS = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 1e-1}
"""Largest difference relative to the plain path's norm, by the type that computes."""
FEW = (
    1 << 16
)  # gradients of parameters with at most so many numbers are compared: they see every layer, and fit beside the model


@dataclass(frozen=True)
class Kernel:
    """One way, and where it works."""

    install: Callable[[Any], Undo]
    does: str
    part: str  # what it replaces; of two for the same part one must be left out
    package: str = ""  # what must be importable
    extra: str = ""  # how to install it
    gpu: bool = False  # NVIDIA GPUs only
    whole: bool = False  # weights must be whole: no ZeRO-3


# -- the kernels -------------------------------------------------------------------------------------------------------


def flex(model: Any) -> Undo:
    """FlexAttention over the pack as one sequence with a block mask. Dong et al., arXiv:2412.05496."""
    from rlhf_cli.models import attentions

    return _attention(model, attentions.FLEX)


def flash(model: Any) -> Undo:
    """FlashAttention's kernel for sequences of different lengths. Dao, arXiv:2307.08691."""
    from rlhf_cli.models import attentions

    return _attention(model, attentions.FLASH)


def liger(model: Any) -> Undo:
    """Liger's Triton kernels of RMSNorm and SwiGLU. Hsu et al., arXiv:2410.10989."""
    import types

    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found]
        liger_rms_norm,
        liger_swiglu,
    )

    from rlhf_cli.models import fused

    def norm(self: Any, hidden_states: Tensor) -> Tensor:
        return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon, in_place=False)

    def gated(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))

    ours = {fused._norm: norm, fused._gated: gated}
    changed: dict[nn.Module, Any] = {}
    for module in model.modules():  # those that were recognised by what they compute
        own = module.__dict__.get("forward")
        if getattr(own, "__func__", None) in ours:
            changed[module] = own
            module.forward = types.MethodType(ours[own.__func__], module)

    def undo() -> None:
        for module, own in changed.items():
            module.forward = own

    return undo


def compiled(model: Any) -> Undo:
    """`torch.compile` of every decoder layer, for sequences of any length."""
    from rlhf_cli.models.heads import inner

    layers = list(getattr(inner(model).base_model, "layers", ()))
    if not layers:
        raise ValueError("this model has no list of layers")
    for layer in layers:
        layer.compile(dynamic=True)

    def undo() -> None:
        for layer in layers:
            layer._compiled_call_impl = None

    return undo


def _attention(model: Any, name: str) -> Undo:
    from rlhf_cli.models.heads import inner

    hf = inner(model)
    before = hf.config._attn_implementation
    if before == "eager":
        raise ValueError("this model computes its own attention")
    hf.set_attn_implementation(name)
    return lambda: hf.set_attn_implementation(before)


KERNELS: Mapping[str, Kernel] = {
    "flex": Kernel(flex, "FlexAttention with a block mask over packed rows", "attention"),
    "flash": Kernel(
        flash, "FlashAttention over packed rows", "attention", "flash_attn", "pip install -e '.[flash]'", gpu=True
    ),
    "liger": Kernel(
        liger, "Liger's RMSNorm and SwiGLU", "norms and gated layers", "liger_kernel", "pip install -e '.[liger]'", gpu=True
    ),
    "compile": Kernel(compiled, "torch.compile of every decoder layer", "layers", whole=True),
}  # fmt: skip
"""Name -> kernel, in no order: they are installed as `model.kernels` lists them."""


# -- before anything loads ---------------------------------------------------------------------------------------------


def check(cfg: Any) -> None:
    """Refuse a name that nothing has, a package that is not there, and settings that a kernel cannot work with."""
    taken: dict[str, str] = {}
    for name in cfg.model.kernels:
        key = f"model.kernels=[{name}]"
        if name not in KERNELS:
            raise ConfigError(f"{key}: no such kernel{nearest(name, KERNELS) or ';'} kernels: {', '.join(KERNELS)}")
        k = KERNELS[name]
        if k.part in taken:
            raise ConfigError(f"{key}: {taken[k.part]} replaces the {k.part} already; choose one of the two")
        taken[k.part] = name
        if k.gpu and cfg.hardware.device == "cpu":
            raise ConfigError(f"{key}: needs an NVIDIA GPU, and hardware.device is cpu; leave it out")
        if k.package and importlib.util.find_spec(k.package) is None:
            raise ConfigError(f"{key}: {k.package} is not installed; type: {k.extra}")
        if k.whole and cfg.hardware.zero == 3:
            raise ConfigError(f"{key}: needs whole weights, and hardware.zero=3 shards them; leave it out")


# -- before training ---------------------------------------------------------------------------------------------------


def use(
    head: Any,
    names: Sequence[str],
    probe: Callable[[], Experience],
    want: frozenset[str],
    note: Callable[[str], None],
    on_any: Callable[[bool], bool] = bool,
) -> list[str]:
    """Install each kernel in `head.model` and keep it where the rows of `probe` give the plain path's outputs `want` and gradients.

    Returns the names of those that stay; every decision is told to `note`. `on_any` says whether something holds on any rank, so that
    all ranks compute alike.
    """
    kept: list[str] = []
    if not names:
        return kept
    exp = probe()
    plain = _computed(head, exp, want)
    for name in names:
        undo, why, gaps = _tried(head, KERNELS[name].install, plain, exp, want)
        if on_any(bool(why)):
            undo()
            note(f"model.kernels: {name} is not used: {why or 'another rank refuses it'}; the plain path is")
        else:
            note(
                f"model.kernels: {name}: outputs differ from the plain path's by {gaps[0]:.1e}, gradients by {gaps[1]:.1e}"
            )
            kept.append(name)
    return kept


Computed = tuple[list["Tensor"], list["Tensor"]]  # outputs, gradients


def _tried(
    head: Any, install: Callable[[Any], Undo], plain: Computed, exp: Experience, want: frozenset[str]
) -> tuple[Undo, str, tuple[float, float]]:
    """Install a kernel and compare: what undoes it, why it cannot stay (empty where it can), and the two differences."""
    undo: Undo = _nothing
    try:
        undo = install(head.model)
        found = _computed(head, exp, want)
    except Exception as e:  # compilers and drivers fail in ways of their own, and training can go on without
        return undo, f"{type(e).__name__}: {' '.join(str(e).split())[:200]}", (0.0, 0.0)
    gaps = _gap(found[0], plain[0]), _gap(found[1], plain[1])
    limits = _limits(head)
    if gaps[0] <= limits[0] and gaps[1] <= limits[1]:
        return undo, "", gaps
    why = f"outputs differ by {gaps[0]:.1e} (allowed {limits[0]:.0e}), gradients by {gaps[1]:.1e} (allowed {limits[1]:.0e})"
    return undo, why, gaps


def _computed(head: Any, exp: Experience, want: frozenset[str]) -> Computed:
    """Outputs of all rows, and gradients of their sum under random weights to the trained parameters of few numbers."""
    import torch

    from rlhf_cli.models.heads import stage_inputs

    trained = [p for p in head.parameters() if p.requires_grad]
    some = [p for p in trained if p.numel() <= FEW] or trained[:1]
    with torch.set_grad_enabled(bool(some)):
        outs = head(**stage_inputs(exp, torch.arange(len(exp))), want=want)
        values = [outs[name] for name in sorted(want)]
        g = torch.Generator().manual_seed(0)
        total = torch.stack([(v * torch.randn(v.shape, generator=g).to(v)).sum() for v in values]).sum()
        grads = torch.autograd.grad(total, some, allow_unused=True) if some else ()
    return [v.detach() for v in values], [x for x in grads if x is not None]


def _gap(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of what is wanted; infinite where the numbers of tensors differ."""
    if len(found) != len(wanted):
        return float("inf")
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, wanted, strict=True))
    size = sum(float(b.double().square().sum()) for b in wanted)
    return (off / size) ** 0.5 if size else off**0.5


def _limits(head: Any) -> tuple[float, float]:
    name = str(next(head.model.parameters()).dtype).removeprefix("torch.")
    return OUTPUTS.get(name, 0.0), GRADIENTS.get(name, 0.0)


def _nothing() -> None:
    pass
