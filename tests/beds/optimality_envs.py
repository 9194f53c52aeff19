"""Two problems whose optimum is known in closed form, and what theory says about where a method ends. NumPy only.

Everything here is written from the formulas, without the project's code, so that it can judge that code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Law = dict[str, float]  # response -> probability
Policy = dict[str, np.ndarray]  # context -> probabilities of the next token


@dataclass(frozen=True)
class Env:
    """Responses of digits. `reference` gives the next token's probabilities at a context, `reward` a number per response."""

    name: str
    reference: Mapping[str, tuple[float, ...]]
    reward: Mapping[str, float]
    memoryless: bool = False

    def context(self, prefix: str) -> str:
        """What the policy sees of a prefix."""
        return "" if self.memoryless else prefix

    @property
    def start(self) -> Policy:
        """The reference as a policy."""
        return {c: np.array(p) for c, p in self.reference.items()}

    def law(self, policy: Policy) -> Law:
        """Probability of each response."""
        return {y: float(np.prod([policy[self.context(y[:t])][int(y[t])] for t in range(len(y))])) for y in self.reward}


MEMORYLESS = Env("memoryless", {"": (0.7, 0.3)}, {"00": 0.0, "01": 1.0, "10": 1.0, "11": 2.0}, memoryless=True)
MANY_UPDATES = Env("many updates on one rollout", {"": (0.3, 0.7)}, MEMORYLESS.reward, memoryless=True)
TWO_TOKENS = Env(
    "two tokens",
    {"": (0.7, 0.3), "0": (0.4, 0.6), "1": (0.9, 0.1)},
    {"00": 0.0, "01": 2.0, "10": 3.0, "11": -1.0},
)
LENGTHS = Env(  # token 0 ends a response, token 1 goes on: lengths 1, 2, 2
    "two lengths",
    {"": (0.5, 0.5), "1": (0.6, 0.4)},
    {"0": 1.0, "10": 1.4, "11": 0.2},
)
SEVERAL = Env(  # token 0 ends a response, token 1 goes on; the policy has one probability of both for every place
    "several lengths",
    {"": (0.5, 0.5)},
    {"0": 1.0, "10": 0.0, "110": 0.5, "111": 2.0},
    memoryless=True,
)


def distance(a: Law, b: Law) -> float:
    """Total variation."""
    return sum(abs(a[y] - b[y]) for y in a) / 2


# -- closed forms ------------------------------------------------------------------------------------------------------


def optimum(beta: float) -> Callable[[Env], Law]:
    """argmax of E[r] - beta KL(pi || ref) over whole responses: ref exp(r / beta) / Z, or the best that the policy can be."""

    def law(env: Env) -> Law:
        if env.memoryless and len({len(y) for y in env.reward}) > 1:
            return _best_memoryless(env, beta)
        tilted = {y: p * float(np.exp(env.reward[y] / beta)) for y, p in env.law(env.start).items()}
        z = sum(tilted.values())
        return {y: p / z for y, p in tilted.items()}

    return law


def _best_memoryless(env: Env, beta: float) -> Law:
    """The tilted law needs probabilities that depend on the place; the best law with one probability, by search."""
    reference = env.law(env.start)

    def gain(p: float) -> float:
        law = env.law({"": np.array([1 - p, p])})
        return sum(x * (env.reward[y] - beta * np.log(x / reference[y])) for y, x in law.items())

    low, high = 0.0, 1.0
    for _ in range(8):  # a grid, ever finer about its best point
        grid = np.linspace(low, high, 203)[1:-1]
        at = int(np.argmax([gain(float(p)) for p in grid]))
        low, high = float(grid[max(at - 1, 0)]), float(grid[min(at + 1, len(grid) - 1)])
    middle = (low + high) / 2
    return env.law({"": np.array([1 - middle, middle])})


def best(env: Env) -> Law:
    """argmax of E[r]: all mass on the best response."""
    top = max(env.reward, key=lambda y: env.reward[y])
    return {y: float(y == top) for y in env.reward}


# -- stationary points, by enumerating groups --------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A policy gradient sum_t w_t g_t grad log pi: g = A - beta k'(d), over all groups of k responses.

    `advantage` maps the rewards of groups [G, k] and the groups' probabilities to advantages [G, k]; `weight` maps lengths
    to w; `kl` is the derivative of the estimator in the loss, k' (k2: d, k3: 1 - exp(-d)), with coefficient `beta`.
    `keep` says which groups stay.
    """

    k: int
    advantage: Callable[[np.ndarray, np.ndarray], np.ndarray]
    weight: Callable[[np.ndarray], np.ndarray] = np.ones_like
    beta: float = 0.0
    kl: Callable[[np.ndarray], np.ndarray] = np.zeros_like
    keep: Callable[[np.ndarray], np.ndarray] = lambda r: np.ones(len(r), dtype=bool)


def k2_slope(d: np.ndarray) -> np.ndarray:
    """d/d logp of d^2 / 2."""
    return d


def k3_slope(d: np.ndarray) -> np.ndarray:
    """d/d logp of exp(-d) - 1 + d."""
    return 1 - np.exp(-d)


def centred(r: np.ndarray, p: np.ndarray) -> np.ndarray:
    """R - mean of the group."""
    return r - r.mean(1, keepdims=True)


def varied(r: np.ndarray) -> np.ndarray:
    """Groups whose rewards are not all equal, [G] bool."""
    return r.max(1) > r.min(1)


def per_token(length: np.ndarray) -> np.ndarray:
    """1 / length."""
    return 1 / length


def leave_one_out(r: np.ndarray, p: np.ndarray) -> np.ndarray:
    """R - mean of the others."""
    k = r.shape[1]
    return r - (r.sum(1, keepdims=True) - r) / (k - 1)


def standardised(eps: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(R - mean) / (std + eps) with the sample standard deviation."""

    def advantage(r: np.ndarray, p: np.ndarray) -> np.ndarray:
        c = centred(r, p)
        return c / (r.std(1, ddof=1, keepdims=True) + eps)

    return advantage


def centred_then_whitened(r: np.ndarray, p: np.ndarray) -> np.ndarray:
    """R - mean of the group, over the standard deviation of the batch; rows of one length."""
    c = centred(r, p)
    return c / np.sqrt((p[:, None] * c**2).sum() / (p.sum() * r.shape[1]) + 1e-8)


def stationary(rule: Rule, *, steps: int = 4000, lr: float = 0.2) -> Callable[[Env], Law]:
    """Where the expected update of `rule` vanishes, found by following it from the reference."""

    def law(env: Env) -> Law:
        policy = env.start
        for _ in range(steps):
            size = _follow(env, rule, policy, lr)
            if size < 1e-11:
                return env.law(policy)
        raise AssertionError(f"no stationary point after {steps} steps: still moving by {size:.1e}")

    return law


def corner(rule: Rule, *, steps: int = 400, lr: float = 0.2) -> Callable[[Env], Law]:
    """The one response to which the expected update of `rule` leads from the reference."""

    def law(env: Env) -> Law:
        policy = env.start
        for _ in range(steps):
            _follow(env, rule, policy, lr)
        end = env.law(policy)
        top = max(end, key=lambda y: end[y])
        assert end[top] > 0.999, f"it ends at no single response: {end}"
        return {y: float(y == top) for y in end}

    return law


def _follow(env: Env, rule: Rule, policy: Policy, lr: float) -> float:
    """Move `policy` along the expected update; the largest change of a log-probability."""
    visits, size = _visits(env, policy), 0.0
    for c, g in _drift(env, rule, policy).items():
        step = lr * g / np.maximum(visits[c] * policy[c], 1e-300)
        size = max(size, float(np.abs(step).max()))
        moved = policy[c] * np.exp(np.clip(step, -0.5, 0.5))
        policy[c] = moved / moved.sum()
    return size


def _visits(env: Env, policy: Policy) -> dict[str, float]:
    found = dict.fromkeys(policy, 0.0)
    for y, p in env.law(policy).items():
        for t in range(len(y)):
            found[env.context(y[:t])] += p
    return found


def _drift(env: Env, rule: Rule, policy: Policy) -> Policy:
    """Expected ascent direction in the logits of each context."""
    names = list(env.reward)
    laws = np.array(list(env.law(policy).values()))
    groups = np.array(list(itertools.product(range(len(names)), repeat=rule.k)))  # [G, k]
    p = laws[groups].prod(1)
    rewards = np.array([env.reward[y] for y in names])[groups]
    kept = rule.keep(rewards)
    groups, p, rewards = groups[kept], p[kept] / p[kept].sum(), rewards[kept]
    a = rule.advantage(rewards, p)
    length = np.array([len(y) for y in names])
    # mean advantage, and weight, of each response over the groups it is in
    share = np.zeros(len(names))
    gain = np.zeros(len(names))
    np.add.at(share, groups, np.repeat(p[:, None], rule.k, 1) / rule.k)
    np.add.at(gain, groups, p[:, None] * a / rule.k)
    w = rule.weight(length.astype(float))
    drift = {c: np.zeros_like(x) for c, x in policy.items()}
    for i, y in enumerate(names):
        for t, token in enumerate(y):
            c = env.context(y[:t])
            d = np.log(policy[c][int(token)]) - np.log(env.reference[c][int(token)])
            g = w[i] * (gain[i] - rule.beta * share[i] * float(rule.kl(np.array(d))))
            drift[c] += g * (np.eye(len(policy[c]))[int(token)] - policy[c])
    return drift


# -- many updates on one rollout ---------------------------------------------------------------------------------------


def one_rollout(rule: Rule, eps_low: float, eps_high: float, whole: bool = False) -> Callable[[Env], Law]:
    """Where the clipped surrogate of one rollout from the reference stops to push a memoryless policy over two tokens.

    `whole`: one ratio per response. p, the probability of token 1, grows from its start while the surrogate's slope at p is positive; bisection finds the first
    p at which it is not.
    """

    def law(env: Env) -> Law:
        assert env.memoryless
        old = float(env.reference[""][1])
        low, high = old, 1 - 1e-9
        clip = (eps_low, eps_high, whole)
        assert _slope(env, rule, old, old, *clip) > 0
        grid = np.linspace(old, high, 2000)
        slopes = [_slope(env, rule, p, old, *clip) for p in grid]
        first = next(i for i, x in enumerate(slopes) if x <= 1e-12)
        low, high = grid[first - 1], grid[first]
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if _slope(env, rule, middle, old, *clip) > 1e-12 else (low, middle)
        return env.law({"": np.array([1 - low, low])})

    return law


def _slope(env: Env, rule: Rule, p: float, old: float, eps_low: float, eps_high: float, whole: bool) -> float:
    """Slope of the expected clipped surrogate in the logit of token 1."""
    names = list(env.reward)
    laws = np.array(list(env.law(env.start).values()))
    groups = np.array(list(itertools.product(range(len(names)), repeat=rule.k)))
    rewards = np.array([env.reward[y] for y in names])[groups]
    probability = laws[groups].prod(1)
    advantage = rule.advantage(rewards, probability)
    ratio = {"1": p / old, "0": (1 - p) / (1 - old)}
    total = 0.0
    for group, weight, row in zip(groups, probability, advantage, strict=True):
        for i, a in zip(group, row, strict=True):
            parts = [names[i]] if whole else list(names[i])
            for part in parts:
                r = float(np.prod([ratio[token] for token in part]))
                active = r < 1 + eps_high if a > 0 else r > 1 - eps_low
                total += weight * a * r * active * sum(float(token) - p for token in part)
    return total
