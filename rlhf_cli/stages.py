"""The stages between source and update, as functions from experience to experience."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_cli.engine.comm import Comm
from rlhf_cli.errors import GateError
from rlhf_cli.inject import call
from rlhf_cli.shaping.chain import apply
from rlhf_cli.shaping.place import at_end
from rlhf_cli.types import Experience, Narrowed, Sample, Scorer, Scores, Selection

Stage = Callable[[Experience], Experience]
Join = Callable[[Scores, Experience], tuple[Experience, dict[int, str]]]


class Inferable(Protocol):
    """A learner or a frozen model."""

    def infer(self, exp: Experience, want: frozenset[str]) -> dict[str, Tensor]: ...


def keep(exp: Experience) -> Experience:
    """A stage that does nothing."""
    return exp


def _ignore(*_: Any) -> None:
    pass


def _see_nothing(samples: Any, scores: Any, comm: Any) -> None:
    pass


def _as_given(scores: Scores, samples: Any, group: Any) -> Scores:
    return scores


def scoring(
    scorer: Scorer,
    comm: Comm,
    max_failures: float,
    watch: Callable[[Tensor], None],
    count: Callable[[Mapping[str, float]], None] = _ignore,
    note: Callable[[str], None] = _ignore,
    took: Callable[[Mapping[str, float]], None] = _ignore,
    join: Join | None = None,
) -> Stage:
    """Score whole groups, each on one rank, and drop the rows whose score is missing.

    `max_failures`: largest fraction of missing scores tolerated in a step. `watch` sees the scores that are there,
    `count` how many each reward lacks, `note` the first reason, `took` what the scorers spent. A scorer
    with `settle` turns the values of the whole step into those that count, on every rank; one with `observe` is shown the step as it was
    scored. `join` makes one score of all rewards, with everything that needs the whole step; without it the scorer's own value counts.
    """
    join = join or as_scored

    def score(exp: Experience) -> Experience:
        found = score_sharded(scorer, exp, comm)
        scores = getattr(scorer, "settle", _as_given)(found, exp.samples, exp.group)
        exp, lost = join(scores, replace(exp, components=dict(scores.components)))
        scores = replace(scores, reasons={**lost, **scores.reasons})
        missing = exp.score.isnan()
        count({f"{k}/missing": float(x.isnan().sum()) for k, x in scores.components.items() if "/" not in k})
        took(scores.timing)
        first = first_reason(scores, exp.samples)
        if missing.float().mean() > max_failures:
            raise GateError(
                f"{int(missing.sum())} of {len(exp)} rewards failed; more than reward failures of {max_failures:.0%} stop the run"
                + (f" ({first})" if first else "")
            )
        if first:
            note(f"{len(scores.reasons)} of {len(exp)} responses lack a score; {first}")
        getattr(scorer, "observe", _see_nothing)(exp.samples, found, comm)
        exp = exp.rows((~missing).nonzero().flatten()) if missing.any() else exp
        watch(exp.score)
        return exp

    return score


def as_scored(scores: Scores, exp: Experience) -> tuple[Experience, dict[int, str]]:
    """The scorer's own value; NaN where it is missing."""
    if scores.spans:
        raise GateError(
            "a reward gives spans (token rewards), and nothing here places them; return one number a response"
        )
    value = scores.value if scores.missing is None else scores.value.masked_fill(scores.missing, float("nan"))
    return replace(exp, score=value), {}


def first_reason(scores: Scores, samples: Sequence[Sample]) -> str:
    """`first: sample 'uid': why`, or nothing where no reason is known."""
    row = min(scores.reasons, default=None)
    return "" if row is None else f"first: sample {samples[row].uid!r}: {scores.reasons[row]}"


def score_sharded(scorer: Scorer, exp: Experience, comm: Comm) -> Scores:
    """Every rank scores its share of the groups, linked ones together; all get all scores."""
    own = (scored_by(exp.samples, exp.group, comm.world) == comm.rank).nonzero().flatten()
    part = scorer([exp.samples[i] for i in own.tolist()], exp.group[own]) if len(own) else None
    gathered = comm.gather((own, part))
    value, missing = torch.zeros(len(exp)), torch.zeros(len(exp), dtype=torch.bool)
    components: dict[str, Tensor] = {}
    reasons: dict[int, str] = {}
    spans: list[tuple[int, int, int, float]] = []
    timing: dict[str, float] = {}
    for rows, scores in gathered:
        if scores is None:
            continue
        for name, spent in scores.timing.items():
            timing[name] = timing.get(name, 0.0) + spent
        spans += [(int(rows[i]), start, end, x) for i, start, end, x in scores.spans or ()]
        value[rows] = scores.value.float()
        if scores.missing is not None:
            missing[rows] = scores.missing
        reasons |= {int(rows[i]): why for i, why in scores.reasons.items()}
        for name, x in scores.components.items():
            components.setdefault(name, torch.full((len(exp),), float("nan")))[rows] = x.float()
    return Scores(value, missing, components, spans or None, reasons, timing)


def baselined(score: Stage, count: Callable[[Mapping[str, float]], None] = _ignore) -> Stage:
    """The score of a group's greedy row becomes the `baseline` of its others, and the row leaves.

    A group whose greedy row has no score leaves too, and is counted: 0 would be an opinion.
    """

    def stage(exp: Experience) -> Experience:
        exp = score(exp)
        best = exp.greedy.nonzero().flatten()
        same = exp.group[:, None] == exp.group[best]  # [N, P]
        exp = replace(exp, baseline=(same * exp.score[best]).sum(-1), greedy=None)
        kept = torch.ones(len(exp), dtype=torch.bool).index_fill(0, best, False)
        count({"without_baseline": float((kept & ~same.any(-1)).sum())})
        return exp.rows((kept & same.any(-1)).nonzero().flatten())

    return stage


def scored_by(samples: Sequence[Sample], group: Tensor, world: int) -> Tensor:
    """[N] the rank that scores each row: ranks in turn take whole groups, or groups that share a link."""
    names, which = torch.unique(group, return_inverse=True)
    link = dict(zip(which.tolist(), (s.link for s in samples), strict=True))
    turn: dict[Any, int] = {}
    ranks = [turn.setdefault(link[g] or g, len(turn)) % world for g in range(len(names))]
    return torch.tensor(ranks, dtype=torch.int64)[which]


def filling(score: Stage, columns: Mapping[str, str]) -> Stage:
    """Columns that a scorer brings beside its value: column -> the component that holds it."""

    def stage(exp: Experience) -> Experience:
        exp = score(exp)
        return replace(exp, **{name: exp.components[part] for name, part in columns.items()}) if len(exp) else exp

    return stage


def shuffled(score: Stage, seed: int) -> Stage:
    """Deal every step's scores to other rows at random: a run that must not learn."""

    def stage(exp: Experience) -> Experience:
        exp = score(exp)
        if not len(exp):
            return exp
        g = torch.Generator().manual_seed(seed * 1_000_003 + int(exp.version.max()))
        return replace(exp, score=exp.score[torch.randperm(len(exp), generator=g)], span_reward=None)

    return stage


def selecting(rule: Callable[..., Selection], count: Callable[[Mapping[str, float]], None]) -> Stage:
    """Keep the rows, and add the edges, that the rule chooses; report what it counted."""

    def select(exp: Experience) -> Experience:
        chosen = call(rule, exp)
        told(rule, count, "select")
        count({"rows_before": float(len(exp)), **chosen.stats})
        if isinstance(chosen, Narrowed):
            exp = replace(exp, mask=chosen.mask)
        if chosen.keep is not None:
            exp = exp.rows(chosen.keep)
        return exp if chosen.pairs is None else replace(exp, pairs=chosen.pairs)

    return select


def annotating(columns: Mapping[str, tuple[Inferable, str]]) -> Stage:
    """Fill columns from models: name -> (model, its output). A model that gives several is asked once."""

    def annotate(exp: Experience) -> Experience:
        if not len(exp):
            return exp
        models = {id(model): model for model, _ in columns.values()}
        wanted = {i: frozenset(out for model, out in columns.values() if id(model) == i) for i in models}
        found = {i: model.infer(exp, wanted[i]) for i, model in models.items()}
        return exp.filled({name: found[id(model)][out] for name, (model, out) in columns.items()})

    return annotate


def shaping(shapers: Sequence[Callable[..., Tensor]], count: Callable[..., None] = _ignore) -> Stage:
    """A shaper that returns [N] replaces `score`; one that returns [N, T] is added to `reward`.

    What a scorer placed on tokens stays there, and the rest of the score lands on the last trained token: token rewards that came
    with the score never add to it.
    """

    def shape(exp: Experience) -> Experience:
        if exp.score is None or not len(exp):
            return exp
        exp, dense = apply(shapers, exp, keep_references=False, after=lambda fn: told(fn, count, "shaping"))
        rest = exp.score
        if exp.span_reward is not None:
            dense, rest = dense + exp.span_reward, rest - exp.span_reward.sum(-1)
        return replace(exp, reward=dense + at_end(rest, exp.mask))

    return shape


def told(fn: Any, count: Callable[..., None], stage: str) -> None:
    """Report what an object with `stats` found in its last call."""
    stats = getattr(fn, "stats", None)
    if stats:
        count(stats, stage)


def crediting(rule: Callable[..., Any], limit: float, count: Callable[..., None] = _ignore) -> Stage:
    """Advantages from rewards; refuse magnitudes above `limit`."""

    def credit(exp: Experience) -> Experience:
        if not len(exp):
            return exp
        found = call(rule, exp)
        told(rule, count, "credit")
        largest = float(found.advantage.abs().max())
        if not largest <= limit:
            raise GateError(
                f"an advantage of {largest:g} is beyond gates.advantage={limit:g}; the reward scale or the baseline is off. "
                "Clip the reward (shaping=clip), or raise gates.advantage if this is meant"
            )
        return replace(exp, advantage=found.advantage, returns=found.returns)

    return credit


def correcting(rule: Callable[..., Any], count: Callable[[Mapping[str, float], str], None]) -> Stage:
    """Weigh advantages by how likely the learner would have sampled them; report the weights."""

    def correct(exp: Experience) -> Experience:
        if not len(exp):
            return exp
        weight, bounded = call(rule, exp)
        tokens = exp.mask.sum().clamp(min=1)
        gap = ((exp.old_logp - exp.behavior_logp).abs() * exp.mask).sum() / tokens
        on = bool(((weight != 1) & exp.mask).any())
        numbers = {"gap": gap, "on": float(on), "weight": weight.sum() / tokens, "bounded": bounded.sum() / tokens}
        count({k: float(v) for k, v in numbers.items()}, "correction")
        return replace(exp, advantage=exp.advantage * weight)

    return correct


def minibatches(epochs: int, count: int, seed: int) -> Callable[[Experience, int], Any]:
    """Whole groups in a fresh order every epoch; `count` minibatches an epoch."""

    def split(exp: Experience, step: int) -> Any:
        names = torch.unique(exp.group) if len(exp) else torch.zeros(0, dtype=torch.int64)
        for epoch in range(epochs if len(names) else 0):
            g = torch.Generator().manual_seed((seed * 7919 + step) * 101 + epoch)
            order = torch.arange(len(names)) if count == 1 else torch.randperm(len(names), generator=g)
            for part in order.tensor_split(min(count, len(names))):
                yield torch.isin(exp.group, names[part]).nonzero().flatten()

    return split
