"""Objectives of a critic, unreduced."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cli.inject import rowwise


@rowwise
def clipped_value(value_new: Tensor, value: Tensor, returns: Tensor, *, clip: float | None) -> Tensor:
    """Half the squared error to the return, the worse of the new value and the new value kept near the old one, [N, T].

    0.5 max((v - G)^2, (v_old + clip(v - v_old, +-clip) - G)^2). See Huang et al., "The N+ Implementation Details of
    RLHF with PPO", arXiv:2403.17031.

    Args:
        value_new: values of the critic, [N, T]
        value: the same when the rows were annotated, [N, T]
        returns: targets G, [N, T], constant
        clip: how far a value may move from the old one and still count, score units; empty: no clipping
    """
    error = (value_new - returns).square()
    if clip is not None:
        near = value + (value_new - value).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return 0.5 * error
