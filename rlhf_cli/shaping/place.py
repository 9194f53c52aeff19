"""Where a row's number lands among its tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def at_end(score: Tensor, mask: Tensor) -> Tensor:
    """The score at each row's last mask token, 0 elsewhere, [N, T]. A row without mask tokens gets nothing.

    Args:
        score: one number per row, [N]
        mask: trained tokens, [N, T] bool
    """
    remaining = mask.flip(-1).cumsum(-1).flip(-1)  # mask tokens from t on
    return torch.where(mask & (remaining == 1), score[:, None], 0.0)
