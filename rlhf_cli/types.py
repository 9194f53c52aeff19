"""The closed vocabulary of columns and the protocols between the stages of a run.

Dimension letters, used everywhere: P prompts, N rows, T tokens, M pairs, H heads, V vocabulary,
R responses of the initial policy to a prompt; of the column `allowed`, S a row's trained tokens and B bytes that hold a bit per
token of the vocabulary.
Every [N, T] column is aligned to the token it describes, right-padded; the next-token shift happens in one function only
(`models/packing.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_cli.sample import Sample

__all__ = [
    "COLUMNS", "OUTPUTS", "Credit", "Engine", "Experience", "Narrowed", "Record", "Run", "Sample", "Scorer", "Scores", "Selection", "Source", "Term",
    "Update", "column",
]  # fmt: skip


def column(shape: str) -> Any:
    """Declare a tensor column: dimension letters (see the module docstring) separated by spaces."""
    return field(default=None, metadata={"shape": shape})


@dataclass(frozen=True)
class Experience:
    """N rows in P groups, with edges (`pairs`) over rows. Columns that no stage produced are None.

    `mask` marks the tokens the policy chose and that are trained; `attention` marks real tokens (prompt, response, EOS).
    `named` holds the columns NAME_logp [N, T] of the models in the configuration's `frozen`: the vocabulary is the fields here
    and those names, which a plan knows.
    """

    samples: tuple[Sample, ...] = ()
    components: Mapping[str, Tensor] = field(default_factory=dict)  # named reward parts, [N] each
    named: Mapping[str, Tensor] = field(default_factory=dict)
    ids: Tensor = column("N T")  # int64
    attention: Tensor = column("N T")  # bool
    mask: Tensor = column("N T")  # bool
    group: Tensor = column("N")  # int64, rows of one prompt share it
    version: Tensor = column("N")  # int64, policy version that sampled the row
    truncated: Tensor = column("N")  # bool, hit the token limit before EOS or a stop
    pairs: Tensor = column("M 2")  # int64, (winner, loser) row indices
    margin: Tensor = column("M")
    pair_weight: Tensor = column("M")
    greedy: Tensor = column(
        "N"
    )  # bool, drawn greedily to be its group's baseline; such rows leave when they are scored
    baseline: Tensor = column("N")  # score of the greedy response to the row's prompt
    label: Tensor = column("N")  # recorded feedback: rating, or 1/0 for thumbs up/down
    score: Tensor = column("N")
    hardness: Tensor = column("N")  # 1 - similarity of the response to the demonstration
    gap: Tensor = column("N")  # reward of the demonstration minus that of the response
    category: Tensor = column("N")  # rows of one category share it
    best: Tensor = column("N")  # 1 where the reward's rules give the best level, else 0
    ref_scores: Tensor = column(
        "N R"
    )  # of the initial policy's responses to the row's prompt, in units of `score`; NaN: missing
    ref_length: Tensor = column("N R")  # their lengths, tokens
    canned_score: Tensor = column("N")  # of the prepass's canned answer to the row's prompt, in units of `score`
    span_reward: Tensor = column("N T")  # the part of `score` that a scorer placed on tokens itself
    reward: Tensor = column("N T")
    turn_reward: Tensor = column("N T")  # what the environment gave for each turn, at that turn's last trained token
    behavior_logp: Tensor = column("N T")  # of the distribution that was sampled
    full_logp: Tensor = column("N T")  # of the policy's whole distribution, where the sampled one was masked
    allowed: Tensor = column(
        "N S B"
    )  # uint8, a bit per token of the vocabulary, for each row's trained tokens in order
    old_logp: Tensor = column("N T")
    ref_logp: Tensor = column("N T")
    value: Tensor = column("N T")
    advantage: Tensor = column("N T")
    returns: Tensor = column("N T")

    def __post_init__(self) -> None:
        """Check every shape against the declared letters."""
        size: dict[str, int] = {"2": 2}
        shapes = COLUMNS | dict.fromkeys(self.named, "N T")
        for name, x in [(n, getattr(self, n)) for n in COLUMNS] + list(self.named.items()):
            if x is None:
                continue
            names = shapes[name].split()
            if x.ndim != len(names):
                raise ValueError(f"{name} must be [{', '.join(names)}], got {list(x.shape)}")
            for letter, length in zip(names, x.shape, strict=True):
                if size.setdefault(letter, length) != length:
                    raise ValueError(f"{name}: {letter} is {length}, other columns have {size[letter]}")

    def get(self, name: str) -> Any:
        """A column by its name; None where no stage made it."""
        own = getattr(self, name, None)
        return self.named.get(name) if own is None else own

    def filled(self, columns: Mapping[str, Tensor]) -> Experience:
        """With more columns."""
        own = {k: v for k, v in columns.items() if k in COLUMNS}
        return replace(self, named={**self.named, **{k: v for k, v in columns.items() if k not in own}}, **own)

    def __len__(self) -> int:
        return 0 if self.ids is None else int(self.ids.shape[0])

    def rows(self, index: Tensor) -> Experience:
        """The rows `index` (int64), in that order. Pairs with both ends inside are kept and renumbered; others are dropped."""
        cut: dict[str, Any] = {
            f.name: getattr(self, f.name)[index]
            for f in fields(self)
            if f.metadata.get("shape", "").startswith("N") and getattr(self, f.name) is not None
        }
        if self.pairs is not None:
            place = torch.full((len(self),), -1, dtype=torch.int64, device=self.pairs.device)
            place[index] = torch.arange(len(index), device=place.device)
            moved = place[self.pairs]
            inside = (moved >= 0).all(-1)
            cut |= {"pairs": moved[inside]}
            cut |= {k: getattr(self, k)[inside] for k in ("margin", "pair_weight") if getattr(self, k) is not None}
        if self.samples:
            cut["samples"] = tuple(map(self.samples.__getitem__, index.tolist()))
        cut |= {k: {n: v[index] for n, v in getattr(self, k).items()} for k in ("components", "named")}
        return replace(self, **cut)


COLUMNS: dict[str, str] = {f.name: f.metadata["shape"] for f in fields(Experience) if "shape" in f.metadata}
"""Column name -> dimension letters."""

NAMES = frozenset({"category"})
"""Columns whose numbers are names: equal or not, without a mean."""

OUTPUTS: dict[str, str] = {"logp": "N T", "entropy": "N T", "value_new": "N T", "score_new": "N"}
"""What a learner's forward may return, with gradient."""


@dataclass(frozen=True)
class Scores:
    """What a scorer returns. A failed score is *missing*, never 0: its row leaves the group statistics and the loss.

    `spans` are character ranges of the response, (row, start, end, value), so a scorer's tokenizer need not be the policy's:
    they say on which part of the response that much of `value` falls; what they do not place falls on its end.
    `reasons` say why a row is missing, where that is known: row -> text. `timing` holds numbers that a repeated run need
    not repeat (seconds, retries, cache hits); they are summed over ranks and logged under `time/`.
    """

    value: Tensor  # [N] float32
    missing: Tensor | None = None  # [N] bool
    components: Mapping[str, Tensor] = field(default_factory=dict)
    spans: Sequence[tuple[int, int, int, float]] | None = None
    reasons: Mapping[int, str] = field(default_factory=dict)
    timing: Mapping[str, float] = field(default_factory=dict)


class Credit(NamedTuple):
    """What a credit rule returns."""

    advantage: Tensor  # [N, T], constant
    returns: Tensor | None = None  # [N, T]


class Selection(NamedTuple):
    """What a select rule returns: the rows to keep (None keeps all), edges over the *kept* rows, and what it counted."""

    keep: Tensor | None = None  # [n] int64
    pairs: Tensor | None = None  # [M, 2] int64
    stats: Mapping[str, float] = {}


class Narrowed(NamedTuple):
    """A selection that also takes tokens out of the mask. A row without any stays in its group's statistics and leaves the loss."""

    mask: Tensor  # [N, T] bool, of all rows
    keep: Tensor | None = None  # [n] int64
    pairs: Tensor | None = None  # [M, 2] int64
    stats: Mapping[str, float] = {}


@dataclass(frozen=True)
class Term:
    """One summand of a loss: an unreduced objective, a weight rule for [N, T] values, and a coefficient."""

    name: str
    objective: Callable[..., Tensor]
    reduce: Callable[..., Tensor] | None = None
    coef: float = 1.0


@dataclass(frozen=True)
class Update:
    """The terms one learner minimises, and the step from which it does."""

    terms: tuple[Term, ...]
    starts_at: int = 0


class Scorer(Protocol):
    """Sees whole groups, so pairwise and listwise judges fit; concurrency is its own affair."""

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores: ...


class Source(Protocol):
    """Where experience comes from: a sampler or a recording. `publish` announces new weights."""

    def __next__(self) -> Experience: ...
    def publish(self, version: int) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Engine(Protocol):
    """A learner with its optimizer, over all processes."""

    def infer(self, exp: Experience, want: frozenset[str]) -> dict[str, Tensor]: ...
    def step(self, exp: Experience, update: Update, *, lr: float) -> dict[str, float]: ...


class Record(Protocol):
    """Where a run writes what happened."""

    def phase(self, name: str) -> Any: ...
    def step(self, step: int, exp: Experience, stats: Mapping[str, Sequence[Mapping[str, float]]]) -> None: ...


def _stay(_: int) -> None:
    pass


@dataclass
class Run:
    """Everything `loop.train` needs, as values. Built by `wiring.make_run`, the one place that sees config and objects."""

    source: Source
    score: Callable[[Experience], Experience]
    select: Callable[[Experience], Experience]
    annotate: Callable[[Experience], Experience]
    shape: Callable[[Experience], Experience]
    credit: Callable[[Experience], Experience]
    engines: Mapping[str, Engine]
    updates: Mapping[str, Update]
    minibatches: Callable[[Experience, int], Iterator[Tensor]]
    lr: Callable[[str, int], float]
    check: Callable[
        [int, Experience, Mapping[str, Sequence[Mapping[str, float]]]], None
    ]  # gates that need a finished step
    after: Callable[[int], bool]  # evaluate, checkpoint; True asks the loop to stop
    record: Record
    start: int
    steps: int
    follow: Callable[[int], None] = (
        _stay  # after that many steps' updates: models that follow the policy take its weights
    )
