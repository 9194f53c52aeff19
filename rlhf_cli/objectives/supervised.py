"""Objectives on demonstrations, unreduced."""

from __future__ import annotations

from torch import Tensor

from rlhf_cli.inject import rowwise


@rowwise
def nll(logp: Tensor) -> Tensor:
    """Negative log-likelihood of each token, -logp, [N, T]: supervised fine-tuning.

    See Ouyang et al., "Training language models to follow instructions with human feedback", arXiv:2203.02155, section
    3.1.

    Args:
        logp: log-probabilities of the policy, [N, T] nats
    """
    return -logp
