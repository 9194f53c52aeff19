"""The exact step against one backward pass over everything, in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from rlhf_cli import pulse
from rlhf_cli.engine import step as exact
from rlhf_cli.inject import call, rowwise
from rlhf_cli.models.heads import stage_inputs
from rlhf_cli.models.packing import packed_size
from rlhf_cli.objectives import bradley_terry, dpo, kl_k3, nll, ppo_clip, sequence_ratio_clip
from rlhf_cli.reduce import sequence_mean, token_mean
from rlhf_cli.types import Experience, Term

N, T, V = 9, 8, 11


def experience(**changes: Any) -> Experience:
    """Ragged rows in four groups, pairs within and across them, one row without trained tokens."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (N, T), generator=g)
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 7])
    for k in group.unique():
        ids[group == k, :2] = ids[group == k][:1, :2]
    attention = torch.arange(T) < torch.tensor([8, 5, 6, 3, 7, 4, 8, 6, 5])[:, None]
    mask = attention & (torch.arange(T) >= 2)
    mask[4] = False

    def noise() -> Tensor:
        return torch.randn(N, T, generator=g, dtype=torch.float64) * mask

    columns: dict[str, Any] = {
        "ids": ids * attention, "attention": attention, "mask": mask, "group": group,
        "pairs": torch.tensor([[0, 6], [1, 8], [3, 5], [7, 2], [0, 3], [8, 0], [2, 5], [6, 7]]),  # most straddle groups, so micro-batches
        "old_logp": -1 + 0.3 * noise(), "ref_logp": -1 + 0.3 * noise(), "advantage": noise(),
    }  # fmt: skip
    return Experience(**(columns | changes))


class Model:
    """A number per (token, previous tokens), differentiable in `w`; counts its forwards."""

    def __init__(self) -> None:
        self.w = torch.randn(V, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        self.calls: list[list[int]] = []

    def forward(self, exp: Experience, rows: Tensor) -> dict[str, Tensor]:
        self.calls.append(rows.tolist())
        x = stage_inputs(exp, rows)
        h = (self.w[x["ids"]] * x["attention"]).cumsum(-1)
        return {"logp": -softplus(h) * x["mask"], "score_new": (h * x["mask"]).sum(-1)}

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def grad(self) -> Tensor:
        assert self.w.grad is not None
        return self.w.grad


def unsplit(terms: tuple[Term, ...], exp: Experience) -> Tensor:
    """The gradient by definition: all rows at once, each term reduced as its formula says."""
    model = Model()
    outs = model.forward(exp, torch.arange(N))
    if exp.old_logp is None:
        outs["old_logp"] = outs["logp"].detach()
    total = torch.zeros((), dtype=torch.float64)
    for term in terms:
        x = call(term.objective, exp, outs)
        if term.reduce is not None:
            value = (call(term.reduce, exp).double() * x).sum()
        elif "pairs" in term.objective.func.__code__.co_varnames:  # type: ignore[attr-defined]
            value = sum(x[m] * (1.0 if exp.pair_weight is None else exp.pair_weight[m]) for m in range(len(x))) / len(x)
        else:
            value = x[exp.mask.any(-1)].mean()
        total = total + term.coef * value
    total.backward()
    return model.grad()


surrogate = partial(ppo_clip, eps_low=0.2, eps_high=0.3, dual_clip=None)
ROWWISE = {
    "tokens": (Term("pg", surrogate, sequence_mean), Term("kl", partial(kl_k3), token_mean, 0.3)),
    "rows": (Term("gspo", partial(sequence_ratio_clip, level="seq_mean", eps_low=0.2, eps_high=0.2)),),
    "likelihood": (Term("nll", partial(nll), token_mean, 2.0),),
}
COUPLED = {
    "dpo": (Term("dpo", partial(dpo, beta=0.3, label_smoothing=0.1)),),
    "reward": (Term("bt", partial(bradley_terry, label_smoothing=0.0)),),
    "both": (Term("dpo", partial(dpo, beta=0.3, label_smoothing=0.0), None, 0.5), Term("pg", surrogate, token_mean)),
}
each_budget = pytest.mark.parametrize("budget", [1, 9, 17, 30, 1000])


def run_single(
    terms: tuple[Term, ...], exp: Experience, plans: list[list[Tensor | None]]
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The sum of what every rank would contribute."""
    model = Model()
    outs = [exact.single_pass(terms, exp, batches, model.forward, model.backward) for batches in plans]
    return model.grad(), outs


def run_two(terms: tuple[Term, ...], exp: Experience, plans: list[list[Tensor | None]]) -> Tensor:
    model = Model()
    parts = [exact.infer(exp, batches, model.forward) for batches in plans]
    outs = {k: torch.stack([p[k] for p in parts]).sum(0) for k in parts[0] if k in exact.wanted(terms)}
    for batches in plans:
        exact.two_pass(terms, exp, outs, batches, model.forward, model.backward)
    return model.grad()


@each_budget
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", ROWWISE)
def test_rowwise_terms_have_one_gradient_however_split(name: str, world: int, budget: int) -> None:
    terms, exp = ROWWISE[name], experience()
    plans = exact.micro_batches(exp, world, budget, True)
    assert exact.single_pass_is_exact(terms)
    wanted = unsplit(terms, exp)
    assert wanted.abs().max() > 1e-3
    single, outs = run_single(terms, exp, plans)
    torch.testing.assert_close(single, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(run_two(terms, exp, plans), wanted, rtol=0, atol=1e-10)
    full = Model().forward(exp, torch.arange(N))
    torch.testing.assert_close(sum(o["logp"] for o in outs), full["logp"].detach(), rtol=0, atol=1e-12)


@each_budget
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", COUPLED)
def test_pairs_that_straddle_micro_batches_keep_their_gradient(name: str, world: int, budget: int) -> None:
    terms, exp = COUPLED[name], experience()
    assert not exact.single_pass_is_exact(terms)
    torch.testing.assert_close(
        run_two(terms, exp, exact.micro_batches(exp, world, budget, True)), unsplit(terms, exp), rtol=0, atol=1e-10
    )


def test_a_single_pass_would_be_wrong_for_pairs() -> None:
    """The bed can tell: with one row per micro-batch no pair survives inside one."""
    exp = experience()
    liar = rowwise(
        lambda logp, ref_logp, mask, pairs: -logsigmoid((((logp - ref_logp) * mask).sum(-1))[pairs].diff(dim=-1)[:, 0])
    )
    with pytest.raises(ValueError, match=r"term liar: the objective gives \[0\], its reduction \[1\]"):
        run_single((Term("liar", liar),), exp, exact.micro_batches(exp, 1, 1, True))


@pytest.mark.parametrize("single", [True, False])
def test_an_on_policy_step_takes_old_logp_from_its_own_pass(single: bool) -> None:
    terms, exp = ROWWISE["tokens"], experience(old_logp=None)
    plans = exact.micro_batches(exp, 2, 9, True)
    found = run_single(terms, exp, plans)[0] if single else run_two(terms, exp, plans)
    torch.testing.assert_close(found, unsplit(terms, exp), rtol=0, atol=1e-10)


def test_fillers_run_and_contribute_exactly_nothing() -> None:
    exp, terms = experience(), ROWWISE["tokens"]
    whole: list[Tensor | None] = [torch.arange(N)]
    plain, filled = run_single(terms, exp, [whole])[0], run_single(terms, exp, [[*whole, None, None]])[0]
    assert torch.equal(plain, filled)
    assert torch.equal(run_two(terms, exp, [whole]), run_two(terms, exp, [[None, *whole, None]]))
    model = Model()
    outs = exact.single_pass(terms, exp, [None], model.forward, model.backward)
    assert not model.grad().any() and model.calls == [[0]]
    assert set(outs) == {"logp", "score_new"} and not any(v.any() for v in outs.values()), (
        "ranks sum their columns, so all have them"
    )
    idle = exact.infer(exp, [None], model.forward)
    assert set(idle) == {"logp", "score_new"} and not any(v.any() for v in idle.values())


def test_the_last_micro_batch_is_told_so() -> None:
    told: list[bool] = []
    model = Model()
    batches: list[Tensor | None] = [torch.arange(4), torch.arange(4, N), None]
    exact.single_pass(ROWWISE["rows"], experience(), batches, model.forward, lambda loss, last: told.append(last))
    exact.two_pass(
        COUPLED["dpo"], experience(), {"logp": Model().forward(experience(), torch.arange(N))["logp"]}, batches, model.forward,
        lambda loss, last: told.append(last),
    )  # fmt: skip
    assert told == [False, False, True] * 2


def test_every_micro_batch_is_a_sign_of_life() -> None:
    heard: list[int] = []
    batches: list[Tensor | None] = [torch.arange(4), torch.arange(4, N), None]
    pulse.listen(lambda: heard.append(1))
    try:
        run_single(ROWWISE["rows"], experience(), [batches])
        assert len(heard) == 3
        run_two(COUPLED["dpo"], experience(), [batches])
        assert len(heard) == 3 + 3 + 3, "outputs, then gradients"
    finally:
        pulse.listen(None)


def test_pair_weights_multiply_and_the_mean_stays_over_pairs() -> None:
    """(w * loss).sum() / M: weights 2, 0 and 1 on losses softplus(0) = log 2 give (2 + 0 + 1) / 3 log 2."""
    flat = torch.zeros(2, 3, dtype=torch.float64)
    exp = Experience(
        ids=torch.ones(2, 3, dtype=torch.int64), mask=torch.ones(2, 3, dtype=torch.bool), ref_logp=flat,
        pairs=torch.tensor([[0, 1], [1, 0], [0, 1]]), pair_weight=torch.tensor([2.0, 0.0, 1.0]),
    )  # fmt: skip
    term = Term("dpo", partial(dpo, beta=1.0, label_smoothing=0.0), None, 10.0)
    w = exact.weights_of(term, exp)
    torch.testing.assert_close(w, torch.tensor([2 / 3, 0.0, 1 / 3]))
    loss = exact.term_losses([term], exp, {"logp": flat}, [w])["dpo"]
    assert loss.item() == pytest.approx(10 * 0.6931471805599453, rel=1e-6)


@pytest.mark.parametrize("name", COUPLED)
def test_pair_weights_survive_the_split(name: str) -> None:
    exp = experience(pair_weight=torch.tensor([2.0, 0.0, 1.0, 0.5, 3.0, 1.0, 0.0, 4.0]))
    terms = COUPLED[name]
    torch.testing.assert_close(
        run_two(terms, exp, exact.micro_batches(exp, 2, 9, True)), unsplit(terms, exp), rtol=0, atol=1e-10
    )


def test_a_mean_over_rows_leaves_out_rows_without_trained_tokens() -> None:
    w = exact.weights_of(ROWWISE["rows"][0], experience())
    assert w[4] == 0 and torch.allclose(w[[0, 8]], torch.tensor(1 / 8))


def test_a_reduction_of_another_shape_is_refused() -> None:
    exp = experience()
    term = Term("odd", partial(dpo, beta=1.0, label_smoothing=0.0), token_mean)
    with pytest.raises(ValueError, match=r"term odd: the objective gives \[8\], its reduction \[9, 8\]"):
        run_two((term,), exp, [[torch.arange(N)]])


# -- micro-batches -----------------------------------------------------------------------------------------------------


def cost(exp: Experience, rows: Tensor, packed: bool) -> int:
    if not packed:
        return len(rows) * int(exp.attention[rows].sum(-1).max())
    parts = [rows[exp.group[rows] == g] for g in exp.group[rows].unique()]
    return sum(packed_size(exp.ids[p], exp.attention[p]) for p in parts)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("world", [1, 2, 5])
@each_budget
def test_every_row_once_and_every_rank_as_often(world: int, budget: int, packed: bool) -> None:
    exp = experience()
    plans = exact.micro_batches(exp, world, budget, packed)
    assert len(plans) == world and len({len(p) for p in plans}) == 1
    rows = [r for p in plans for batch in p if batch is not None for r in batch.tolist()]
    assert sorted(rows) == list(range(N))


@pytest.mark.parametrize("world", [1, 2])
@each_budget
def test_the_budget_holds_unless_one_row_exceeds_it(world: int, budget: int) -> None:
    exp = experience()
    for batch in (b for p in exact.micro_batches(exp, world, budget, True) for b in p if b is not None):
        assert len(batch) == 1 or cost(exp, batch, True) <= budget


@pytest.mark.parametrize("world", [1, 2])
def test_groups_stay_whole_when_they_fit(world: int) -> None:
    exp = experience()
    budget = max(cost(exp, (exp.group == g).nonzero().flatten(), True) for g in exp.group.unique())
    for batch in (b for p in exact.micro_batches(exp, world, budget, True) for b in p if b is not None):
        for g in exp.group[batch].unique():
            assert (exp.group[batch] == g).sum() == (exp.group == g).sum(), f"group {int(g)} was cut"


def test_a_group_that_does_not_fit_is_cut_and_ranks_share_the_load() -> None:
    exp = experience()
    assert cost(exp, torch.tensor([0, 1, 2]), True) > 11
    assert not any({0, 1, 2} <= set(b.tolist()) for b in exact.micro_batches(exp, 1, 11, True)[0] if b is not None)
    load = [sum(cost(exp, b, True) for b in p if b is not None) for p in exact.micro_batches(exp, 2, 1000, True)]
    assert max(load) < 0.65 * sum(load)


def test_collect_places_cut_rows_and_zeroes_the_rest() -> None:
    exp = experience()
    found = [(torch.tensor([3]), {"logp": torch.ones(1, 3), "score_new": torch.tensor([5.0])})]
    out = exact.collect(found, exp)
    assert out["logp"].shape == (N, T) and out["logp"].sum() == 3 and out["logp"][3, :3].all()
    assert out["score_new"].tolist() == [0, 0, 0, 5, 0, 0, 0, 0, 0]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NO GPU: mixing its outputs with experience on the CPU is not tested"
)
@pytest.mark.parametrize("single", [True, False])
def test_outputs_on_a_gpu_meet_experience_on_the_cpu(single: bool) -> None:
    terms, exp = ROWWISE["tokens"], experience()
    model = Model()
    model.w = model.w.detach().cuda().requires_grad_()

    def forward(e: Experience, rows: Tensor) -> dict[str, Tensor]:
        x = {k: v.cuda() for k, v in stage_inputs(e, rows).items()}
        return {"logp": -softplus((model.w[x["ids"]] * x["attention"]).cumsum(-1)) * x["mask"]}

    batches = exact.micro_batches(exp, 1, 9, True)[0]
    if single:
        exact.single_pass(terms, exp, batches, forward, model.backward)
    else:
        exact.two_pass(terms, exp, exact.infer(exp, batches, forward), batches, forward, model.backward)
    torch.testing.assert_close(model.grad().cpu(), unsplit(terms, exp), rtol=0, atol=1e-10)


def test_infer_leaves_no_graph() -> None:
    make: Callable[..., dict[str, Tensor]] = Model().forward
    assert not exact.infer(experience(), [torch.arange(N)], make)["logp"].requires_grad
