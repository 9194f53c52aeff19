"""Rewards for a policy that is itself a judge: its reply is compared with what is recorded in the sample's `meta`.

A reply that breaks the format is a bad reply and scores so; a sample that records nothing to compare with is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any, Literal

from rlhf_cli.judges.ask import Reply
from rlhf_cli.judges.strict import Unreadable, json_reply, number, parse_object
from rlhf_cli.rewards.per_sample import Row, scored

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.sample import Sample
    from rlhf_cli.types import Scores

SCORES, RANKING = "scores", "best-to-worst"
_BRACES = re.compile(r"\{.*\}", re.S)


class RankingVerdict:
    """Scores and order of a list against the gold scores in `meta.gold`: weighted format plus order of the pairs.

    Format in [0, 1]: both think tags 0.15 (one of them 0.05), more than 50 characters of thinking 0.05, the rest is JSON
    0.2 (0.15 if it stands amid text), its keys 0.1 each, 0.2 times the share of gold names scored, 0.2 if the order is
    one that the scores allow. Order: 1 - sum of penalties / sum of weights over pairs, w = 1 + |gold difference|, the
    penalty w for a reversed pair and w / 2 for a tie that gold does not have. A pair with a name that was not scored is
    lost (penalty w), so that leaving names out earns nothing; the authors' code leaves such pairs out.
    See Yu et al., "RewardAnything: Generalizable Principle-Following Reward Models", arXiv:2506.03637.
    """

    pooled = True

    def __init__(self, *, format_weight: float, unscored: Literal["lost", "left_out"]) -> None:
        """Args:
        format_weight: weight of the format; the order has the rest
        unscored: pairs with a name that was not scored are lost, or left_out (as in the authors' code, where an order of fewer
            than two names is 1)
        """
        self.format_weight, self.unscored = format_weight, unscored

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        for s in samples:
            gold = s.meta.get("gold")
            if not isinstance(gold, Mapping) or len(gold) < 2:
                yield Row(
                    None, reason="meta.gold holds no scores by name; map it with dataset.columns.meta.gold=COLUMN"
                )
                continue
            form, said = list_format(s.response, tuple(gold))
            order = pair_order(said, gold, self.unscored)
            value = self.format_weight * form + (1 - self.format_weight) * order
            yield Row(value, {"format": form, "order": order})


def list_format(text: str, names: Sequence[str]) -> tuple[float, dict[str, float]]:
    """(format in [0, 1], the scores of known names) of a reply."""
    thought, _, rest = text.rpartition("</think>")
    tags = ("<think>" in text) + ("</think>" in text)
    form = (0.0, 0.05, 0.15)[tags] + 0.05 * (tags == 2 and len(thought.partition("<think>")[2].strip()) > 50)
    found, worth = _object(rest.strip())
    scores, ranking = found.get(SCORES), found.get(RANKING)
    said = {n: float(x) for n, x in scores.items() if n in names and _is_number(x)} if isinstance(scores, dict) else {}
    form += worth + 0.1 * (SCORES in found) + 0.1 * (RANKING in found) + 0.2 * len(said) / len(names)
    return form + 0.2 * _extends(ranking, said), said


def _object(text: str) -> tuple[dict[str, Any], float]:
    amid = _BRACES.search(text)
    for candidate, worth in ((text, 0.2), (amid.group() if amid else "", 0.15)):
        try:
            return parse_object(candidate), worth
        except Unreadable:
            continue
    return {}, 0.0


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e9


def _extends(ranking: Any, said: Mapping[str, float]) -> bool:
    """Whether the order names exactly those that are scored, nobody above a higher score."""
    names = [n for n in ranking if isinstance(n, str)] if isinstance(ranking, list) else []
    return bool(said) and sorted(names) == sorted(said) and all(said[a] >= said[b] for a, b in pairwise(names))


def pair_order(said: Mapping[str, float], gold: Mapping[str, float], unscored: str = "lost") -> float:
    """Weighted share of the pairs in their gold order, in [0, 1]; pairs with a name that is not `said` are lost or left_out."""
    names = [n for n in gold if n in said or unscored == "lost"]
    total = penalty = 0.0
    for a, b in combinations(names, 2):
        weight = 1 + abs(gold[a] - gold[b])
        total += weight
        penalty += weight * (_misplaced(gold[a] - gold[b], said[a] - said[b]) if a in said and b in said else 1.0)
    return max(0.0, 1 - penalty / total) if total else 1.0


def _misplaced(wanted: float, given: float) -> float:
    """1 for a reversed pair, 1/2 for a tie that gold does not have."""
    return 0.5 if wanted and not given else float(wanted * given < 0)


class ScoresVerdict:
    """Two scores of a generative reward model against `meta.better`, A or B: 1[right] (0.5 + 0.5 min(1, margin / full)).

    A reply that is not the JSON object that was asked for scores -1.
    See Jia et al., "Writing-Zero: Bridge the Gap Between Non-verifiable Tasks and Verifiable Rewards", arXiv:2506.00103;
    the constants are not published.
    """

    pooled = True

    def __init__(self, *, full: float) -> None:
        """Args:
        full: difference of the scores that earns everything
        """
        self.full = full

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self.rows(samples))

    def rows(self, samples: Sequence[Sample]) -> Iterator[Row]:
        for s in samples:
            better = s.meta.get("better")
            if better not in ("A", "B"):
                yield Row(None, reason="meta.better is neither A nor B; map it with dataset.columns.meta.better=COLUMN")
                continue
            try:
                found = json_reply(Reply(s.response), ("principles", "critique", "score_A", "score_B"))
                gap = number(found["score_A"], 0, 10) - number(found["score_B"], 0, 10)
            except Unreadable:
                yield Row(-1.0, {"readable": 0.0, "right": 0.0})
                continue
            margin = gap if better == "A" else -gap
            value = 0.5 + 0.5 * min(1.0, margin / self.full) if margin > 0 else 0.0
            yield Row(value, {"readable": 1.0, "right": float(margin > 0)})
