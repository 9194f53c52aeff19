"""Norms and gated layers with fewer passes over memory and fewer saved activations than autograd's own.

A module is recognised by what it computes, not by its name: its own forward and backward are run on random numbers next to ours, and
only where both agree is it replaced. Formulas: RMSNorm, Zhang and Sennrich, arXiv:1910.07467, equation 4; SwiGLU, Shazeer,
arXiv:2002.05202, equation 5.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_cli.models.saving import cheap

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2}  # a stock norm computes in fp32 at most


class RMSNorm(torch.autograd.Function):
    """weight * x / rms(x). Computes in fp32 at least, rounds the normalised x to its type as stock modules do.

    Saves x and one number per row; autograd would save x, its square's parts, and the normalised x. The result is cheap to make again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        y = (wide * scale).to(x.dtype).mul_(weight)
        if hasattr(weight, "ds_id"):  # ZeRO-3 may hold no more than a shard of it when the linear layers' turn comes
            return y
        return cheap(y, lambda: (x * scale).to(x.dtype).mul_(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        n = x.shape[-1]
        wide = x if x.dtype == torch.float64 else x.float()
        g = grad.to(wide.dtype)
        product = g * wide
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (scale.reshape(1, -1) @ product.reshape(-1, n)).reshape(n).to(weight.dtype)
        w = weight.to(wide.dtype)
        along = (product @ w).unsqueeze(-1) * scale.pow(3) / -n
        x_grad = (g * w).mul_(scale).addcmul_(wide, along)
        return x_grad.to(x.dtype), weight_grad, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which saves its inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return cheap(F.silu(gate).mul_(up), lambda: F.silu(gate).mul_(up))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def install(model: nn.Module) -> int:
    """Replace the forward of every module of `model` that computes one of the above; returns how many."""
    count = 0
    for module in model.modules():
        forward = next((f for f in _candidates(module) if _agree(module, f)), None)
        if forward is not None:
            module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
            count += 1
    return count


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


def _gated(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


def _candidates(module: nn.Module) -> Iterator[Callable[..., Tensor]]:
    """What a module may be, by the names it has."""
    if hasattr(module, "variance_epsilon") and [n for n, _ in module.named_parameters()] == ["weight"]:
        yield _norm
    if all(hasattr(module, n) for n in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        yield _gated


def _agree(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    """Whether `forward` gives the module's own output and input gradient on random rows."""
    weight = next(module.parameters())
    if weight.numel() == 0:  # sharded by ZeRO-3
        return False
    width = weight.shape[-1]
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(4, width, generator=g).to(weight)
    seed = torch.randn(4, width, generator=g).to(weight)
    found = []
    for f in (type(module).forward, forward):
        x = rows.clone().requires_grad_()
        with torch.enable_grad():
            y = f(module, x)
            found.append((y.detach(), *torch.autograd.grad(y, x, seed)))
    limit = TOLERANCE.get(weight.dtype, 0.0)
    return all(bool(a.any()) and _close(a, b, limit) for a, b in zip(*found, strict=True))  # zeros prove nothing


def _close(a: Tensor, b: Tensor, limit: float) -> bool:
    return bool((a - b).double().norm() <= limit * b.double().norm())
