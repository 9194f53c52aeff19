"""How varied responses are: n-grams pooled over all of them, and how alike the responses to one prompt are. Imports no torch."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

ORDERS = (1, 2, 3)
WINDOW = 100  # words of a segment
_WORD = re.compile(r"\w+")


def diversity(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Numbers of rows with `uid` and `response`: distinct_n, entropy_n, msttr, vocabulary, self_bleu; what cannot be told is absent.

    Words are runs of letters and digits, case ignored, and no n-gram crosses two responses. All but self_bleu, the mean over prompts,
    are of the pool, and distinct_n falls as the pool grows: compare equal numbers of tokens.
    See Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", arXiv:1510.03055 (distinct-n); Johnson,
    Studies in Language Behavior, 1944 (segmental type-token ratio); Zhu et al., "Texygen", arXiv:1802.01886 (self-BLEU); as a set:
    Ramamurthy et al., arXiv:2210.01241.
    """
    words = [_WORD.findall(str(r["response"]).lower()) for r in rows]
    counts = {n: Counter(gram for w in words for gram in zip(*(w[i:] for i in range(n)), strict=False)) for n in ORDERS}
    found = {f"distinct_{n}": len(c) / c.total() for n, c in counts.items() if c}
    found |= {f"entropy_{n}": entropy(c) for n, c in counts.items() if c}
    found |= {"vocabulary": float(len(counts[1]))} if counts[1] else {}
    ratio = segments([x for w in words for x in w])
    found |= {"msttr": ratio} if ratio is not None else {}
    alike = self_bleu(rows)
    return found | ({"self_bleu": alike} if alike is not None else {})


def entropy(counts: Counter[Any]) -> float:
    """Of the n-grams' frequencies, bits."""
    total = counts.total()
    return -math.fsum(c / total * math.log2(c / total) for c in counts.values())


def segments(words: Sequence[str]) -> float | None:
    """Mean share of different words in whole windows of 100 words; None without one."""
    windows = [words[i : i + WINDOW] for i in range(0, len(words) - WINDOW + 1, WINDOW)]
    return math.fsum(len(set(w)) / WINDOW for w in windows) / len(windows) if windows else None


def self_bleu(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean smoothed BLEU-4 in [0, 1] of each response against the others to its prompt; None where no prompt has two."""
    from sacrebleu.metrics.bleu import BLEU

    groups: dict[str, list[str]] = {}
    for r in rows:
        groups.setdefault(str(r["uid"]), []).append(str(r["response"]))
    metric = BLEU(effective_order=True)
    means = []
    for texts in groups.values():
        if len(texts) > 1:
            scores = [metric.sentence_score(t, [*texts[:i], *texts[i + 1 :]]).score / 100 for i, t in enumerate(texts)]
            means.append(math.fsum(scores) / len(scores))
    return math.fsum(means) / len(means) if means else None
