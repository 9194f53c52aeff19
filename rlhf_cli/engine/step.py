"""The exact step: the gradient of a loss on *global* tensors, whatever the micro-batches and the number of processes.

Two ways, equal by test. `two_pass`: infer all outputs, differentiate the global loss to them, then push those cotangents through one
micro-batch at a time; right for any function of the outputs. `single_pass`: where every term is `@rowwise`, precomputed global weights
make each micro-batch's share of the loss exact, and one forward is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rlhf_cli.inject import call, is_rowwise, is_weighted_by_advantage, needs
from rlhf_cli.models.packing import packed_size
from rlhf_cli.pulse import alive
from rlhf_cli.types import OUTPUTS, Experience, Term

Outs = dict[str, Tensor]
Forward = Callable[[Experience, Tensor], Outs]  # (experience, rows) -> outputs of these rows
Backward = Callable[[Tensor, bool], None]  # (partial loss, is it the last micro-batch)
Batches = Sequence[Tensor | None]  # row indices; None: nothing of this rank's, run for the others' sake


def wanted(terms: Sequence[Term]) -> frozenset[str]:
    """The learner outputs that the terms take."""
    return frozenset().union(*(needs(t.objective) for t in terms)) & frozenset(OUTPUTS)


def single_pass_is_exact(terms: Sequence[Term]) -> bool:
    """Whether no term couples rows."""
    return all(is_rowwise(t.objective) for t in terms)


def that_matter(terms: Sequence[Term], exp: Experience) -> Tensor:
    """[N] bool: rows that can move a weight. Where every term is weighted by the advantage, rows without one cannot."""
    if exp.advantage is None or not all(is_weighted_by_advantage(t.objective) for t in terms):
        return torch.ones(len(exp), dtype=torch.bool)
    return (exp.advantage.masked_fill(~exp.mask, 0) != 0).any(-1)


def weights_of(term: Term, exp: Experience) -> Tensor:
    """Global weights of a term's unreduced values: [N, T] by its reduction, else a mean over pairs [M] or rows [N]."""
    if term.reduce is not None:
        return call(term.reduce, exp)
    if "pairs" in needs(term.objective):
        assert exp.pairs is not None, "the plan checked that pairs are produced"
        m = max(len(exp.pairs), 1)
        w = torch.ones(len(exp.pairs)) if exp.pair_weight is None else exp.pair_weight
        return w / m
    rows = exp.mask.any(-1)
    return rows.float() / rows.sum().clamp(min=1)


def term_losses(
    terms: Sequence[Term], exp: Experience, outs: Mapping[str, Tensor], weights: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Each term's value times its coefficient, on whatever rows `exp`, `outs` and `weights` hold."""
    losses = {}
    for term, w in zip(terms, weights, strict=True):
        x = call(term.objective, exp, outs)
        if x.shape != w.shape:
            raise ValueError(f"term {term.name}: the objective gives {list(x.shape)}, its reduction {list(w.shape)}")
        losses[term.name] = term.coef * (w.to(x.dtype) * x).sum()
    return losses


def complete(exp: Experience, outs: Outs) -> Outs:
    """Outputs, with `old_logp` taken from the current pass when the update is on-policy and no earlier pass was made."""
    if exp.old_logp is None and "logp" in outs:
        return {**outs, "old_logp": outs["logp"].detach()}
    return outs


def single_pass(terms: Sequence[Term], exp: Experience, batches: Batches, forward: Forward, backward: Backward) -> Outs:
    """One forward and backward per micro-batch. Returns this rank's outputs, detached, zero on other rows."""
    weights = [weights_of(t, exp) for t in terms]
    found: list[tuple[Tensor, Outs]] = []
    for i, rows in enumerate(batches):
        index = torch.zeros(1, dtype=torch.int64) if rows is None else rows
        part, outs = exp.rows(index), forward(exp, index)
        width = part.ids.shape[1]
        near = {k: fit(v, width).cpu() for k, v in outs.items()}  # experience lives on the CPU; gradients flow back
        losses = term_losses(terms, part, complete(part, near), [w[index] for w in weights])
        loss = torch.stack(list(losses.values())).sum()
        backward(loss if rows is not None else loss * 0, i == len(batches) - 1)
        alive()
        if rows is not None:
            found.append((rows, outs))
    return collect(found, exp, names=outs)  # a rank without rows has the same columns, all zero


def two_pass(
    terms: Sequence[Term], exp: Experience, outs: Outs, batches: Batches, forward: Forward, backward: Backward
) -> None:
    """Cotangents of the global loss at the global `outs`, pushed through one micro-batch at a time."""
    leaves = {k: v.detach().requires_grad_() for k, v in outs.items()}
    weights = [weights_of(t, exp) for t in terms]
    loss = torch.stack(list(term_losses(terms, exp, complete(exp, leaves), weights).values())).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    cotangent = {k: g for k, g in zip(leaves, grads, strict=True) if g is not None}
    for i, rows in enumerate(batches):
        index = torch.zeros(1, dtype=torch.int64) if rows is None else rows
        part = forward(exp, index)
        share = torch.stack(
            [
                (fit(part[k], g.shape[1]) * g[index].to(part[k].device)).sum()
                if g.ndim == 2
                else (part[k] * g[index].to(part[k].device)).sum()
                for k, g in cotangent.items()
            ]
        ).sum()
        backward(share if rows is not None else share * 0, i == len(batches) - 1)
        alive()


def infer(exp: Experience, batches: Batches, forward: Forward) -> Outs:
    """Outputs of this rank's rows without gradient, zero on other rows."""
    done = []
    with torch.no_grad():
        for rows in batches:
            done.append((rows, forward(exp, torch.zeros(1, dtype=torch.int64) if rows is None else rows)))
            alive()
    return collect([(rows, outs) for rows, outs in done if rows is not None], exp, names=done[0][1] if done else {})


def collect(found: Sequence[tuple[Tensor, Outs]], exp: Experience, names: Mapping[str, Tensor] | None = None) -> Outs:
    """Place micro-batch outputs into [N, T] or [N] columns on the CPU."""
    like = names or (found[0][1] if found else {})
    columns = {
        k: torch.zeros(exp.ids.shape if v.ndim == 2 else exp.ids.shape[:1], dtype=v.dtype) for k, v in like.items()
    }
    for rows, outs in found:
        for k, v in outs.items():
            columns[k][rows] = fit(v.detach().cpu(), exp.ids.shape[1]) if v.ndim == 2 else v.detach().cpu()
    return columns


def fit(x: Tensor, width: int) -> Tensor:
    """Pad [n, t] with zeros on the right to `width`; other shapes pass."""
    if x.ndim != 2 or x.shape[1] == width:
        return x
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))


Piece = tuple[int, int, Tensor]  # tokens when packed, longest row, rows


def micro_batches(
    exp: Experience, world: int, budget: int, packing: bool, matter: Tensor | None = None
) -> list[list[Tensor | None]]:
    """Per rank, its micro-batches: whole groups while they fit into `budget` tokens; the same number on every rank.

    `matter` [N] bool: the rows to forward; all when None.

    Computed identically on every rank from global tensors. Unequal counts would hang ZeRO-3, hence the None fillers. Without packing
    a micro-batch costs its rows times its longest row.
    """
    wanted = torch.ones(len(exp), dtype=torch.bool) if matter is None else matter
    groups = [((exp.group == g) & wanted).nonzero().flatten() for g in torch.unique(exp.group[wanted]).tolist()]
    pieces = [piece for rows in groups for piece in _pieces(exp, rows, budget, packing)]
    pieces.sort(key=lambda p: -p[0])
    load = [0] * world
    mine: list[list[Piece]] = [[] for _ in range(world)]
    for piece in pieces:
        rank = load.index(min(load))
        load[rank] += piece[0]
        mine[rank].append(piece)
    plans: list[list[Tensor | None]] = [_bins(own, budget, packing) for own in mine]
    most = max(1, max(len(p) for p in plans))
    return [p + [None] * (most - len(p)) for p in plans]


def _cost(packed: int, rows: int, widest: int, packing: bool) -> int:
    return packed if packing else rows * widest


def _pieces(exp: Experience, rows: Tensor, budget: int, packing: bool) -> list[Piece]:
    """A group, cut in halves until each part fits the budget or is one row."""
    widest = int(exp.attention[rows].sum(-1).max())
    size = _cost(packed_size(exp.ids[rows], exp.attention[rows]), len(rows), widest, packing)
    if size <= budget or len(rows) == 1:
        return [(size, widest, rows)]
    half = len(rows) // 2
    return _pieces(exp, rows[:half], budget, packing) + _pieces(exp, rows[half:], budget, packing)


def _bins(pieces: Sequence[Piece], budget: int, packing: bool) -> list[Tensor | None]:
    """First fit, largest first."""
    bins: list[tuple[int, int, list[Tensor]]] = []
    for cost, widest, rows in pieces:
        for i, (used, wide, members) in enumerate(bins):
            count = len(rows) + sum(len(m) for m in members)
            if _cost(used + cost, count, max(wide, widest), packing) <= budget:
                bins[i] = (used + cost, max(wide, widest), [*members, rows])
                break
        else:
            bins.append((cost, widest, [rows]))
    return [torch.cat(members) for *_, members in bins]
