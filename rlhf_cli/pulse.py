"""The pulse of this process: whoever gets something done says so, and the watch that ends silent ranks hears it.

A phase may be as long as it likes while tokens, micro-batches, scores or answers keep coming. It belongs to the process, as signals do,
so that no sampler, engine or reward has to be handed it.
"""

from __future__ import annotations

from collections.abc import Callable


def _nobody() -> None:
    return


_heard: Callable[[], None] = _nobody


def alive() -> None:
    """Something was done. Costs a fraction of a microsecond; from any thread."""
    _heard()


def listen(heard: Callable[[], None] | None) -> None:
    """Call `heard` at every sign of life; None: nobody any more."""
    global _heard
    _heard = heard or _nobody
