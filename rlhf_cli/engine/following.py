"""Models that are only read and follow the policy: every n steps a copy of its weights, or an exponential average of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cli.engine.deepspeed import DeepSpeedEngine
from rlhf_cli.errors import GateError


class Follower:
    """Brings the trained weights of `engine` to `module`, whose parameters have the same names; its state is those weights.

    A refresh replaces w by decay w + (1 - decay) w_policy: decay 0 copies. The average of bf16 weights is kept in fp32, or small
    steps would be lost in rounding. See Gorbatovski et al., "Learn Your Reference Model for Real Good Alignment",
    arXiv:2404.09656 (both forms); Ramamurthy et al., arXiv:2210.01241 (the lagged copy of NLPO).

    Args:
        name: of the model, for messages.
        module: the model that is only read.
        engine: the policy.
        every: steps between refreshes, at least 1.
        decay: share of its own weights that a refresh keeps, in [0, 1).
    """

    def __init__(self, name: str, module: nn.Module, engine: DeepSpeedEngine, *, every: int, decay: float) -> None:
        self.name, self.engine, self.every, self.decay = name, engine, every, decay
        own = dict(module.named_parameters())
        self.own = {key: own[key] for key in engine.trained if key in own}
        if len(self.own) != len(engine.trained):
            lost = next(key for key in engine.trained if key not in own)
            raise GateError(f"{name}: it has no weight {lost}, so it cannot follow the policy")
        exact = all(p.dtype in (torch.float32, torch.float64) for p in self.own.values())
        self.average = {k: p.detach().float() for k, p in self.own.items()} if decay and not exact else None

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        """After `step` steps' updates; a collective where the policy is sharded."""
        if step % self.every:
            return
        for key, value in self.engine.full_state():
            p = self.own.get(key)
            if p is None:
                continue
            if self.average is not None:
                p.copy_(self.average[key].lerp_(value.float(), 1 - self.decay))
            elif self.decay:
                p.lerp_(value.to(p.dtype), 1 - self.decay)
            else:
                p.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The weights, whole and in the precision of the average."""
        return {"weights": {k: x.detach() for k, x in (self.average or self.own).items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from weights."""
        weights: Mapping[str, Tensor] = state["weights"]
        for key, p in self.own.items():
            if self.average is not None:
                self.average[key].copy_(weights[key])
            p.copy_(weights[key])
