"""Other kernels against the packed path they stand for, and what happens to one that is wrong."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from test_packing import causal, forward, ragged, scalar
from torch import Tensor

from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.models import attentions, fused, kernels
from rlhf_cli.models.heads import PolicyHead, ScalarHead
from rlhf_cli.models.kernels import KERNELS, Kernel
from rlhf_cli.models.packing import pack
from rlhf_cli.types import Experience

LOGP = frozenset({"logp"})


def head_of(model: Any) -> PolicyHead:
    return PolicyHead(model, temperature=1.0, packing=True)


def grouped(**changes: Any) -> Experience:
    exp = ragged()
    return replace(exp, **changes)


def bottom_right(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float | None, causal: bool,
) -> Tensor:  # fmt: skip
    """What flash_attn documents: sequence by sequence, causal from the last query and the last key back."""
    assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    spans = [list(zip(c.tolist(), c.tolist()[1:], strict=False)) for c in (cu_seqlens_q, cu_seqlens_k)]
    assert max_seqlen_q == max(b - a for a, b in spans[0]) and max_seqlen_k == max(b - a for a, b in spans[1])
    out = []
    for (a, b), (c, d) in zip(*spans, strict=True):
        several = q.shape[1] // k.shape[1]
        keys, values = (x[c:d].repeat_interleave(several, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * (softmax_scale or q.shape[-1] ** -0.5)
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
    return torch.cat(out)


def truth(exp: Experience, place: Tensor, size: int) -> Tensor:
    """[L, L]: a token sees what stands before it, and itself, in some row that it belongs to."""
    seen = torch.zeros(size, size, dtype=torch.bool)
    for n, length in enumerate(exp.attention.sum(-1).tolist()):
        for i in range(length):
            seen[place[n, i], place[n, : i + 1]] = True
    return seen


@pytest.mark.parametrize("group", [[3, 1, 3, 0, 2, 3, 1, 0], [0, 1, 2, 3, 4, 5, 6, 7]], ids=["shared", "alone"])
def test_the_block_mask_is_the_pack_s(group: list[int]) -> None:
    exp = grouped(group=torch.tensor(group))
    layout = pack(exp.ids, exp.attention, exp.group)
    at = torch.arange(layout.ids.shape[1])
    found = attentions.seen_from(layout)(torch.zeros(()), torch.zeros(()), at[:, None], at[None])
    assert torch.equal(found, truth(exp, layout.place, len(at)))


@pytest.mark.parametrize("group", [[3, 1, 3, 0, 2, 3, 1, 0], [0] * 8], ids=["prefixes", "none in common"])
def test_flex_attention_gives_the_packed_log_probs(group: list[int]) -> None:
    exp = grouped(group=torch.tensor(group))
    model = causal()
    with torch.no_grad():
        wanted = forward(head_of(model), exp, LOGP)["logp"]
        KERNELS["flex"].install(model)
        assert model.config._attn_implementation == attentions.FLEX
        found = forward(head_of(model), exp, LOGP)["logp"]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("make", [causal, scalar], ids=["policy", "value"])
@pytest.mark.parametrize("group", [[3, 1, 3, 0, 2, 3, 1, 0], [0] * 8], ids=["prefixes", "none in common"])
def test_sequences_give_the_packed_outputs_and_gradients(
    make: Callable[[], Any], group: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    exp = grouped(group=torch.tensor(group))
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return bottom_right(*args, **kwargs)

    monkeypatch.setattr(attentions, "_flash", lambda: counted)
    model = make()
    head, want = (
        (head_of(model), LOGP) if make is causal else (ScalarHead(model, packing=True), frozenset({"value_new"}))
    )
    notes: list[str] = []
    assert kernels.use(head, ["flash"], lambda: exp, want, notes.append) == ["flash"], notes
    assert len(calls) == model.config.num_hidden_layers
    assert "outputs differ from the plain path's by" in notes[0]


def test_liger_s_functions_go_where_ours_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """With functions of the same arguments in the place of Liger's: what is replaced, and that undoing restores it."""
    calls: list[str] = []

    def liger_rms_norm(X: Tensor, W: Tensor, eps: float, in_place: bool = True) -> Tensor:
        calls.append("norm")
        assert not in_place
        return W * X * (X.pow(2).mean(-1, keepdim=True) + eps).rsqrt()

    def liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
        calls.append("gated")
        return torch.nn.functional.silu(a) * b

    functional = ModuleType("liger_kernel.transformers.functional")
    functional.__dict__.update(liger_rms_norm=liger_rms_norm, liger_swiglu=liger_swiglu)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    model = causal()
    assert fused.install(model) == 7  # two layers: two norms and a gated layer each, and the last norm
    head, exp, notes = head_of(model), ragged(), []
    assert kernels.use(head, ["liger"], lambda: exp, LOGP, notes.append) == ["liger"], notes
    assert (calls.count("norm"), calls.count("gated")) == (5, 2)
    other = causal()
    fused.install(other)
    KERNELS["liger"].install(other)()
    ours = [m.forward.__func__ for m in other.modules() if "forward" in vars(m)]
    assert (ours.count(fused._norm), ours.count(fused._gated)) == (5, 2)


class Scaled:
    """A kernel that multiplies the outputs of the first layer's attention; 1 is right."""

    def __init__(self, factor: float) -> None:
        self.factor, self.undone = factor, 0

    def __call__(self, model: Any) -> Callable[[], None]:
        hook = model.model.layers[0].mlp.register_forward_hook(lambda m, a, y: y * self.factor)

        def undo() -> None:
            self.undone += 1
            hook.remove()

        return undo


def broken(model: Any) -> Callable[[], None]:
    raise RuntimeError("no compiler\nhere")


def test_a_kernel_that_differs_or_fails_is_undone_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = Scaled(1.0), Scaled(1.01)
    made = {"right": Kernel(right, "", "a"), "wrong": Kernel(wrong, "", "b"), "broken": Kernel(broken, "", "c")}
    monkeypatch.setattr(kernels, "KERNELS", made)
    head, exp, notes = head_of(causal()), ragged(), []
    before = forward(head, exp, LOGP)["logp"]
    assert kernels.use(head, list(made), lambda: exp, LOGP, notes.append) == ["right"]
    assert (right.undone, wrong.undone) == (0, 1)
    assert notes[0] == "model.kernels: right: outputs differ from the plain path's by 0.0e+00, gradients by 0.0e+00"
    assert notes[1].startswith("model.kernels: wrong is not used: outputs differ by ") and "(allowed 1e-06)" in notes[1]
    assert notes[2] == "model.kernels: broken is not used: RuntimeError: no compiler here; the plain path is"
    assert torch.equal(forward(head, exp, LOGP)["logp"], before)


def test_what_one_rank_refuses_no_rank_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Scaled(1.0)
    monkeypatch.setattr(kernels, "KERNELS", {"right": Kernel(right, "", "a")})
    notes: list[str] = []
    exp = ragged()
    assert kernels.use(head_of(causal()), ["right"], lambda: exp, LOGP, notes.append, lambda own: True) == []
    assert right.undone == 1
    assert notes == ["model.kernels: right is not used: another rank refuses it; the plain path is"]


def test_a_kernel_right_forward_and_wrong_backward_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def install(model: Any) -> Callable[[], None]:
        return model.model.layers[0].mlp.register_full_backward_hook(lambda m, a, b: (a[0] * 2,)).remove

    monkeypatch.setattr(kernels, "KERNELS", {"half": Kernel(install, "", "a")})
    notes: list[str] = []
    exp = ragged()
    assert kernels.use(head_of(causal()), ["half"], lambda: exp, LOGP, notes.append) == []
    assert "half is not used: outputs differ by 0.0e+00" in notes[0]


def test_flex_attention_says_that_it_cannot_train_on_a_cpu() -> None:
    notes: list[str] = []
    exp, model = ragged(), causal()
    assert kernels.use(head_of(model), ["flex"], lambda: exp, LOGP, notes.append) == []
    assert notes[0].startswith("model.kernels: flex is not used: ") and notes[0].endswith("; the plain path is")
    assert model.config._attn_implementation != attentions.FLEX
    frozen = head_of(model).requires_grad_(False)
    assert kernels.use(frozen, ["flex"], lambda: exp, LOGP, notes.append) == ["flex"], "a reference has no gradient"


def test_no_kernel_asks_for_no_rows() -> None:
    assert kernels.use(None, [], lambda: pytest.fail("rows were made"), LOGP, lambda _: None) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.kernels=[flexx]"], "model.kernels=[flexx]: no such kernel; did you mean 'flex'? kernels: flex, flash, liger, compile"),
        (["model.kernels=[liger]", "hardware=cpu"], "model.kernels=[liger]: needs an NVIDIA GPU, and hardware.device is cpu; leave it out"),
        (["model.kernels=[compile]", "hardware.zero=3"],
         "model.kernels=[compile]: needs whole weights, and hardware.zero=3 shards them; leave it out"),
        (["model.kernels=[flex,flash]"], "model.kernels=[flash]: flex replaces the attention already; choose one of the two"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(words: list[str], message: str) -> None:
    from rlhf_cli.plan import validate

    with pytest.raises(ConfigError) as e:
        validate(compose("train", words, None))
    assert str(e.value) == message


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_cli.plan import validate

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "flash_attn" else found(name, *a))
    with pytest.raises(
        ConfigError, match=r"^model.kernels=\[flash\]: flash_attn is not installed; type: pip install -e '.\[flash\]'$"
    ):
        validate(compose("train", ["model.kernels=[flash]", "hardware=gpu"], None))


@pytest.mark.slow
def test_compiled_layers_give_the_packed_outputs_and_gradients() -> None:
    """Needs a C++ compiler; without one the plain path goes on, which the note says."""
    notes: list[str] = []
    exp, model = ragged(), causal().float()
    kept = kernels.use(head_of(model), ["compile"], lambda: exp, LOGP, notes.append)
    assert kept == ["compile"] or "is not used" in notes[0], notes
    assert all((m._compiled_call_impl is not None) == bool(kept) for m in model.model.layers)
