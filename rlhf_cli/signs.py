"""Signs of hacking that read texts, or compare the reward with another that is not trained on.

Like those of `detectors`, they are functions of a step's columns, the same on every rank.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from rlhf_cli.errors import GateError
from rlhf_cli.types import Experience

INCONSISTENT = "/position_inconsistency"  # the part in which a judge of pairs says how often its two orders disagree


def similar(texts: Sequence[str], group: Sequence[int], pairs: int) -> float:
    """Mean METEOR of responses to different prompts, over ordered pairs (reference, hypothesis); NaN where there is no pair.

    It rises where a policy answers everything alike. Words are what stands between blanks; K equal texts of m words give
    1 - 0.5 / m^3. `pairs` of all ordered pairs are drawn, the same ones for the same groups. See Mukobi et al., SuperHF:
    Supervised Iterative Learning from Human Feedback, arXiv:2310.16763.

    Args:
        texts: responses, [N]
        group: their prompts, [N]
        pairs: how many are compared; all of them where there are no more
    """
    from rlhf_cli.rewards.meteor import plain_meteor

    score = plain_meteor()
    found = [score(texts[a].split(), texts[b].split()) for a, b in _across(group, pairs)]
    return math.fsum(found) / len(found) if found else math.nan


def _across(group: Sequence[int], pairs: int) -> Iterator[tuple[int, int]]:
    """Ordered pairs of rows of different groups."""
    n = len(group)
    members = {g: sum(x == g for x in group) for g in set(group)}
    if n * n - sum(m * m for m in members.values()) <= pairs:
        yield from ((a, b) for a in range(n) for b in range(n) if group[a] != group[b])
        return
    rng, left = random.Random(n), pairs
    while left:
        a, b = rng.randrange(n), rng.randrange(n)
        if group[a] != group[b]:
            left -= 1
            yield a, b


def tail(texts: Sequence[str], end: str) -> float:
    """Mean share of a response's words that follow its answer, over responses that have one; NaN where none has.

    Judges can be won over by explanations of the answer behind it. See Jia et al., Writing-Zero, arXiv:2506.00103.

    Args:
        texts: responses, [N]
        end: a regular expression of what an answer ends with; the last match counts
    """
    found = []
    for text in texts:
        last = max((m.end() for m in re.finditer(end, text)), default=None)
        if last is not None:
            found.append(len(text[last:].split()) / max(1, len(text.split())))
    return math.fsum(found) / len(found) if found else math.nan


def inconsistent(components: Mapping[str, Tensor]) -> float:
    """The largest share of comparisons that a judge decided by the place of the responses; NaN without a judge of pairs."""
    shares = [float(x.double().nanmean()) for k, x in components.items() if k.endswith(INCONSISTENT)]
    return max((s for s in shares if s == s), default=math.nan)


def entropy(exp: Experience) -> float:
    """Mean of -log p over the sampled tokens, nats a token: an estimate of the entropy of what was sampled; NaN without."""
    if exp.behavior_logp is None or not bool(exp.mask.any()):
        return math.nan
    return float(-(exp.behavior_logp.double() * exp.mask).sum() / exp.mask.sum())


class Gold:
    """The trained reward beside another that is only logged (a held-out model, a judge, a verifier).

    Both are standardised by mean and deviation of the first step that has a spread, which the initial policy drew.
    `gold_gap` is z(reward) - z(gold). `gold_falls` is by how much the reward rose while gold fell over the last
    `window` steps, in standard deviations: the smaller of both, from the mean of the first half to that of the second; 0 where
    either did not happen. See Gao et al., Scaling Laws for Reward Model Overoptimization, arXiv:2210.10760.

    Args:
        name: the component that is gold.
        window: steps over which trends are read.
    """

    def __init__(self, name: str, window: int) -> None:
        self.name, self.window = name, window
        self.start: list[list[float]] = []  # (mean, deviation) of reward and gold
        self.past: list[list[float]] = []  # z of reward and gold, a step each

    def __call__(self, exp: Experience) -> dict[str, float]:
        """The step's numbers."""
        if self.name not in exp.components:
            raise GateError(f"detectors.gold={self.name}: no such part; there are {', '.join(exp.components)}")
        gold = exp.components[self.name].double()
        there = ~gold.isnan()
        columns = [exp.score.double()[there], gold[there]]
        if not bool(there.any()):
            return {}
        if not self.start:
            spread = [[float(x.mean()), float(x.std(correction=0))] for x in columns]
            if not all(s for _, s in spread):
                return {}
            self.start = spread
        z = [(float(x.mean()) - m) / s for x, (m, s) in zip(columns, self.start, strict=True)]
        self.past = [*self.past, z][-self.window :]
        return {"gold_gap": z[0] - z[1], **self._trend()}

    def _trend(self) -> dict[str, float]:
        if len(self.past) < self.window:
            return {}
        half = self.window // 2
        first, second = (
            [_mean([row[i] for row in part]) for i in (0, 1)] for part in (self.past[:half], self.past[-half:])
        )
        return {"gold_falls": max(0.0, min(second[0] - first[0], first[1] - second[1]))}

    def state_dict(self) -> dict[str, Any]:
        """Where it started and what it saw of late."""
        return {"start": self.start, "past": self.past}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on."""
        self.start, self.past = [list(x) for x in state["start"]], [list(x) for x in state["past"]]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
