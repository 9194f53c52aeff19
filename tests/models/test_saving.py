"""Activations that are made again: the same gradients, from less that is kept."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from test_packing import ragged
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from rlhf_cli.models import fused, packing, saving
from rlhf_cli.models.heads import PolicyHead, stage_inputs
from rlhf_cli.models.tiny import tiny_causal


class Squared(torch.autograd.Function):
    """x * x, cheap to make again; counts how often it is."""

    made = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)

        def make() -> Tensor:
            Squared.made += 1
            return x * x

        return saving.cheap(x * x, make)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * grad


def test_one_recipe_serves_every_use_and_every_view() -> None:
    x = torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3).requires_grad_()
    w = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    Squared.made = 0
    with saving.recipes():
        y = Squared.apply(x)
        out = (y @ w).sum() + (y.t()[1:] * w[1:]).sum()  # the whole, and a transposed part
    del y
    out.backward()
    assert Squared.made == 1
    # of the first product the sums of columns of x * x; of the second the rows 1 and 2 of its transpose
    wanted = torch.tensor([[17.0, 17], [29, 29], [45, 45]]).double()
    wanted[1:] += torch.tensor([[4.0, 25], [9, 36]])
    assert torch.equal(w.grad, wanted)  # type: ignore[arg-type]
    assert torch.equal(x.grad, 2 * x.detach() * torch.tensor([[2.0, 3, 3], [2, 3, 3]]))  # type: ignore[arg-type]


def test_a_second_backward_pass_makes_it_again() -> None:
    x, w = (torch.tensor([[2.0]], requires_grad=True) for _ in range(2))
    Squared.made = 0
    with saving.recipes():
        out = Squared.apply(x) @ w
    out.backward(retain_graph=True)
    out.backward()
    assert Squared.made == 2 and w.grad is not None and float(w.grad) == 8  # 4 each time


def test_memory_that_was_given_back_is_nobodys_recipe() -> None:
    """The next tensor often lies where a dead one lay."""
    w = torch.ones(64, 64, requires_grad=True)
    with saving.recipes(), torch.no_grad():
        for i in range(20):
            saving.cheap(torch.full((64, 64), -1.0), lambda: torch.full((64, 64), -1.0))
            with torch.enable_grad():
                out = (torch.full((64, 64), float(i)) * w).sum()
            assert float(torch.autograd.grad(out, w)[0][0, 0]) == i


def test_what_was_changed_in_place_is_kept_as_it_is_or_refused() -> None:
    x, w = (torch.full((1, 1), 2.0, requires_grad=True) for _ in range(2))
    with saving.recipes():
        changed = Squared.apply(x).mul_(3) @ w  # 12, not the 4 that the recipe makes
        other = x * 1
        late = other @ w
    assert float(torch.autograd.grad(changed, w)[0]) == 12
    with torch.no_grad():
        other.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        late.backward()


def test_a_forward_pass_without_its_backward_pass_is_forgotten() -> None:
    x = torch.ones(4, requires_grad=True)
    with saving.recipes():
        y = x.exp()  # saves its own result
    storage = StorageWeakRef(y.untyped_storage())
    del y
    gc.collect()
    assert storage.expired()


def test_without_gradients_or_outside_nothing_is_remembered() -> None:
    with torch.no_grad(), saving.recipes():
        assert saving._known.get() is None
    x = torch.ones(2, 2)
    assert saving.cheap(x, lambda: x) is x


def test_a_norm_that_zero_3_shards_is_kept() -> None:
    x, weight, w = torch.ones(2, 4, requires_grad=True), torch.full((4,), 2.0), torch.ones(4, 4, requires_grad=True)
    weight.ds_id = 0  # type: ignore[attr-defined]
    with saving.recipes():
        out = fused.RMSNorm.apply(x, weight, 0.0) @ w
    weight.data = torch.empty(0)  # given back between the passes
    assert torch.equal(torch.autograd.grad(out.sum(), w)[0], torch.full((4, 4), 4.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_keeps_a_third_less_and_the_same_gradients(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    packing.register()
    found = []
    for on in (False, True):
        model = tiny_causal(0, dtype)
        model.config._attn_implementation = packing.ATTENTION
        fused.install(model)
        if not on:
            for module in (fused, packing):
                monkeypatch.setattr(module, "cheap", lambda x, make: x)
        head, exp, kept = PolicyHead(model, temperature=1.0, packing=True), ragged(), {}
        keep, own = saving._keep, {p.untyped_storage()._cdata for p in model.parameters()}

        def watch(x: Tensor, keep: Any = keep, own: Any = own, kept: Any = kept) -> Any:
            it = keep(x)
            storage = x.untyped_storage()
            if not isinstance(it, saving.Saved) and storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return it

        with monkeypatch.context() as m:
            m.setattr(saving, "_keep", watch)
            logp = head(**stage_inputs(exp, torch.arange(len(exp))), want=frozenset({"logp"}))["logp"]
        (logp * torch.linspace(-1, 1, logp.numel()).view(logp.shape)).sum().backward()
        found.append((logp.detach(), [p.grad for p in model.parameters()], sum(kept.values())))
        monkeypatch.undo()
    (plain, gradients, whole), (ours, again, less) = found
    assert torch.equal(plain, ours) and len(gradients) > 10
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    assert less < 0.75 * whole
