"""Preferences that a judge's opinions by principle make, with principles negated at random: data for `reward=principles`. Imports no torch.

See Sun et al., "SALMON: Self-Alignment with Instructable Reward Models", arXiv:2310.05910, section 3.2; the constants are those of the
authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import pvariance
from typing import NamedTuple

from rlhf_cli.judges.text import unit_hash

STOP, MOST = 0.2, 8  # how many principles are shown: geometric, at most so many
NEGATED, FLIPPED, FLIPPED_RULE = 0.5, 0.1, 0.25


class Preference(NamedTuple):
    """What a reward model is trained on, beside the two responses."""

    shown: tuple[str, ...]  # names of the principles
    negated: frozenset[str]  # those shown in their negative wording
    first: bool  # the first response is preferred


def agreed(d12: float, d21: float) -> float:
    """The opinion of both orders, a logit difference that is positive for the first response; 0 where they disagree.

    `d12`: shown first, first. `d21`: shown second, and again positive for the first response.
    """
    return (d12 + d21) / 2 if d12 * d21 > 0 else 0.0


def by_variance(scores: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Each principle's scores over the variance (not the standard deviation) of all of them, so that a loud one does not always decide.

    A principle without any variance says nothing and gets 0.
    """
    variances = {name: pvariance(x) for name, x in scores.items()}
    return {name: [s / variances[name] if variances[name] else 0.0 for s in x] for name, x in scores.items()}


def deciding(scores: Mapping[str, float], negated: frozenset[str]) -> tuple[str, float] | None:
    """(name, signed score) of the principle with the largest score in size, the first of equals; None where it is 0."""
    name = max(scores, key=lambda n: abs(scores[n]), default="")
    if not name or scores[name] == 0:
        return None
    return name, -scores[name] if name in negated else scores[name]


def preference(scores: Mapping[str, float], *where: object, ruled: bool | None = None) -> Preference | None:
    """A preference from the normalised scores of one pair, all random numbers from `where` (seed, pair, pass); None: discarded.

    So many principles as a geometric draw says are shown, each negated with probability 0.5. `ruled`: the label that a hard rule
    gives, whatever the principles say. Labels are flipped with probability 0.1, ruled ones 0.25.
    """
    names = sorted(scores, key=lambda n: unit_hash("order", *where, n))[: count(unit_hash("count", *where))]
    negated = frozenset(n for n in names if unit_hash("negate", *where, n) < NEGATED)
    found = deciding({n: scores[n] for n in names}, negated)
    if ruled is None and found is None:
        return None
    first = ruled if ruled is not None else found is not None and found[1] > 0
    flip = unit_hash("flip", *where) < (FLIPPED if ruled is None else FLIPPED_RULE)
    return Preference(tuple(names), negated, first != flip)


def count(u: float) -> int:
    """Geometric from a uniform number in [0, 1): 1 with probability 0.2, and so on; at most 8."""
    return min(MOST, 1 + math.floor(math.log1p(-u) / math.log1p(-STOP)))
