"""Several rewards as one, with every part kept."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.combine import weighted_sum
from rlhf_cli.errors import GateError
from rlhf_cli.rewards.joining import Rule, by_rule, extras, plain
from rlhf_cli.rewards.pool import Pooled
from rlhf_cli.types import Sample, Scorer, Scores


class Combined:
    """value = the rule over the sources (by default the sum of weight * value), in [N].

    Rules that compare rows leave the weighted sum here, as evaluation has no step to compare in. A source is a scorer's value, or
    a part of it. A row is missing where any source with a weight other than 0 is; one of weight 0 is only logged. Missing values are
    NaN, so that nobody reads them by accident. Components hold each scorer's raw value under its name and its own parts as
    `name/part`. `seconds` holds the time that each scorer took in the last call, summed over processes. Pooled scorers work while
    the others do.
    """

    def __init__(
        self,
        scorers: Mapping[str, tuple[float, Scorer]],
        weights: Mapping[str, float] | None = None,
        rule: Rule = weighted_sum,
    ) -> None:
        assert scorers, "there is nothing to combine"
        self.scorers = dict(scorers)
        weights = {name: w for name, (w, _) in scorers.items()} if weights is None else weights
        self.weights = {name: w for name, w in weights.items() if w}
        self.chosen, self.rule = rule, plain(rule)
        if hasattr(self.rule, "names"):
            self.rule.names = list(self.weights)
        self.seconds: dict[str, float] = {}

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        components: dict[str, Tensor] = {}
        spans: list[tuple[int, int, int, float]] = []
        self.seconds = {}
        reasons: dict[int, str] = {}
        timing: dict[str, float] = {}
        found = self._all(samples, group)
        for name, (weight, _) in self.scorers.items():
            scores = found[name]
            raw = _checked(name, scores, samples)
            for row, why in scores.reasons.items():
                reasons.setdefault(row, f"{name}: {why}")
            timing |= {f"{name}/{k}": x for k, x in scores.timing.items()}
            components[name] = raw
            components |= {
                f"{name}/{part}": _column(f"{name}/{part}", x, samples) for part, x in scores.components.items()
            }
            if name in self.weights:
                spans += [(row, a, b, weight * x) for row, a, b, x in scores.spans or ()]
        value = self._value(components, samples, group)
        return Scores(value, value.isnan(), components, spans or None, reasons, timing)

    def _value(self, components: Mapping[str, Tensor], samples: Sequence[Sample], group: Tensor) -> Tensor:
        names = list(self.weights)
        absent = [n for n in names if n not in components]
        if absent:
            raise GateError(f"reward: no part {absent[0]!r}; there are {', '.join(components)}")
        if not names:
            return torch.zeros(len(samples))
        values = torch.stack([components[n] for n in names], -1)
        extra = extras(self.rule, names, components, samples, group)
        return by_rule(self.rule, values, torch.tensor([self.weights[n] for n in names]), extra)

    def start(self) -> None:
        """Start the workers of pooled scorers ahead of their first sample."""
        for pool in self._pooled().values():
            pool.workers.start()

    def begin(self, samples: Sequence[Sample]) -> None:
        """A group is complete: scorers that work beside this process may start on it. A later call with these samples uses what they found."""
        for _, scorer in self.scorers.values():
            begin = getattr(scorer, "begin", None)
            if begin is not None:
                begin(samples)

    def settle(self, scores: Scores, samples: Sequence[Sample], group: Tensor) -> Scores:
        """A step is scored and whole on every rank: scorers whose values count relative to a step's give those that count."""
        settled = {
            name: _column(name, scorer.settle(scores.components[name]), samples)  # type: ignore[attr-defined]
            for name, (_, scorer) in self.scorers.items()
            if hasattr(scorer, "settle")
        }
        if not settled:
            return scores
        components = {**scores.components, **settled}
        value = self._value(components, samples, group)
        return replace(scores, value=value, missing=value.isnan(), components=components)

    def observe(self, samples: Sequence[Sample], scores: Scores, comm: Any) -> None:
        """A step is scored: scorers that change with training see every sample and their own raw values, on every rank."""
        for name, (_, scorer) in self.scorers.items():
            observe = getattr(scorer, "observe", None)
            if observe is not None:
                observe(samples, scores.components[name], comm)

    def _pooled(self) -> dict[str, Pooled]:
        return {name: s for name, (_, s) in self.scorers.items() if isinstance(s, Pooled)}

    def _all(self, samples: Sequence[Sample], group: Tensor) -> dict[str, Scores]:
        pooled = self._pooled()
        waits = {name: s.submit(samples, group) for name, s in pooled.items()}
        found: dict[str, Scores] = {}
        for name, (_, scorer) in self.scorers.items():
            if name not in pooled:
                start = time.perf_counter()
                found[name] = scorer(samples, group)
                self.seconds[name] = time.perf_counter() - start
        for name, wait in waits.items():
            found[name] = wait()
            self.seconds[name] = pooled[name].seconds
        return found


def _checked(name: str, scores: Scores, samples: Sequence[Sample]) -> Tensor:
    """The scorer's values with NaN where missing; a wrong count or any other non-finite number is an error."""
    value = _column(name, scores.value, samples)
    missing = torch.zeros_like(value, dtype=torch.bool)
    if scores.missing is not None:
        missing = _column(name, scores.missing, samples, "missing marks").bool()
    bad = (~value.isfinite() & ~missing).nonzero().flatten().tolist()
    if bad:
        raise GateError(
            f"reward {name!r} returned {value[bad[0]].item()} for sample {samples[bad[0]].uid!r} "
            f"({len(bad)} such rows of {len(samples)}); mark a response that cannot be scored as missing instead"
        )
    return value.masked_fill(missing, float("nan"))


def _column(name: str, x: Tensor, samples: Sequence[Sample], what: str = "values") -> Tensor:
    if x.ndim != 1:
        raise GateError(
            f"reward {name!r} returned {what} of shape {list(x.shape)} for {len(samples)} samples; it must be [N]"
        )
    if len(x) != len(samples):
        raise GateError(f"reward {name!r} returned {len(x)} {what} for {len(samples)} samples")
    return x.detach().to("cpu", torch.float32)
