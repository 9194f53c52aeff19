"""From the raw values of all rewards to the score of a step: shaped one by one, centred, combined; and where token rewards fall."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.combine import centre, is_linear, weighted_sum
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.inject import is_rowwise, needs
from rlhf_cli.rewards.spans import place
from rlhf_cli.sample import Sample
from rlhf_cli.shaping.chain import Shaper, apply, as_rows, firsts
from rlhf_cli.types import Experience, Scores

Rule = Callable[..., Tensor]
NO_REFERENCE = "no response of the initial policy to its prompt could be scored"
NO_CANNED = "the canned answer to its prompt could not be scored"


def by_rule(rule: Rule, values: Tensor, weights: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
    """[N]: the rule over sources [N, S], on the rows that lack no source; the others are NaN."""
    present = (~values.isnan().any(-1)).nonzero().flatten()
    joined = values.new_full((len(values),), float("nan"))
    if len(present):
        given = {"sources": values[present], "weights": weights.to(values.dtype)}
        given |= {k: x[present] for k, x in extra.items()}
        joined[present] = rule(**{k: given[k] for k in needs(rule)}).to(values.dtype)
    return joined


def extras(
    rule: Rule, names: Sequence[str], scores: Mapping[str, Tensor], samples: Sequence[Sample], group: Tensor
) -> dict[str, Tensor]:
    """The columns besides the sources that a rule takes."""
    wanted, found = needs(rule), {"group": group}
    if "sigmas" in wanted:
        none = torch.full((len(samples),), float("nan"))
        found["sigmas"] = torch.stack([scores.get(f"{n}/sigma", none) for n in names], -1)
    if "labels" in wanted:
        found["labels"] = _labels(samples, getattr(rule, "keywords", {})["by_meta"])
    if "directions" in wanted:
        found["directions"] = torch.tensor([s.meta["direction"] for s in samples])
    return found


def _labels(samples: Sequence[Sample], key: str) -> Tensor:
    bare = next((s for s in samples if key not in s.meta), None)
    if bare is not None:
        raise ConfigError(
            f"combine.by_meta={key}: the record {bare.meta.get('where') or bare.uid} has no meta {key!r}; "
            f"map it with dataset.columns.meta.{key}=COLUMN"
        )
    numbers: dict[Any, int] = {}
    for name in sorted({str(s.meta[key]) for s in samples}):
        numbers[name] = len(numbers)
    return torch.tensor([numbers[str(s.meta[key])] for s in samples])


def plain(rule: Rule) -> Rule:
    """The rule where rows stand alone, as in evaluation: itself if it looks at one row at a time, else the weighted sum."""
    return rule if is_rowwise(rule) else weighted_sum


@dataclass
class Joining:
    """The score of a step. Pure but for a rule that learns.

    Args:
        weights: source -> weight, of the sources that count.
        rule: of conf/combine.
        slots: source -> its own shapers.
        center: none, group or reference: what is taken off each source.
        scale: none, batch or reference: the standard deviation that each source is divided by.
        references: of a prepass; None where no stage compares with it.
        keep_references: a later stage compares the combined score with that of the references.
        tokenizer: of the policy, for spans.
        reads_tokens: some stage reads token rewards.
        count: gets what was counted.
    """

    weights: Mapping[str, float]
    rule: Rule
    slots: Mapping[str, Sequence[Shaper]] = field(default_factory=dict)
    center: str = "none"
    scale: str = "none"
    references: Callable[[], Any] | None = None
    keep_references: bool = False
    tokenizer: Any = None
    reads_tokens: bool = False
    count: Callable[..., None] = lambda numbers, stage="reward": None

    def __post_init__(self) -> None:
        self.names = [n for n, w in self.weights.items() if w]
        self.weight = torch.tensor([self.weights[n] for n in self.names])
        self.told: dict[str, float] = {}  # numbers of the last step
        if hasattr(self.rule, "names"):
            self.rule.names = self.names

    def __call__(self, scores: Scores, exp: Experience) -> tuple[Experience, dict[int, str]]:
        """The experience with `score` (NaN: missing), `ref_scores` and `span_reward`; and why rows are missing that had a value."""
        if not self.names:  # all of them are only logged
            return replace(exp, score=torch.zeros(len(exp))), {}
        raw = [scores.components[n] for n in self.names]
        values, ref, canned, exp = self._shaped(raw, exp)
        offset, spread = self._units(values, ref, exp)
        values, ref, canned = (
            (values - offset) / spread,
            None if ref is None else (ref - offset[:, None]) / spread,
            None if canned is None else (canned - offset) / spread,
        )
        extra = extras(self.rule, self.names, scores.components, exp.samples, exp.group)
        score = by_rule(self.rule, values, self.weight, extra)
        exp = replace(exp, score=score, span_reward=self._placed(scores, exp))
        lost: dict[int, str] = {}
        if ref is not None:
            lost = dict.fromkeys(ref.isnan().all(1).all(-1).nonzero().flatten().tolist(), NO_REFERENCE)
        if canned is not None:
            lost |= dict.fromkeys(canned.isnan().all(-1).nonzero().flatten().tolist(), NO_CANNED)
        score[list(lost)] = float("nan")
        if self.keep_references and ref is not None:
            exp = replace(exp, ref_scores=self._references(ref, exp, extra))
        if self.keep_references and canned is not None:
            exp = replace(exp, canned_score=by_rule(self.rule, canned, self.weight, extra))
        self._tell(values, raw)
        return exp, lost

    def _shaped(
        self, raw: Sequence[Tensor], exp: Experience
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Experience]:
        """Sources [N, S] after their own shapers, those of the references [N, R, S] and of the canned answer [N, S]."""
        found = None if self.references is None else self.references().lookup(exp.samples, self.names)
        sampled = found is not None and found.length.shape[1] > 0
        if found is not None and sampled:
            exp = replace(exp, ref_length=found.length)
        ones = []
        for i, name in enumerate(self.names):
            one = replace(exp, score=raw[i])
            if found is not None and sampled:
                one = replace(one, ref_scores=found.values[..., i])
            if found is not None and found.canned is not None:
                one = replace(one, canned_score=found.canned[:, i])
            ones.append(self._own(name, one))
        refs = torch.stack([x.ref_scores for x in ones], -1) if sampled else None
        canned = (
            torch.stack([x.canned_score for x in ones], -1) if found is not None and found.canned is not None else None
        )
        return torch.stack([x.score for x in ones], -1), refs, canned, exp

    def _own(self, name: str, exp: Experience) -> Experience:
        """One source through its slot, on the rows that have it."""
        shapers = self.slots.get(name, ())
        there = ~exp.score.isnan()
        if exp.ref_scores is not None:
            there &= ~exp.ref_scores.isnan().all(-1)
        if exp.canned_score is not None and (self.keep_references or any("canned_score" in needs(f) for f in shapers)):
            there &= ~exp.canned_score.isnan()
        rows = there.nonzero().flatten()
        if not shapers or not len(rows):
            return exp
        keep = self.keep_references or self.center == "reference" or self.scale == "reference"
        done, _ = apply(shapers, exp.rows(rows), keep_references=keep, after=lambda fn: self._told(name, fn))
        made = {"score": torch.full_like(exp.score, float("nan"))}
        made |= {k: x.clone() for k in ("ref_scores", "canned_score") if (x := getattr(exp, k)) is not None}
        for k, x in made.items():
            x[rows] = getattr(done, k).to(x.dtype)
        return replace(exp, **made)

    def _told(self, name: str, fn: Any) -> None:
        self.count({f"{name}/{k}": v for k, v in (getattr(fn, "stats", None) or {}).items()}, "shaping")

    def _units(self, values: Tensor, ref: Tensor | None, exp: Experience) -> tuple[Tensor, Tensor]:
        """What is taken off each source [N, S], and the spread [S] that it is divided by."""
        offset, spread = torch.zeros_like(values), torch.ones(values.shape[1])
        if self.center == "group":
            present = (~values.isnan().any(-1)).nonzero().flatten()
            offset = torch.full_like(values, float("nan"))
            offset[present] = values[present] - centre(values[present], exp.group[present])
        elif self.center == "reference":
            assert ref is not None
            offset = ref.nanmean(1)  # [N, S]
        if self.scale == "batch":
            seen = (values - offset)[~values.isnan().any(-1)]
            spread = seen.std(0, correction=0) if len(seen) else spread
        elif self.scale == "reference":
            assert ref is not None and self.references is not None
            spread = self.references().spread(self.names)
        return offset, torch.where(spread > 0, spread, 1.0)

    def _references(self, ref: Tensor, exp: Experience, extra: Mapping[str, Tensor]) -> Tensor:
        """[N, R]: the combined score of the references."""
        first, index = firsts(exp.group)
        n, r, s = len(first), *ref.shape[1:]
        own = {k: x[first].repeat_interleave(r, 0) for k, x in extra.items()}
        return by_rule(self.rule, ref[first].reshape(n * r, s), self.weight, own).view(n, r)[index]

    def _placed(self, scores: Scores, exp: Experience) -> Tensor | None:
        if not scores.spans:
            return None
        if not self.reads_tokens:
            raise GateError(
                "a reward gives token rewards, and no stage reads them: choose a credit that takes `reward` (credit=group_norm_to_go, credit=gae)"
            )
        if not is_linear(self.rule):
            raise GateError(
                "a reward gives token rewards, and only combine=weighted_sum knows where they fall; type combine=weighted_sum"
            )
        return place(scores.spans, exp, self.tokenizer)

    def _tell(self, values: Tensor, raw: Sequence[Tensor]) -> None:
        seen = values[~values.isnan().any(-1)]
        several = len(self.names) > 1 and len(seen)
        self.told = {"ensemble_std": float((seen * self.weight).std(-1).mean())} if several else {}
        self.count(self.told, "reward")
        learn = getattr(self.rule, "learn", None)
        if learn is None:
            return
        self.count(dict(getattr(self.rule, "stats", {})), "combine")
        together = torch.stack(list(raw), -1)
        together = together[~together.isnan().any(-1)]
        if len(together):
            learn(together)


__all__ = ["Joining", "as_rows", "by_rule", "extras", "plain"]
