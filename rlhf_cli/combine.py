"""How several rewards become one: rules over sources, [N, S] to [N].

S sources, in the order of the configuration; each rule sees only rows in which every source has a value. Rules that look at one
row at a time (`@rowwise`) also serve evaluation; `@linear` ones are sums, so that token rewards of a source keep their place.
`weights` multiply a source before a rule compares sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.inject import rowwise

COLUMNS = {
    "sources": "N S",  # the rewards, each after its own shaping
    "weights": "S",
    "group": "N",  # rows of one prompt share it
    "sigmas": "N S",  # a source's own uncertainty, where it reports a component `sigma`
    "labels": "N",  # the record's group, where a rule has `by_meta`
    "directions": "N S",  # of the prompt, where a rule writes one into it
}


def linear(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Declare that `fn` is sum_s weights_s sources_s, whatever the sources are."""
    fn.linear = True  # type: ignore[attr-defined]
    return fn


def is_linear(fn: Callable[..., Any]) -> bool:
    """Whether `fn` declares that it is a weighted sum."""
    return bool(getattr(getattr(fn, "func", fn), "linear", False))


@linear
@rowwise
def weighted_sum(sources: Tensor, weights: Tensor) -> Tensor:
    """sum_s w_s r_s, [N]. Under group normalisation this is sum-then-normalise: the source of largest variance rules.

    Args:
        sources: rewards, [N, S]
        weights: [S]
    """
    total = sources.new_zeros(len(sources))
    for s in range(sources.shape[1]):  # in order, so that the sum does not depend on how a kernel splits it
        total = total + weights[s] * sources[:, s]
    return total


@rowwise
def mean(sources: Tensor, weights: Tensor) -> Tensor:
    """sum_s w_s r_s / sum_s w_s, [N].

    See Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization", arXiv:2310.02743, section 3.

    Args:
        sources: rewards, [N, S]
        weights: [S]
    """
    return weighted_sum(sources, weights) / weights.sum()


@rowwise
def minimum(sources: Tensor, weights: Tensor) -> Tensor:
    """min_s w_s r_s, the worst case, [N].

    See Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization", arXiv:2310.02743, section 3 (WCO).

    Args:
        sources: rewards, [N, S]
        weights: [S]
    """
    return (sources * weights).amin(-1)


@rowwise
def median(sources: Tensor, weights: Tensor) -> Tensor:
    """The median of w_s r_s, the mean of the middle two where S is even, [N].

    See Eisenstein et al., "Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking",
    arXiv:2312.09244, section 4.

    Args:
        sources: rewards, [N, S]
        weights: [S]
    """
    ordered, n = (sources * weights).sort(-1).values, sources.shape[1]
    return (ordered[:, (n - 1) // 2] + ordered[:, n // 2]) / 2


@rowwise
def uwo(sources: Tensor, weights: Tensor, *, lam: float, ddof: int) -> Tensor:
    """Uncertainty-weighted: mean_s - lam var_s of w_s r_s, [N].

    See Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization", arXiv:2310.02743, section 3 (UWO).

    Args:
        sources: rewards, [N, S]
        weights: [S]
        lam: penalty, 1 / reward units
        ddof: 1 for the unbiased variance, 0 for the population's
    """
    members = sources * weights
    return members.mean(-1) - lam * _variance(members, ddof)


@rowwise
def mean_minus_std(sources: Tensor, weights: Tensor, *, lam: float, ddof: int) -> Tensor:
    """mean_s - lam std_s of w_s r_s, [N].

    See Eisenstein et al., "Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking",
    arXiv:2312.09244, section 4.

    Args:
        sources: rewards, [N, S]
        weights: [S]
        lam: standard deviations taken off
        ddof: 0 for the population's standard deviation, 1 for the sample's
    """
    members = sources * weights
    return members.mean(-1) - lam * _variance(members, ddof).sqrt()


@rowwise
def product(sources: Tensor, weights: Tensor) -> Tensor:
    """prod_s r_s^w_s, [N]; a weight of 1 leaves a source as it is. Other weights want sources of at least 0.

    Args:
        sources: rewards, [N, S]
        weights: exponents, [S]
    """
    return torch.where(weights == 1, sources, sources.clamp(min=0) ** weights).prod(-1)


def normalise_then_sum(
    sources: Tensor, weights: Tensor, group: Tensor, *, ddof: int, eps: float, whiten: bool
) -> Tensor:
    """sum_s w_s (r_s - mean_g) / (std_g + eps) within each group g, [N]: every source gets an equal say.

    A source that is constant in a group gives exactly 0 there. `whiten` then scales the sum to mean 0 and variance 1 over the batch.
    See Liu et al., "GDPO: Group reward-Decoupled Normalization Policy Optimization", arXiv:2601.05242.

    Args:
        sources: rewards, [N, S]
        weights: [S]
        group: rows of one prompt share it, [N] int64
        ddof: 1 for the sample standard deviation, 0 for the population's
        eps: added to the standard deviation, reward units
        whiten: normalise the sum over the batch
    """
    index, size = _groups(group)
    centred = centre(sources, group)
    square = sources.new_zeros(len(size), sources.shape[1]).index_add(0, index, centred.square())
    std = (square / (size - ddof).clamp(min=1)[:, None]).sqrt()
    total = weighted_sum(centred / (std + eps)[index], weights)
    if not whiten:
        return total
    shifted = total - total.mean()
    return shifted / (shifted.square().sum() / max(len(total) - ddof, 1)).sqrt().clamp(min=eps)


@rowwise
def nominal_robust(sources: Tensor, weights: Tensor, sigmas: Tensor, *, lam: float) -> Tensor:
    """lam r_nominal + (1 - lam) min_s w_s r_s, [N].

    Nominal is the source of the smallest `sigma` on that row; where no source reports a sigma, the mean of all. lam = 1 is RLHF
    on the nominal reward, lam = 0 the worst case alone.
    See Yan et al., "Reward-Robust RLHF in LLMs", arXiv:2409.15360.

    Args:
        sources: rewards, [N, S]
        weights: [S]
        sigmas: the sources' own uncertainties, [N, S], NaN where they report none
        lam: weight of the nominal reward, in [0, 1]
    """
    members = sources * weights
    return lam * _nominal(members, sigmas) + (1 - lam) * members.amin(-1)


def nominal_robust_batch(sources: Tensor, weights: Tensor, sigmas: Tensor, *, lam: float) -> Tensor:
    """`nominal_robust` with the minimum of the paper's formula: over the sources' expected rewards, here their means over the batch.

    See Yan et al., "Reward-Robust RLHF in LLMs", arXiv:2409.15360.

    Args:
        sources: rewards, [N, S]
        weights: [S]
        sigmas: the sources' own uncertainties, [N, S], NaN where they report none
        lam: weight of the nominal reward, in [0, 1]
    """
    members = sources * weights
    worst = members.index_select(1, members.mean(0).argmin()[None])[:, 0]
    return lam * _nominal(members, sigmas) + (1 - lam) * worst


def maxmin(sources: Tensor, weights: Tensor, *, temperature: float) -> Tensor:
    """The reward of the user group that is worst off, [N]; each source speaks for a group of users.

    The minimum is over the groups' mean rewards over the batch, max_pi min_u E[r_u]: u* = argmin_u mean(w_u r_u), R = w_u* r_u*. A
    temperature T > 0 smooths it: R = sum_u softmax(-mean_u / T) w_u r_u.
    See Chakraborty et al., "MaxMin-RLHF: Alignment with Diverse Human Preferences", arXiv:2402.08925.

    Args:
        sources: rewards, one per user group, [N, S]
        weights: [S]
        temperature: reward units; 0 takes the minimum
    """
    members = sources * weights
    return members @ _worst(members.mean(0), temperature)


def maxmin_records(sources: Tensor, weights: Tensor, labels: Tensor, *, by_meta: str, temperature: float) -> Tensor:
    """`maxmin` over groups of records: only rows of the group whose mean reward is worst learn, [N].

    R_i = N / N_u(i) W_u(i) sum_s w_s r_is with W = onehot(argmin_u mean_u) (or a softmin), so that the mean of R is
    sum_u W_u mean_u. Group normalisation would erase the factor; use a credit without scale.
    See Chakraborty et al., "MaxMin-RLHF: Alignment with Diverse Human Preferences", arXiv:2402.08925.

    Args:
        sources: rewards, [N, S]
        weights: [S]
        labels: number of each row's group, [N] int64
        by_meta: key of a record's meta that names its group
        temperature: reward units; 0 takes the minimum
    """
    total = weighted_sum(sources, weights)
    index, size = _groups(labels)
    means = total.new_zeros(len(size)).index_add(0, index, total) / size
    return total * (_worst(means, temperature) * len(total) / size)[index]


@rowwise
def direction(sources: Tensor, directions: Tensor, *, max_degrees: float, template: str) -> Tensor:
    """v . r, [N]: a unit vector v per prompt, drawn by a hash of the prompt and written into it.

    v = (cos a, sin a), a uniform in [-max_degrees, max_degrees]; the policy reads round(100 v).
    See Wang et al., "Arithmetic Control of LLMs for Diverse User Preferences: Directional Preference Alignment with
    Multi-Objective Rewards", arXiv:2402.18571, section 3.

    Args:
        sources: two rewards on one scale, [N, 2]
        directions: v of each row's prompt, [N, 2]
        max_degrees: largest angle away from the first reward alone
        template: system message that tells the direction; {weights} becomes `first*97 + second*-26`
    """
    return (sources * directions).sum(-1)


@rowwise
class Lagrangian:
    """Rewards under constraints: sum of the free sources + sum_c lambda_c (r_c - threshold_c), over 1 + sum lambda if `normalise`.

    After every step each multiplier climbs its dual, lambda_c <- clip(lambda_c + lr (threshold_c - mean_batch r_c), 0, largest): it
    grows while the constraint E[r_c] >= threshold_c is broken and falls to 0 while it holds.
    See Dai et al., "Safe RLHF: Safe Reinforcement Learning from Human Feedback", arXiv:2310.12773, section 3.
    """

    def __init__(
        self, *, thresholds: dict[str, float], initial: float, lr: float, largest: float, normalise: bool
    ) -> None:
        """Args:
        thresholds: source -> the least mean reward that it must have
        initial: multipliers at the start
        lr: step of the multipliers, per reward unit
        largest: bound of the multipliers
        normalise: divide by 1 + sum lambda, so that the reward keeps its scale
        """
        self.thresholds = {str(k): float(v) for k, v in thresholds.items()}
        self.lr, self.largest, self.normalise = lr, largest, normalise
        self.multipliers = dict.fromkeys(self.thresholds, initial)
        self.names: Sequence[str] = ()

    def __call__(self, sources: Tensor, weights: Tensor) -> Tensor:
        free = torch.tensor([n not in self.thresholds for n in self.names])
        total = weighted_sum(sources[:, free], weights[free])
        for name, lam in self.multipliers.items():
            total = total + lam * (sources[:, self.names.index(name)] - self.thresholds[name])
        return total / (1 + sum(self.multipliers.values())) if self.normalise else total

    def learn(self, sources: Tensor) -> None:
        """One projected ascent of the multipliers on the rows of a step."""
        for name, threshold in self.thresholds.items():
            gap = threshold - float(sources[:, self.names.index(name)].double().mean())
            self.multipliers[name] = min(max(self.multipliers[name] + self.lr * gap, 0.0), self.largest)

    @property
    def stats(self) -> dict[str, float]:
        """The multipliers, for the log."""
        return {f"lambda/{name}": lam for name, lam in self.multipliers.items()}

    def state_dict(self) -> dict[str, Any]:
        """The multipliers."""
        return {"multipliers": dict(self.multipliers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with these."""
        self.multipliers = {str(k): float(v) for k, v in state["multipliers"].items()}


def centre(sources: Tensor, group: Tensor) -> Tensor:
    """Each source minus its mean over the group, [N, S]; exactly 0 where a group's values are all equal.

    Args:
        sources: rewards, [N, S]
        group: rows of one prompt share it, [N] int64
    """
    index, size = _groups(group)
    low = sources.new_zeros(len(size), sources.shape[1])
    low = low.scatter_reduce(0, index[:, None].expand_as(sources), sources, "amin", include_self=False)
    shifted = sources - low[index]  # so that equal values leave no rounding
    total = torch.zeros_like(low).index_add(0, index, shifted)
    return shifted - (total / size[:, None])[index]


def _groups(group: Tensor) -> tuple[Tensor, Tensor]:
    """Dense group numbers [N] and group sizes [P]."""
    _, index, size = torch.unique(group, return_inverse=True, return_counts=True)
    return index, size


def _nominal(members: Tensor, sigmas: Tensor) -> Tensor:
    """The member of the smallest sigma, or the mean where none has any, [N]."""
    confident = members.gather(1, sigmas.nan_to_num(nan=float("inf")).argmin(-1, keepdim=True)).squeeze(-1)
    return torch.where(sigmas.isnan().all(-1), members.mean(-1), confident)


def _worst(means: Tensor, temperature: float) -> Tensor:
    """Weights [U] on the smallest of the means, or a softmin."""
    if temperature > 0:
        return torch.softmax(-means / temperature, 0)
    return torch.nn.functional.one_hot(means.argmin(), len(means)).to(means.dtype)


def _variance(members: Tensor, ddof: int) -> Tensor:
    shifted = members - members[:, :1]
    centred = shifted - shifted.mean(-1, keepdim=True)
    return centred.square().sum(-1) / max(members.shape[1] - ddof, 1)
