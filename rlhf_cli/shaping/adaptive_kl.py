"""A KL penalty whose coefficient follows a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from rlhf_cli.shaping.kl import token_kl


class AdaptiveKL:
    """`token_kl` whose beta is multiplied after every step by 1 + clip(KL / target - 1, +-bound) n / horizon, [N, T].

    KL is the step's mean of sum_t (behavior_logp - ref_logp) over rows, or of the summand over tokens. See Ziegler et al.,
    "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593, section 2.2 (per row, n rows, horizon 10000);
    with `count` steps and horizon 10 it is the controller of Ramamurthy et al., "Is Reinforcement Learning (Not) for
    Natural Language Processing", arXiv:2210.01241 (RL4LMs), which measures KL per token.
    """

    def __init__(
        self,
        *,
        beta: float,
        kind: Literal["k1", "k2", "k3"],
        target: float,
        per: Literal["row", "token"],
        bound: float,
        count: Literal["rows", "steps"],
        horizon: float,
    ) -> None:
        """Args:
        beta: penalty of the first step, reward per nat
        kind: estimator of the penalty, k1 (d), k2 (d^2 / 2) or k3 (exp(-d) - 1 + d)
        target: KL to hold, nats
        per: row (KL of whole responses) or token
        bound: largest relative error that counts
        count: rows (n is the number of rows of the step) or steps (n is 1)
        horizon: rows or steps after which an error of 1 has changed beta by a factor of e
        """
        self.beta = beta
        self._kind: Literal["k1", "k2", "k3"] = kind
        self._target, self._per, self._bound = target, per, bound
        self._count, self._horizon = count, horizon
        self.stats: dict[str, float] = {}

    def __call__(self, behavior_logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
        """Rewards of the tokens at the present beta; the next call has the next one.

        Args:
            behavior_logp: log-probabilities of the sampler, [N, T] nats
            ref_logp: the same under the reference, [N, T] nats
            mask: trained tokens, [N, T] bool
        """
        penalty = token_kl(behavior_logp, ref_logp, mask, beta=self.beta, kind=self._kind)
        count = mask.any(-1).sum() if self._per == "row" else mask.sum()
        kl = float((behavior_logp - ref_logp)[mask].double().sum() / count.clamp(min=1))
        self.stats = {"kl": kl, "kl_beta": self.beta}
        error = max(-self._bound, min(self._bound, kl / self._target - 1))
        self.beta *= 1 + error * (len(mask) if self._count == "rows" else 1) / self._horizon
        return penalty

    def state_dict(self) -> dict[str, Any]:
        """The coefficient."""
        return {"beta": self.beta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a coefficient."""
        self.beta = float(state["beta"])


class AdaptiveFullKL(AdaptiveKL):
    """`AdaptiveKL` of the policy's whole distribution, [N, T], where the one that was sampled is masked.

    See Ramamurthy et al., "Is Reinforcement Learning (Not) for Natural Language Processing", arXiv:2210.01241 (NLPO).
    """

    def __call__(self, full_logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
        """Rewards of the tokens at the present beta; the next call has the next one.

        Args:
            full_logp: log-probabilities of the policy over all tokens, at the start of the step, [N, T] nats
            ref_logp: the same under the reference, [N, T] nats
            mask: trained tokens, [N, T] bool
        """
        return super().__call__(full_logp, ref_logp, mask)
