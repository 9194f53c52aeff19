"""Training without ZeRO: one flat fp32 tensor of weights, one that gradients are added into as they come, and AdamW on both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class MasterEngine:
    """What a `DeepSpeedEngine` asks of DeepSpeed's engine, for weights that every rank holds whole.

    A parameter's gradient is added to its part of the buffer and freed as soon as a backward pass has made it, so neither all
    low-precision gradients nor fp32 copies of them ever exist. Low-precision weights are rounded from the flat tensor; others lie in it.

    Args:
        module: whose parameters are trained where they require a gradient.
        make_optimizer: from the one flat master parameter to its optimizer, whose state is flat as well.
        clip: largest 2-norm of the gradient; 0 for any.
        world: processes, over which gradients are averaged.
    """

    def __init__(
        self, module: nn.Module, make_optimizer: Callable[[list[nn.Parameter]], Any], clip: float, world: int
    ) -> None:
        self.module, self.clip, self.world = module, clip, world
        self.trained = [p for p in module.parameters() if p.requires_grad]
        size = sum(p.numel() for p in self.trained)
        wide = torch.float64 if any(p.dtype == torch.float64 for p in self.trained) else torch.float32
        self.flat = nn.Parameter(torch.empty(size, dtype=wide, device=self.trained[0].device))
        self.flat.grad = torch.zeros_like(self.flat)
        self.masters, self._grads = self.views(self.flat.detach()), self.views(self.flat.grad)
        for p, master in self.masters.items():
            master.copy_(p.detach())
            if p.dtype == wide:
                p.data = master
        self.optimizer = make_optimizer([self.flat])
        self._made: set[nn.Parameter] = set()  # whose gradient is in the buffer; what else it holds is of the last step
        self._norm = 0.0
        for p in self.trained:
            p.register_post_accumulate_grad_hook(self._take)

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def views(self, flat: Tensor) -> Mapping[nn.Parameter, Tensor]:
        """Every parameter's part of a flat tensor."""
        parts = flat.split([p.numel() for p in self.trained])
        return {p: part.view(p.shape) for p, part in zip(self.trained, parts, strict=True)}

    def _take(self, p: Tensor) -> None:
        """After a backward pass: into the buffer. The first of a step is copied, which needs no zeros before."""
        assert isinstance(p, nn.Parameter) and p.grad is not None
        if p in self._made:
            self._grads[p].add_(p.grad)
        else:
            self._grads[p].copy_(p.grad)
            self._made.add(p)
        p.grad = None

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        """Nothing to prepare: ranks meet in `step`."""

    def backward(self, loss: Tensor, scale_wrt_gas: bool = False) -> None:
        """Add the gradient of a micro-batch's share of the loss."""
        loss.backward()

    @torch.no_grad()
    def step(self) -> None:
        """Average over ranks, clip, step, and round the new weights where they are of lower precision."""
        for p in self.trained:
            if p not in self._made:
                self._grads[p].zero_()
        self._made.clear()
        grad = self.flat.grad
        assert grad is not None
        if self.world > 1:
            dist.all_reduce(grad)
            grad /= self.world
        norm = torch.linalg.vector_norm(grad)
        self._norm = float(norm)
        if self.clip:
            grad *= (self.clip / (norm + 1e-6)).clamp(max=1.0)
        self.optimizer.step()
        for p, master in self.masters.items():
            if p.dtype != master.dtype:
                p.copy_(master)

    def get_global_grad_norm(self) -> float:
        """2-norm of the last step's gradient before clipping."""
        return self._norm
