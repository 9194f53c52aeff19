"""What every public objective must satisfy, whoever wrote it. A new one is picked up by its name and its YAML.

Each property is a `check_*` function; the last test feeds them objectives that break them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import softplus

import rlhf_cli.objectives as objectives
from rlhf_cli.inject import is_rowwise, needs, rowwise
from rlhf_cli.reduce import sequence_mean
from rlhf_cli.types import COLUMNS, OUTPUTS

SHAPES = COLUMNS | OUTPUTS
SIZE = {"N": 6, "T": 5, "M": 4, "2": 2}
CONF = Path(__file__).parents[1] / "conf" / "objective"
# branches that the options' values do not reach
VARIANTS: dict[str, dict[str, Any]] = {
    "ppo_clip": {"dual_clip": 3.0},
    "clipped_value": {"clip": None},
    "dpo": {"label_smoothing": 0.1},
    "ipo": {"level": "seq_sum"},
}
Columns = dict[str, Tensor]
Objective = Callable[..., Tensor]


def cases() -> dict[str, Objective]:
    """Every option of conf/objective, and its variants, as the functions that a run calls."""
    found: dict[str, Objective] = {}
    for path in sorted(CONF.glob("*.yaml")):
        settings = yaml.safe_load(path.read_text())
        fn = getattr(objectives, settings.pop("_target_").rpartition(".")[2])
        found[path.stem] = partial(fn, **settings)
        if path.stem in VARIANTS:
            found[f"{path.stem}-variant"] = partial(fn, **settings | VARIANTS[path.stem])
    return found


CASES = cases()
each_objective = pytest.mark.parametrize("fn", CASES.values(), ids=CASES.keys())


def test_every_public_objective_has_an_option_of_its_name() -> None:
    assert objectives.__all__ == sorted(objectives.__all__)
    missing = [name for name in objectives.__all__ if name not in CASES]
    assert not missing, f"write conf/objective/NAME.yaml for {missing}"


# -- material ----------------------------------------------------------------------------------------------------------


def make(fn: Objective, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Columns:
    """Random columns for `fn`, always with a mask: ragged, with a hole, with a row without tokens."""
    random = torch.Generator().manual_seed(seed)
    made: Columns = {}
    for name in sorted(needs(fn)):
        shape = [SIZE[letter] for letter in SHAPES[name].split()]
        made[name] = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
        if name.endswith("logp"):
            made[name] = -made[name].abs()
    made["mask"] = torch.arange(SIZE["T"]) < torch.tensor([5, 3, 0, 4, 5, 1])[:, None]
    made["mask"][0, 2] = False
    fixed = {
        "pairs": torch.tensor([[0, 1], [3, 1], [0, 4], [5, 3]]),
        "group": torch.tensor([0, 0, 1, 1, 2, 2]),
        "label": torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], dtype=dtype),
    }
    return made | {k: v for k, v in fixed.items() if k in needs(fn)}


def apply(fn: Objective, columns: Mapping[str, Tensor]) -> Tensor:
    return fn(**{name: columns[name] for name in needs(fn)})


def per_row(name: str) -> bool:
    return SHAPES[name].startswith("N")


def cut(columns: Columns, index: Tensor) -> Columns:
    return {k: v[index] if per_row(k) else v for k, v in columns.items()}


def weights(unreduced: Tensor, mask: Tensor) -> Tensor:
    """Weights of the step, as an engine makes them: from the mask; a mean over rows with tokens; a mean over pairs."""
    if unreduced.ndim == 2:
        return sequence_mean(mask)
    if len(unreduced) == len(mask):
        return mask.any(-1) / mask.any(-1).sum()
    return torch.full_like(unreduced, 1 / len(unreduced))


def loss_and_grads(fn: Objective, columns: Columns) -> tuple[Tensor, Columns]:
    outs = {k: columns[k].detach().requires_grad_() for k in needs(fn) & OUTPUTS.keys()}
    unreduced = apply(fn, columns | outs)
    loss = (unreduced * weights(unreduced, columns["mask"])).sum()
    grads = torch.autograd.grad(loss, list(outs.values()))
    return loss.detach(), dict(zip(outs, grads, strict=True))


# -- properties --------------------------------------------------------------------------------------------------------


def check_signature(fn: Objective) -> None:
    inner = getattr(fn, "func", fn)
    parameters = inspect.signature(inner).parameters
    for name, p in parameters.items():
        assert p.default is inspect.Parameter.empty, f"{name}: defaults live in YAML"
        assert p.annotation is not inspect.Parameter.empty, f"{name}: annotate it"
        assert p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY), f"{name}: no *args or **kwargs"
    unknown = needs(inner) - SHAPES.keys()
    assert not unknown, f"{unknown} are not in the vocabulary"
    assert needs(inner) & OUTPUTS.keys(), "an objective takes at least one output of a learner"


def check_shape(fn: Objective) -> None:
    unreduced = apply(fn, make(fn))
    allowed = [(SIZE["N"], SIZE["T"]), (SIZE["N"],)] + [(SIZE["M"],)] * ("pairs" in needs(fn))
    assert tuple(unreduced.shape) in allowed, f"{tuple(unreduced.shape)} is not unreduced"
    assert unreduced.dtype == torch.float64, "computes in the dtype of its input"


def check_finite(fn: Objective) -> None:
    """In float32, with the policy 80 nats from everything else either way, and values and scores of +-80."""
    for seed in range(3):
        for new, other in ((-80.0, 0.0), (0.0, -80.0), (-80.0, -80.0)):
            columns = make(fn, seed=seed, dtype=torch.float32)
            for name in columns.keys() & SHAPES.keys():
                if name.endswith("logp"):
                    columns[name] = torch.full_like(columns[name], new if name == "logp" else other)
                elif columns[name].is_floating_point() and name != "label":
                    columns[name] = 80 * columns[name].sign()
            loss, grads = loss_and_grads(fn, columns)
            assert loss.isfinite(), f"value at logp {new}, others {other}"
            for name, g in grads.items():
                assert g.isfinite().all(), f"gradient of {name} at logp {new}, others {other}"


def check_masked(fn: Objective) -> None:
    columns = make(fn)
    loss, grads = loss_and_grads(fn, columns)
    outside = ~columns["mask"]
    for name, g in grads.items():
        if SHAPES[name] == "N T":
            assert (g[outside] == 0).all(), f"gradient of {name} outside the mask"
            assert (g[~outside] != 0).any(), f"no gradient of {name} inside the mask"
    other = {
        k: torch.where(outside, -80.0, v) if SHAPES[k] == "N T" and v.is_floating_point() else v
        for k, v in columns.items()
    }
    assert torch.equal(loss_and_grads(fn, other)[0], loss), "what lies outside the mask changes the loss"


def check_permutation(fn: Objective) -> None:
    columns, order = make(fn), torch.tensor([4, 2, 0, 5, 1, 3])
    moved = cut(columns, order)
    if "pairs" in moved:
        moved["pairs"] = order.argsort()[columns["pairs"]]
    before, after = apply(fn, columns), apply(fn, moved)
    expected = before[order] if len(before) == len(order) else before
    assert torch.allclose(after, expected, atol=1e-12), "the order of rows matters"


def coupled(fn: Objective) -> bool:
    """Whether changing row j changes another row's result."""
    columns = make(fn)
    before = apply(fn, columns)
    for j in range(SIZE["N"]):
        changed = {
            k: v.index_copy(0, torch.tensor([j]), -v[j : j + 1] - 1) if per_row(k) and v.is_floating_point() else v
            for k, v in columns.items()
        }
        others = torch.arange(SIZE["N"]) != j
        if not torch.equal(apply(fn, changed)[others], before[others]):
            return True
    return False


def check_rowwise(fn: Objective) -> None:
    if "pairs" in needs(fn):
        assert not is_rowwise(fn), "pairs couple rows"
        return
    if is_rowwise(fn):
        assert not coupled(fn), "promises @rowwise, but a row depends on another one"
    else:
        assert coupled(fn), "no row depends on another one: mark it @rowwise"


def forward(theta: Tensor, x: Tensor, mask: Tensor) -> Columns:
    """A small learner: all outputs from shared parameters, as functions of one row each. x is [N, T, D]."""
    h = (x @ theta).tanh()  # [N, T, 4]
    return {
        "logp": -softplus(h[..., 0]),
        "entropy": softplus(h[..., 1]),
        "value_new": h[..., 2],
        "score_new": (h[..., 3] * mask).sum(-1),
    }


def gradients(fn: Objective) -> dict[str, Tensor]:
    """d loss / d theta unsplit, through cotangents per micro-batch, and in a single pass per micro-batch."""
    columns = make(fn)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(SIZE["N"], SIZE["T"], 3, generator=random, dtype=torch.float64)
    theta = torch.randn(3, 4, generator=random, dtype=torch.float64).requires_grad_()
    parts = torch.arange(SIZE["N"]).split([1, 3, 2])
    wanted = needs(fn) & OUTPUTS.keys()

    def outs_of(index: Tensor) -> Columns:
        made = forward(theta, x[index], columns["mask"][index])
        return {k: made[k] for k in wanted}

    every = torch.arange(SIZE["N"])
    unreduced = apply(fn, columns | outs_of(every))
    w = weights(unreduced, columns["mask"])
    (unsplit,) = torch.autograd.grad((unreduced * w).sum(), theta)

    leaves = {k: v.detach().requires_grad_() for k, v in outs_of(every).items()}
    total = (apply(fn, columns | leaves) * w).sum()
    cotangents = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    exact, single = torch.zeros_like(theta), torch.zeros_like(theta)
    for part in parts:
        partial_sum = sum((o * cotangents[k][part]).sum() for k, o in outs_of(part).items())
        exact = exact + torch.autograd.grad(partial_sum, theta)[0]  # type: ignore[arg-type]
        if is_rowwise(fn):
            rows = apply(fn, cut(columns, part) | outs_of(part))
            single = single + torch.autograd.grad((rows * w[part]).sum(), theta)[0]
    return {"unsplit": unsplit, "exact": exact} | ({"single": single} if is_rowwise(fn) else {})


def check_split(fn: Objective) -> None:
    got = gradients(fn)
    assert got["unsplit"].abs().max() > 1e-6, "no gradient at all"
    for name, g in got.items():
        assert torch.allclose(g, got["unsplit"], rtol=0, atol=1e-10), f"{name} step differs from the unsplit one"


CHECKS = [check_signature, check_shape, check_finite, check_masked, check_permutation, check_rowwise, check_split]


@each_objective
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_objective(check: Callable[[Objective], None], fn: Objective) -> None:
    check(fn)


# -- the checks themselves ---------------------------------------------------------------------------------------------


def defaulted(logp: Tensor, *, beta: float = 0.1) -> Tensor:
    return -beta * logp


def foreign(logp: Tensor, logits: Tensor) -> Tensor:
    return logp - logits


BAD: dict[str, Objective] = {
    "lying": rowwise(lambda logp: -logp * logp.detach().mean(0)),
    "unmarked": lambda logp: -logp,
    "reduced": lambda logp: -logp.mean(),
    "overflowing": rowwise(lambda logp, old_logp: -(2 * (logp - old_logp)).exp()),
    "leaky": lambda logp, pairs: -logp.sum(-1)[pairs[:, 0]],
    "ordered": rowwise(lambda logp: -logp * torch.arange(len(logp))[:, None]),
    "defaulted": defaulted,
    "foreign": foreign,
}


@pytest.mark.parametrize(
    ("bad", "check", "message"),
    [
        ("lying", check_rowwise, "promises @rowwise"),
        ("lying", check_split, "single step differs"),
        ("unmarked", check_rowwise, "mark it @rowwise"),
        ("reduced", check_shape, "is not unreduced"),
        ("overflowing", check_finite, "value at logp 0.0"),
        ("leaky", check_masked, "outside the mask"),
        ("ordered", check_permutation, "the order of rows matters"),
        ("defaulted", check_signature, "beta: defaults live in YAML"),
        ("foreign", check_signature, "not in the vocabulary"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_the_checks_catch(bad: str, check: Callable[[Objective], None], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(BAD[bad])
