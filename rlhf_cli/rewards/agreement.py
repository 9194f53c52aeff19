"""How far a reward agrees with recorded preferences: pairs, rankings, and what length has to do with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LONGER = 1.25  # a winner this many times as long as the loser is longer, and by its inverse shorter
BANDS = ("shorter", "alike", "longer")


@dataclass(frozen=True)
class Agreement:
    """Of one component with the recorded preferences; NaN where nothing can be compared."""

    pairs: int  # recorded pairs whose values both exist
    accuracy: float  # share whose winner scores higher; a tie counts half
    ties: int
    tau: float  # Kendall's tau-b with the recorded scores, within a prompt, mean over prompts; rankings only
    prompts: int  # prompts behind tau
    bands: tuple[tuple[float, int], ...]  # (accuracy, pairs) where the winner is shorter, alike, longer, in words


def agreement(
    value: Tensor, pairs: Tensor, words: Tensor, recorded: Tensor | None = None, members: Sequence[Tensor] = ()
) -> Agreement:
    """Compare values [N] with pairs [M, 2] of (winner, loser) rows and recorded scores [N]; `words` [N] are lengths.

    NaN values and recorded scores are left out. `members` are the rows of each prompt.
    """
    gap = (value[pairs[:, 0]] - value[pairs[:, 1]]).double()
    ratio = (words[pairs[:, 0]].double() + 1) / (words[pairs[:, 1]].double() + 1)
    band = (ratio > 1 / LONGER).long() + (ratio >= LONGER).long()
    there = ~gap.isnan()
    gap, band = gap[there], band[there]
    taus = [t for m in members if (t := kendall(value[m], recorded[m])) == t] if recorded is not None else []
    return Agreement(
        pairs=len(gap),
        accuracy=_accuracy(gap),
        ties=int((gap == 0).sum()),
        tau=sum(taus) / len(taus) if taus else float("nan"),
        prompts=len(taus),
        bands=tuple((_accuracy(gap[band == k]), int((band == k).sum())) for k in range(len(BANDS))),
    )


def kendall(a: Tensor, b: Tensor) -> float:
    """Kendall's tau-b of two [N] columns: (C - D) / sqrt((n - ties_a) (n - ties_b)); NaN where one is constant.

    Rows in which either is NaN are left out. See Kendall, The treatment of ties in ranking problems, Biometrika 33, 1945.
    """
    both = ~(a.isnan() | b.isnan())
    x, y = (v[both].double() for v in (a, b))
    i, j = torch.triu_indices(len(x), len(x), offset=1)
    dx, dy = (x[i] - x[j]).sign(), (y[i] - y[j]).sign()
    under = float(dx.abs().sum() * dy.abs().sum()) ** 0.5
    return float((dx * dy).sum()) / under if under else float("nan")


def _accuracy(gap: Tensor) -> float:
    return float((gap > 0).sum() + 0.5 * (gap == 0).sum()) / len(gap) if len(gap) else float("nan")
