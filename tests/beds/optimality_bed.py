"""A policy that is a table of logits, trained by a recipe's own stages through the project's loop.

Only models, data and sampling are replaced: `select`, `shape`, `credit`, `updates` and `minibatches` come from the composed
configuration, the step is `engine.step`'s, the loop is `loop.train`. Groups are drawn systematically, so that a step
holds each possible group in proportion to its probability; the table moves along the natural gradient, which has the
gradient's fixed points and reaches them at one rate.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from optimality_envs import MEMORYLESS, TWO_TOKENS, Env, Law
from optimality_source import Systematic, code
from torch import Tensor

from rlhf_cli import stages
from rlhf_cli.compose import compose
from rlhf_cli.engine import step as exact
from rlhf_cli.engine.comm import Comm
from rlhf_cli.loop import train
from rlhf_cli.pipeline import make_pipeline
from rlhf_cli.plan import HEADS, validate
from rlhf_cli.state import Builder
from rlhf_cli.types import Experience, Run, Sample, Scores, Update

COMM = Comm(torch.device("cpu"))


@dataclass(frozen=True)
class Row:
    """A line of the table: a recipe, and where theory says that it ends.

    `words` choose the recipe as on the command line; `predicted` maps a problem to the law over responses; `says` is that point
    in words. `columns` fill more columns of a step: name -> function of (problem, experience). `data` is the law of recorded
    responses, where they are not the policy's own. `judged` makes scores of the rewards of groups, [P, k] to [P, k].
    """

    name: str
    words: tuple[str, ...]
    predicted: Callable[[Env], Law]
    says: str
    envs: tuple[Env, ...] = (MEMORYLESS, TWO_TOKENS)
    steps: int = 150
    lr: float = 0.4
    groups: int = 512
    tolerance: float = 0.01
    columns: Mapping[str, Callable[[Env, Experience], Tensor]] = field(default_factory=dict)
    data: Callable[[Env], Law] | None = None
    judged: Callable[[Tensor], Tensor] | None = None


COMMON = (
    "model=tiny_random", "dataset=quickstart", "reward=length", "tracker=none", "hardware.device=cpu", "hardware.precision=fp32",
    "rollout.temperature=1", "rollout.max_tokens=3", "optim.schedule=linear", "batch.samples=2",
)  # fmt: skip


def rows() -> list[Row]:
    """Every row of the `rows_*.py` files beside this one, each of which has a list ROWS."""
    files = sorted(Path(__file__).parent.glob("rows_*.py"))
    return [row for path in files for row in importlib.import_module(path.stem).ROWS]


def land(row: Row, env: Env, seed: int = 0) -> Law:
    """Train the row's recipe on a problem; the law that it ends at, or for a reward model the law exp(score) / Z."""
    more = (f"batch.prompts={row.groups}", f"steps={row.steps}", f"optim.lr={row.lr}", f"seed={seed}")
    own = {word.partition("=")[0] for word in row.words}
    cfg = compose("train", [*(w for w in COMMON if w.partition("=")[0] not in own), *more, *row.words], None)
    plan = validate(cfg)
    tables = {name: Table(env, heads=HEADS[head]) for name, head in plan.learners.items()}
    policy = tables.get("policy") or Table(env)
    critic = next((t for n, t in tables.items() if "value_new" in HEADS[plan.learners[n]]), None)
    makers: dict[str, tuple[Any, str]] = {"old_logp": (policy, "logp"), "ref_logp": (Table(env), "logp")}
    makers |= {"value": (critic, "value_new")} if critic else {}
    fill = stages.annotating({c: makers[c] for c in plan.annotate if c in makers})
    pipeline = make_pipeline(cfg, plan, Builder([]), lambda *_: None)
    score = stages.scoring(Reward(env, row.judged), COMM, 0.0, lambda _: None)
    score = stages.baselined(score) if plan.greedy else score
    data = row.data(env) if row.data is not None else None
    paired = plan.source == "recorded" and any("pairs" in s.needs for s in plan.stages)
    run = Run(
        source=Systematic(env, policy, cfg.batch.prompts, cfg.batch.samples, plan.greedy, data=data, paired=paired),
        score=score if plan.source == "sampled" else stages.keep,
        annotate=lambda exp: _filled(row, env, fill(exp)),
        engines=tables,
        check=lambda *_: None,
        after=lambda _: False,
        record=Silent(),
        start=0,
        steps=cfg.steps,
        **vars(pipeline),
    )
    train(run)
    return policy.law() if "policy" in tables else next(iter(tables.values())).preferred()


def _filled(row: Row, env: Env, exp: Experience) -> Experience:
    return exp.filled({name: make(env, exp) for name, make in row.columns.items()})


class Table:
    """A learner: logits and values of each context, a score of each response, in float64."""

    def __init__(self, env: Env, heads: Sequence[str] = ("logp", "entropy")) -> None:
        self.env, self.heads = env, heads
        self.contexts = list(env.reference)
        probabilities = torch.tensor([env.reference[c] for c in self.contexts], dtype=torch.float64)
        self.theta = probabilities.log().requires_grad_()  # [C, V]
        self._context = self._contexts(env.context, self.contexts)
        prefixes = sorted({y[:t] for y in env.reward for t in range(len(y))})
        self._prefix = self._contexts(str, prefixes)  # a critic sees the whole prefix, whatever the policy sees
        self.value = torch.zeros(len(prefixes), dtype=torch.float64, requires_grad=True)
        self._response = self._contexts(str, list(env.reward), whole=True)[:, 0]
        self.worth = torch.zeros(len(env.reward), dtype=torch.float64, requires_grad=True)

    def law(self) -> Law:
        """Probability of each response."""
        p = self.theta.detach().softmax(-1)
        policy = {c: p[i].numpy() for i, c in enumerate(self.contexts)}
        return self.env.law(policy)

    def preferred(self) -> Law:
        """exp(score) / Z: scores are defined up to a constant."""
        return dict(zip(self.env.reward, self.worth.detach().softmax(-1).tolist(), strict=True))

    def at(self, exp: Experience) -> Tensor:
        """[N, T] context of every token; 0 outside the mask."""
        return self._context[code(exp.ids, exp.mask)]

    def _contexts(self, seen: Callable[[str], str], names: Sequence[str], whole: bool = False) -> Tensor:
        """[codes, T] for the response with this code: the number of what is seen before every token, or of the `whole` response."""
        width = max(map(len, self.env.reward))
        found = torch.zeros(3**width, width, dtype=torch.int64)
        for y in self.env.reward:
            mask = torch.arange(width) < len(y)
            ids = torch.tensor([int(c) for c in y.ljust(width, "0")])
            places = [names.index(y if whole else seen(y[:t])) for t in range(len(y))]
            found[code(ids, mask)] = torch.tensor(places + [0] * (width - len(y)))
        return found

    def forward(self, exp: Experience, rows: Tensor, want: frozenset[str]) -> dict[str, Tensor]:
        """The columns of some rows, with gradient."""
        part = exp if len(rows) == len(exp) else exp.rows(rows)  # a batch holds all rows, in their order
        at = self.at(part)
        logp = self.theta.log_softmax(-1)  # [C, V]
        made = {
            "logp": logp[at, part.ids],
            "entropy": -(logp.exp() * logp).sum(-1)[at],
            "value_new": self.value[self._prefix[code(part.ids, part.mask)]],
        }
        columns = {k: torch.where(part.mask, made[k], 0.0) for k in want & made.keys()}
        scores = self.worth[self._response[code(part.ids, part.mask)]]
        return columns | ({"score_new": scores} if "score_new" in want else {})

    def infer(self, exp: Experience, want: frozenset[str]) -> dict[str, Tensor]:
        """The same without gradient, in float32 as a run has it."""
        everything = [torch.arange(len(exp))]
        outs = exact.infer(exp, everything, lambda e, rows: self.forward(e, rows, want))
        return {k: v.float() for k, v in outs.items()}

    def step(self, exp: Experience, update: Update, *, lr: float) -> dict[str, float]:
        """One step of the terms along the natural gradient."""
        if not len(exp):
            return {}
        self.theta.grad = self.value.grad = self.worth.grad = None
        want = exact.wanted(update.terms)
        batches: list[Tensor | None] = [torch.arange(len(exp))]
        forward = lambda e, rows: self.forward(e, rows, want)  # noqa: E731
        backward = lambda loss, last: loss.backward()  # noqa: E731
        if exact.single_pass_is_exact(update.terms):
            exact.single_pass(update.terms, exp, batches, forward, backward)
        else:
            exact.two_pass(update.terms, exp, exact.infer(exp, batches, forward), batches, forward, backward)
        self._move(exp, lr)
        return {}

    def _move(self, exp: Experience, lr: float) -> None:
        with torch.no_grad():
            if self.theta.grad is not None:
                p = self.theta.softmax(-1)
                move = -lr * self.theta.grad / (_visits(self.at(exp), exp, len(p))[:, None] * p).clamp(min=1e-9)
                self.theta += move.clamp(-0.5, 0.5)
            if self.value.grad is not None:
                at = self._prefix[code(exp.ids, exp.mask)]
                self.value -= lr * self.value.grad / _visits(at, exp, len(self.value)).clamp(min=1e-9)
            if self.worth.grad is not None:
                at = self._response[code(exp.ids, exp.mask)]
                share = torch.bincount(at, minlength=len(self.worth)).double() / len(exp)
                self.worth -= lr * self.worth.grad / share.clamp(min=1e-9)


def _visits(at: Tensor, exp: Experience, n: int) -> Tensor:
    """How often each of n contexts is met, per row."""
    return torch.bincount(at[exp.mask], minlength=n).double() / exp.mask.any(-1).sum()


class Reward:
    """The problem's reward, or what a judge of whole groups makes of it."""

    def __init__(self, env: Env, judged: Callable[[Tensor], Tensor] | None) -> None:
        self.env, self.judged = env, judged

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        value = torch.tensor([self.env.reward[s.response] for s in samples])
        return Scores(value if self.judged is None else self.judged(value.reshape(int(group.max()) + 1, -1)).flatten())


class Silent:
    """A record that writes nothing."""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Nothing."""
        yield

    def step(self, *_: Any) -> None:
        """Nothing."""
