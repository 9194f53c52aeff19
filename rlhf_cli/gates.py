"""Gates: refuse silently wrong science. Each names the step, the number and what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rlhf_cli.config import GatesSection
from rlhf_cli.errors import GateError
from rlhf_cli.types import Experience

Stats = Mapping[str, Sequence[Mapping[str, float]]]

# Mean |log-prob change| under re-batching, nats a token. SmolLM2-135M shows 3.5e-6 in fp32 and 0.04 in bf16, packed or padded.
INVARIANCE = {"fp32": 1e-4, "bf16": 0.2}
LOGP_GAP = {
    "fp32": 1e-3,
    "bf16": 0.2,
}  # mean |sampler - learner| log-prob; bf16 on SmolLM2-135M shows 0.04, rounding alone; vLLM on a CPU too


def first_ratio(step: int, stats: Stats, tolerance: float) -> None:
    """Before its first update a policy is its own old policy: every ratio is 1, up to rounding under another micro-batch."""
    gap = stats.get("policy", [{}])[0].get("ratio_gap", 0.0)
    if not gap <= tolerance:
        raise GateError(
            f"step {step}: the importance ratios of the first update are off 1 by {gap:.2g} on average (allowed {tolerance:.2g}); "
            "the old log-probs are not this policy's. Set model.packing=false, or turn dropout off"
        )


def first_kl(step: int, stats: Stats, tolerance: float) -> None:
    """A fresh policy is its own reference: KL 0."""
    kl = stats.get("policy", [{}])[0].get("kl", 0.0)
    if not kl <= tolerance:
        raise GateError(
            f"step {step}: KL to the reference is {kl:.2g} nats a token before any update (allowed {tolerance:.2g}); "
            "the reference is not the initial policy. Check model.reference, or set gates.enabled=false if another one is meant"
        )


def sampler_gap(step: int, stats: Stats, limit: float) -> None:
    """Sampler and learner must agree on the log-prob of the very tokens that were sampled."""
    first = stats.get("policy", [{}])[0]
    gap = first.get("sampler_gap", 0.0)
    if not gap <= limit:
        raise GateError(
            f"step {step}: sampler and learner differ by {gap:.2g} nats a token on average, at most {first.get('sampler_gap_max', gap):.2g} "
            f"(gates.logp_gap={limit:.2g}); "
            "the policy that samples is not the one that learns. Set hardware.precision=fp32 to compare, or raise gates.logp_gap"
        )


class ConstantReward:
    """Stops a run whose reward has not varied for many steps: nothing can be learned from it."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.streak = 0

    def __call__(self, score: Tensor) -> None:
        """Count one step; one in which no score was left counts too."""
        empty = len(score) == 0
        self.streak = self.streak + 1 if empty or float(score.max() - score.min()) == 0.0 else 0
        if self.streak >= self.steps:
            what = "no reward was left" if empty else f"every reward was {float(score[0]):g}"
            raise GateError(
                f"{what} for {self.streak} steps (gates.constant_steps={self.steps}); try the reward on a file first: rlhf score"
            )

    def state_dict(self) -> dict[str, int]:
        """The streak."""
        return {"streak": self.streak}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on counting."""
        self.streak = int(state["streak"])


def end_of_turn(exp: Experience, eos: Sequence[int], stops: bool) -> None:
    """A finished response ends with a trained end-of-turn token, or the policy could never learn to stop."""
    if stops or exp.truncated is None:
        return
    finished = ~exp.truncated & exp.mask.any(-1)
    last = (exp.mask * torch.arange(1, exp.mask.shape[1] + 1)).argmax(-1)
    token = exp.ids.gather(1, last[:, None]).squeeze(1)
    bad = finished & ~torch.isin(token, torch.tensor(list(eos)))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise GateError(
            f"row {row}: a finished response ends with token {int(token[row])}, not an end-of-turn token {list(eos)}"
        )


def invariance(
    packed: Callable[[Experience], Tensor], alone: Callable[[Experience], Tensor], exp: Experience, limit: float
) -> float:
    """Mean change of a log-prob (or score) when rows go through the model alone and unpacked; GateError above `limit`."""
    one, other = packed(exp), alone(exp)
    there = exp.mask if one.ndim == 2 else torch.ones_like(one, dtype=torch.bool)
    gap = float((one - other)[there].abs().mean())
    if not gap <= limit:
        raise GateError(
            f"log-probs change by {gap:.2g} nats a token when rows go through the model alone (gates.invariance={limit:.2g}); "
            "this model's attention or output layer does not fit: set model.packing=false, or use another model"
        )
    return gap


class Gates:
    """All gates that look at a finished step."""

    def __init__(
        self,
        cfg: GatesSection,
        *,
        precision: str,
        eos: Sequence[int],
        stops: bool,
        own_reference: bool,
        exact_sampler: bool,
    ) -> None:
        self.cfg, self.eos, self.stops = cfg, eos, stops
        self.own_reference = own_reference  # the reference is the initial policy
        self.limit = (cfg.logp_gap or LOGP_GAP[precision]) if exact_sampler else float("inf")
        self.tolerance = INVARIANCE[precision]
        self.constant = ConstantReward(cfg.constant_steps)

    def reward(self, score: Tensor) -> None:
        """Look at a step's raw scores, before shaping and selection; a no-op when gates are off."""
        if self.cfg.enabled:
            self.constant(score)

    def __call__(self, step: int, exp: Experience, stats: Stats) -> None:
        """Check one step; a no-op when gates are off."""
        if not self.cfg.enabled:
            return
        if not len(exp):
            return
        if step == 0:
            first_ratio(step, stats, self.tolerance)
            end_of_turn(exp, self.eos, self.stops)
            if self.own_reference:
                first_kl(step, stats, self.tolerance)
        if step % self.cfg.logp_every == 0:
            sampler_gap(step, stats, self.limit)
