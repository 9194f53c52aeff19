"""Functions receive columns by parameter name, as test fixtures do; positional parameters are columns, keyword-only ones are settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from rlhf_cli.types import COLUMNS, Experience


def needs(fn: Callable[..., Any]) -> frozenset[str]:
    """Names of the columns that `fn` takes."""
    parameters = inspect.signature(fn).parameters.items()
    return frozenset(name for name, p in parameters if p.kind is not p.KEYWORD_ONLY)


def name_of(fn: Callable[..., Any]) -> str:
    """The function's own name, through `functools.partial`."""
    inner = getattr(fn, "func", fn)
    return getattr(inner, "__name__", type(inner).__name__)


def call(fn: Callable[..., Any], exp: Experience, outs: Mapping[str, Tensor] | None = None) -> Any:
    """Call `fn` with its columns from `outs` (a learner's outputs) or `exp`; outputs win.

    Raises ValueError naming the absent columns and those this run provides.
    """
    outs = outs or {}
    args = {name: outs[name] if name in outs else exp.get(name) for name in needs(fn)}
    absent = sorted(name for name, value in args.items() if value is None)
    if absent:
        have = sorted(set(outs) | {c for c in COLUMNS if getattr(exp, c) is not None} | set(exp.named))
        raise ValueError(f"{name_of(fn)} needs {absent}; this run provides {have}")
    return fn(**args)


def is_rowwise(fn: Callable[..., Any]) -> bool:
    """Whether `fn` promises that row i of its result depends on row i of its arguments only."""
    return bool(getattr(getattr(fn, "func", fn), "rowwise", False))


def per_row(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Declare that `fn` gives one value per row, [N], not per token; the planner reads it."""
    fn.per_row = True  # type: ignore[attr-defined]
    return fn


def rowwise(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Promise that no row of the result depends on another row; allows the single-pass step."""
    fn.rowwise = True  # type: ignore[attr-defined]
    return fn


def weighted_by_advantage(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Promise that a row whose advantages are all 0 has the value 0 and no gradient; such rows are not forwarded."""
    fn.weighted_by_advantage = True  # type: ignore[attr-defined]
    return fn


def is_weighted_by_advantage(fn: Callable[..., Any]) -> bool:
    """Whether `fn` promises that rows without advantage do not matter."""
    return bool(getattr(getattr(fn, "func", fn), "weighted_by_advantage", False))
