"""Fingerprints of weights that two processes can compare: sums of bit patterns, exact in any dtype and order.

A matrix is read at a few columns, others at every turn, so that the check costs little and still visits everything.
Sums over parts of a tensor add up to the tensor's, which lets fused and sharded layers be compared with whole ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS = 16  # of each matrix, at a turn
PACKED = "@packed"  # behind the name of a weight that a kernel keeps a copy of
WRAP = (1 << 63) - 1
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def block(width: int, turn: int) -> list[int]:
    """The columns of a matrix of `width` columns that turn `turn` reads."""
    return sorted({(turn * COLUMNS + i) % width for i in range(min(COLUMNS, width))})


def column_sum(values: Tensor, columns: Sequence[int]) -> int:
    """Fingerprint of `values` [rows, n], the columns numbered `columns` of a matrix."""
    weight = torch.tensor([2 * c + 1 for c in columns], dtype=torch.int64, device=values.device)
    return int((_bits(values).sum(0) * weight).sum()) & WRAP


def whole_sum(values: Tensor) -> int:
    """Fingerprint of all of a tensor."""
    return int(_bits(values.reshape(-1)).sum()) & WRAP


def checksum(values: Tensor) -> int:
    """Sum of all bit patterns of a tensor, in one pass: whether anything changed."""
    return int(values.contiguous().view(_INTEGER[values.dtype.itemsize]).sum(dtype=torch.int64)) & WRAP


def of_tensor(values: Tensor, turn: int) -> int:
    """Fingerprint of a whole checkpoint tensor at a turn."""
    if values.ndim != 2:
        return whole_sum(values)
    columns = block(values.shape[1], turn)
    return column_sum(values[:, torch.tensor(columns, device=values.device)], columns)


def add(parts: Sequence[int]) -> int:
    """The fingerprint of a tensor from those of its parts."""
    return sum(parts) & WRAP


def _bits(values: Tensor) -> Tensor:
    """int64 bit patterns. Kernels may lose the sign of a zero and flush numbers too small to matter; so do we."""
    tiny = torch.finfo(values.dtype).tiny
    plain = torch.where(values.abs() < tiny, torch.zeros_like(values), values).contiguous()
    return plain.view(_INTEGER[values.dtype.itemsize]).to(torch.int64)
