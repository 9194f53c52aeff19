"""Signs that a reward is being hacked: cheap numbers of every scored step, none a proof, whose trends tell.

All of them are functions of a step's columns, the same on every rank; texts are looked at in whole groups, evenly spread, of about `rows` responses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_cli import signs
from rlhf_cli.config import DetectorsSection
from rlhf_cli.errors import GateError
from rlhf_cli.types import Experience

BASE = 0x9E3779B97F4A7C15 - (1 << 64)  # an odd number, so that its powers can be divided out modulo 2^64
SALT = 0x2545F4914F6CDD1D  # spreads token ids
ROW = 0x5851F42D4C957F2D  # tells rows apart
ADVICE = {
    "length_corr": "length alone raises the reward: add a length penalty, or a reward that does not grow with length",
    "length_corr_within": "length alone raises the reward: add a length penalty, or a reward that does not grow with length",
    "repeated": "responses repeat themselves: add reward=repetition",
    "copied": "responses copy the prompt: compare with references, or add a penalty",
    "alike": "responses to one prompt are the same: raise rollout.temperature, or add a KL term",
    "zero_variance": "groups have no signal: choose harder or easier prompts, or a denser reward",
    "format_share": "the reward is format alone: lower the weight of that reward",
    "truncated": "responses do not end: raise rollout.max_tokens, or penalise length",
    "similar": "different prompts get the same answer: add a KL term, or raise rollout.temperature",
    "tail": "responses explain themselves behind their answer: score the answer alone, or penalise length",
    "inconsistent": "the judge decides by place: choose another judge, or rule=strict",
    "ensemble_std": "the rewards disagree, off what they were trained on: choose combine=uwo or min, or a KL term",
    "entropy": "the policy has stopped to explore: add objective=entropy_bonus, or lower optim.lr",
    "kl": "the policy is far from its reference: raise the KL coefficient, or lower optim.lr",
    "gold_gap": "the reward outruns detectors.gold: stop here, or add a KL term",
    "gold_falls": "the reward rises while detectors.gold falls: stop here, or add a KL term",
}
"""Detector -> what it means. Each has a limit of the same name."""
LEAST = frozenset({"entropy"})  # its limit is a lower one
ELSEWHERE = {"ensemble_std": "reward/ensemble_std"}  # where a number stands that is not under hack/


class Detectors:
    """Looks at a scored step; a number beyond its limit for `detectors.steps` steps in a row stops the run.

    `weights` are those of the rewards by name, `forms` those of the components that look at form alone.
    """

    def __init__(self, cfg: DetectorsSection, weights: Mapping[str, float], forms: Mapping[str, float]) -> None:
        self.cfg, self.weights, self.forms = cfg, dict(weights), dict(forms)
        self.limits: dict[str, float] = {k: v for k in ADVICE if (v := getattr(cfg, k)) is not None}
        self.streaks = dict.fromkeys(self.limits, 0)
        self.gold = signs.Gold(cfg.gold, cfg.window) if cfg.gold else None

    def __call__(self, exp: Experience, told: Mapping[str, float] | None = None) -> dict[str, float]:
        """The step's numbers. `told` are numbers that somebody else logs. Raises GateError where one was beyond its limit for too long."""
        if not len(exp) or not self.cfg.enabled:
            return {}
        found = scores(exp) | texts(exp, self.cfg.rows) | self._read(exp)
        if self.forms:
            found["format_share"] = format_share(exp.components, self.weights, self.forms)
        if self.gold is not None:
            found |= self.gold(exp)
        found = {k: v for k, v in found.items() if math.isfinite(v)}
        self._check(found | dict(told or {}), self.limits.keys() - {"kl"})
        return found

    def drift(self, exp: Experience) -> None:
        """The KL of a step, which is known once the reference has seen it; it is logged with the step."""
        if len(exp) and self.cfg.enabled and "kl" in self.limits:
            found = frontier(exp).get("kl")
            self._check({"kl": math.fsum(found) / len(found)} if found else {}, {"kl"})

    def _read(self, exp: Experience) -> dict[str, float]:
        """What texts, judges and the sampler say."""
        said = [s.response for s in exp.samples]
        found = {"inconsistent": signs.inconsistent(exp.components), "entropy": signs.entropy(exp)}
        if said:
            found |= {
                "similar": signs.similar(said, exp.group.tolist(), self.cfg.pairs),
                "tail": signs.tail(said, self.cfg.answer),
            }
        return found

    def _check(self, found: Mapping[str, float], names: Collection[str]) -> None:
        """Count the steps in a row in which a number was beyond its limit."""
        for name in (n for n in ADVICE if n in names):
            value, limit = found.get(name), self.limits[name]
            beyond = value is not None and (value < limit if name in LEAST else abs(value) > limit)
            self.streaks[name] = self.streaks[name] + 1 if beyond else 0
            if self.streaks[name] >= self.cfg.steps:
                raise GateError(
                    f"{ELSEWHERE.get(name, f'hack/{name}')} is {value:.3g}, {'below' if name in LEAST else 'beyond'} "
                    f"detectors.{name}={limit:g} for {self.streaks[name]} steps (detectors.steps={self.cfg.steps}); {ADVICE[name]}"
                )

    def state_dict(self) -> dict[str, Any]:
        """How long each number has been beyond its limit, and what gold was."""
        return {"streaks": dict(self.streaks), "gold": None if self.gold is None else self.gold.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.streaks |= {k: int(v) for k, v in state["streaks"].items() if k in self.streaks}
        if self.gold is not None and state.get("gold"):
            self.gold.load_state_dict(state["gold"])


def scores(exp: Experience) -> dict[str, float]:
    """Rank correlation of score and length over the batch and within groups (their mean), groups without variance, truncation."""
    lengths = exp.mask.sum(-1).double()
    score, group = exp.score.double(), exp.group
    inside = within(ranks(score, group), ranks(lengths, group), group)
    everything = torch.zeros_like(group)
    found = {
        "length_corr": float(within(ranks(score, everything), ranks(lengths, everything), everything).nanmean()),
        "length_corr_within": float(inside.nanmean()),
    }
    _, index, sizes = group.unique(return_inverse=True, return_counts=True)
    low = torch.full((len(sizes),), math.inf, dtype=torch.float64).scatter_reduce(0, index, score, "amin")
    high = torch.full((len(sizes),), -math.inf, dtype=torch.float64).scatter_reduce(0, index, score, "amax")
    many = sizes > 1
    if many.any():
        found["zero_variance"] = float((low == high)[many].double().mean())
    if exp.truncated is not None:
        found["truncated"] = float(exp.truncated.double().mean())
    return found


def ranks(x: Tensor, group: Tensor) -> Tensor:
    """[N] ranks inside each group, ties at their mean rank."""
    _, index, sizes = group.unique(return_inverse=True, return_counts=True)
    _, place, equal = torch.stack([index.double(), x.double()]).unique(dim=1, return_inverse=True, return_counts=True)
    last = equal.cumsum(0)[place]  # of the rows that are not larger, over all groups before
    return (last - (sizes.cumsum(0) - sizes)[index]).double() - (equal[place].double() - 1) / 2


def within(x: Tensor, y: Tensor, group: Tensor) -> Tensor:
    """[P] correlation of two [N] columns inside each group; NaN where it has fewer than three rows or one is constant."""
    _, index, sizes = group.unique(return_inverse=True, return_counts=True)

    def total(v: Tensor) -> Tensor:
        return torch.zeros(len(sizes), dtype=torch.float64).index_add(0, index, v)

    dx, dy = (v - (total(v) / sizes)[index] for v in (x, y))
    found = total(dx * dy) / (total(dx * dx) * total(dy * dy)).sqrt()
    return found.masked_fill(sizes < 3, math.nan)


def format_share(components: Mapping[str, Tensor], weights: Mapping[str, float], forms: Mapping[str, float]) -> float:
    """Mean |weighted reward| of form over that of all rewards; NaN where all are 0."""

    def size(parts: Mapping[str, float]) -> float:
        there = [(w, components[k].double()) for k, w in parts.items() if w and k in components]
        return math.fsum(float((w * x).abs().nanmean()) for w, x in there)

    whole = size(weights)
    return size(forms) / whole if whole else math.nan


def texts(exp: Experience, rows: int) -> dict[str, float]:
    """Repeated n-grams in a response and over a group, and the longest piece that a response copies from its prompt."""
    names = exp.group.unique()
    wanted = max(1, min(len(names), rows * len(names) // len(exp)))  # whole groups, evenly spread over the step
    pick = torch.isin(exp.group, names[torch.arange(wanted) * len(names) // wanted]).nonzero().flatten()
    ids, mask, group = exp.ids[pick], exp.mask[pick], exp.group[pick]
    prompt = exp.attention[pick] & ~mask & (mask.cumsum(-1) == 0)
    hashes = Windows(ids)
    found = {f"repeated_{k}": float(repeated(*hashes.of(k, mask)).nanmean()) for k in (3, 4)}
    found["repeated"] = found.pop("repeated_3")
    found["alike"] = float(alike(*hashes.of(3, mask), group).nanmean())
    found["copied"] = float(copied(hashes, prompt, mask).nanmean())
    return found


class Windows:
    """Hashes of the token windows of each row, modulo 2^64, from one pass: window k at i is (H[i+k] - H[i]) / BASE^i."""

    def __init__(self, ids: Tensor) -> None:
        """Hash rows of token ids [N, T]."""
        n, t = ids.shape
        powers = torch.full((t,), BASE, dtype=torch.int64)
        powers[:1] = 1
        self.powers = powers.cumprod(0)
        inverse = torch.full((t,), pow(BASE % (1 << 64), -1, 1 << 64) - (1 << 64), dtype=torch.int64)
        inverse[:1] = 1
        self.inverse = inverse.cumprod(0)
        mixed = (ids.long() + 1) * SALT
        self.sums = torch.cat([torch.zeros(n, 1, dtype=torch.int64), (mixed * self.powers).cumsum(-1)], dim=-1)

    def rows(self, index: Tensor) -> Windows:
        """The same of some rows."""
        made = copy.copy(self)
        made.sums = self.sums[index]
        return made

    def of(self, k: int, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(hashes, valid) [N, T-k+1] of the windows of k tokens that lie inside `mask`."""
        size = mask.shape[1] - k + 1
        if size <= 0:
            return torch.zeros(len(mask), 0, dtype=torch.int64), torch.zeros(len(mask), 0, dtype=torch.bool)
        made = (self.sums[:, k:] - self.sums[:, :-k]) * self.inverse[:size]
        count = torch.cat([torch.zeros(len(mask), 1, dtype=torch.int64), mask.long().cumsum(-1)], dim=-1)
        return made, count[:, k:] - count[:, :-k] == k


def repeated(hashes: Tensor, valid: Tensor) -> Tensor:
    """[N] 1 - distinct / all windows of each row; NaN for a row without any."""
    row = torch.arange(len(hashes))[:, None].expand_as(hashes)
    return 1 - _distinct(hashes[valid], row[valid], len(hashes)) / valid.sum(-1)


def alike(hashes: Tensor, valid: Tensor, group: Tensor) -> Tensor:
    """[P] 1 - distinct / all windows over the responses of each group of two or more: what a group says twice."""
    _, index, sizes = group.unique(return_inverse=True, return_counts=True)
    owner = index[:, None].expand_as(hashes)
    total = torch.zeros(len(sizes), dtype=torch.int64).index_add(0, index, valid.sum(-1))
    return (1 - _distinct(hashes[valid], owner[valid], len(sizes)) / total).masked_fill(sizes < 2, math.nan)


def copied(hashes: Windows, prompt: Tensor, response: Tensor) -> Tensor:
    """[N] longest run of a response's tokens that its prompt has too, over the response's length; NaN for an empty one.

    Whether a run of k is shared falls with k, so that the longest is found by halving.
    """
    length = response.sum(-1)
    low, high = torch.zeros_like(length), torch.minimum(length, prompt.sum(-1))
    while bool((low < high).any()):
        middle = (low + high + 1) // 2
        shared = torch.zeros_like(low, dtype=torch.bool)
        for k in middle[low < high].unique().tolist():
            rows = ((middle == k) & (low < high)).nonzero().flatten()
            few = hashes.rows(rows)
            shared[rows] = _shares(*few.of(k, prompt[rows]), *few.of(k, response[rows]))
        low, high = torch.where(shared, middle, low), torch.where(shared | (low >= high), high, middle - 1)
    return low / length


def _shares(a: Tensor, there: Tensor, b: Tensor, here: Tensor) -> Tensor:
    """[N] whether a valid window of `b` is a valid window of `a` in the same row."""
    salt = torch.arange(len(a))[:, None] * ROW
    both = torch.isin((b + salt)[here], (a + salt)[there])
    owner = torch.arange(len(b))[:, None].expand_as(b)[here]
    return torch.zeros(len(b), dtype=torch.int64).index_add(0, owner, both.long()) > 0


def _distinct(hashes: Tensor, owner: Tensor, owners: int) -> Tensor:
    """[owners] number of different hashes of each owner."""
    known = torch.stack([owner, hashes], dim=-1).unique(dim=0)[:, 0] if len(hashes) else owner
    return torch.bincount(known, minlength=owners)


def frontier(exp: Experience) -> dict[str, list[float]]:
    """KL of the sampling policy from the reference of each response, nats: k1 = sum_t log pi - log ref, k3 = sum_t ref/pi - 1 - log ref/pi.

    Where a mask forbade tokens it is that of the whole policy, if the run knows it: the reference is whole too. The frontier is the
    reward over sqrt(KL): runs compare at equal KL, not at equal step. See Gao et al., Scaling Laws for Reward Model
    Overoptimization, arXiv:2210.10760; the estimators: Schulman, Approximating KL divergence, 2020.
    """
    sampled = next((x for x in (exp.full_logp, exp.behavior_logp, exp.old_logp) if x is not None), None)
    if exp.ref_logp is None or sampled is None:
        return {}
    gap = ((exp.ref_logp - sampled) * exp.mask).double()
    k3 = (gap.clamp(-20, 20).exp() - 1 - gap.clamp(-20, 20)) * exp.mask
    return {"kl": (-gap).sum(-1).tolist(), "kl_k3": k3.sum(-1).tolist()}
