"""Packed rows against each row alone through the plain model, in float64; and the gate that watches the difference."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM

from rlhf_cli.engine import step as exact
from rlhf_cli.errors import GateError
from rlhf_cli.models import heads, packing
from rlhf_cli.models.heads import PolicyHead, ScalarHead, stage_inputs
from rlhf_cli.models.packing import ATTENTION, Pack, pack, packed_size, shifted
from rlhf_cli.models.tiny import tiny_causal, tiny_scalar
from rlhf_cli.probe import check_invariance
from rlhf_cli.types import Experience

LOGP = frozenset({"logp", "entropy"})


def ragged() -> Experience:
    """Groups out of order: three ragged rows behind a prefix, identical rows, a row that another begins with, a lone row."""
    g = torch.Generator().manual_seed(0)
    group = torch.tensor([3, 1, 3, 0, 2, 3, 1, 0])
    lengths = torch.tensor([10, 9, 7, 6, 8, 14, 9, 11])
    ids = torch.randint(0, 250, (8, 14), generator=g)
    ids[[2, 5], :5] = ids[0, :5]
    ids[6] = ids[1]
    ids[7, :6] = ids[3, :6]
    attention = torch.arange(14) < lengths[:, None]
    mask = attention & (torch.arange(14) >= 4)
    mask[0, 6] = False  # a hole
    return Experience(ids=ids * attention, attention=attention, mask=mask, group=group)


def causal() -> Any:
    packing.register()
    model = tiny_causal(0, torch.float64)
    model.set_attn_implementation(ATTENTION)
    return model


def scalar() -> Any:
    packing.register()
    model = tiny_scalar(0, torch.float64)
    torch.nn.init.normal_(model.score.weight.data, generator=torch.Generator().manual_seed(1))
    model.set_attn_implementation(ATTENTION)
    return model


def forward(head: Any, exp: Experience, want: frozenset[str]) -> dict[str, Tensor]:
    return head(exp.ids, exp.attention, exp.mask, exp.group, want)


def alone(model: Any, exp: Experience, temperature: float) -> dict[str, Tensor]:
    """log-probs and entropy, each row through the whole model by itself, with the textbook shift."""
    logp, entropy = torch.zeros(exp.ids.shape, dtype=torch.float64), torch.zeros(exp.ids.shape, dtype=torch.float64)
    for i, n in enumerate(exp.attention.sum(-1).tolist()):
        p = (model(input_ids=exp.ids[i : i + 1, :n]).logits[0] / temperature).log_softmax(-1)  # [n, V]
        logp[i, 1:n] = p[:-1].gather(1, exp.ids[i, 1:n, None]).squeeze(1)
        entropy[i, 1:n] = -(p.exp() * p).sum(-1)[:-1]
    return {"logp": logp * exp.mask, "entropy": entropy * exp.mask}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_entropy_and_gradients_are_those_of_each_row_alone(
    packed: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "CHUNK", 7)  # several chunks, the last one short
    model, exp = causal(), ragged()
    weight = torch.randn(exp.ids.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = forward(PolicyHead(model, temperature=temperature, packing=packed), exp, LOGP)
    wanted = alone(model, exp, temperature)
    parameters = list(model.parameters())
    for name in ("logp", "entropy"):
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-10)
        a = torch.autograd.grad((found[name] * weight).sum(), parameters, retain_graph=True)
        b = torch.autograd.grad((wanted[name] * weight).sum(), parameters, retain_graph=True)
        for x, y in zip(a, b, strict=True):
            # transformers normalises in float32 whatever the weights, so sums over a shared prefix round there
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_only_the_wanted_outputs_come_back() -> None:
    exp, head = ragged(), PolicyHead(causal(), temperature=1.0, packing=True)
    assert set(forward(head, exp, frozenset({"logp"}))) == {"logp"}
    assert set(forward(head, exp, frozenset({"entropy"}))) == {"entropy"}


def test_rows_without_trained_tokens_give_zeros_that_carry_gradient() -> None:
    exp = ragged()
    exp = replace(exp, mask=torch.zeros_like(exp.mask))
    out = forward(PolicyHead(causal(), temperature=1.0, packing=True), exp, LOGP)
    assert not out["logp"].any() and not out["entropy"].any() and out["logp"].requires_grad


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_values_are_read_before_their_token_and_scores_at_the_last_one(packed: bool) -> None:
    model, exp = scalar(), ragged()
    out = forward(ScalarHead(model, packing=packed), exp, frozenset({"value_new", "score_new"}))
    for i, n in enumerate(exp.attention.sum(-1).tolist()):
        number = model.score(model.model(input_ids=exp.ids[i : i + 1, :n]).last_hidden_state)[0, :, 0]  # [n]
        assert torch.allclose(out["score_new"][i], number[n - 1], atol=1e-10)
        for t in range(exp.ids.shape[1]):
            wanted = number[t - 1] if exp.mask[i, t] else torch.zeros((), dtype=torch.float64)
            assert torch.allclose(out["value_new"][i, t], wanted, atol=1e-10), (i, t)


def test_a_pack_holds_every_token_once_per_group() -> None:
    exp = ragged()
    layout = pack(exp.ids, exp.attention, exp.group)
    # prefixes: group 0 shares 6, 1 shares all 9, 2 is one row of 8, 3 shares 5; suffixes 5 + 0 + 0 + (5 + 2 + 9)
    assert layout.ids.shape[1] == 6 + 5 + 9 + 8 + 5 + 16
    assert torch.equal(layout.ids[0][layout.place][exp.attention], exp.ids[exp.attention])
    where = torch.arange(exp.ids.shape[1]).expand_as(exp.ids)
    assert torch.equal(layout.positions[0][layout.place][exp.attention], where[exp.attention])
    parts = [exp.group == g for g in torch.unique(exp.group)]
    assert [packed_size(exp.ids[p], exp.attention[p]) for p in parts] == [11, 9, 8, 21]
    assert sum(packed_size(exp.ids[p], exp.attention[p]) for p in parts) == layout.ids.shape[1]


def test_the_shift_moves_one_token_and_column_0_has_no_predictor() -> None:
    assert shifted(torch.tensor([[4, 5, 6], [4, 7, 0]])).tolist() == [[0, 4, 5], [0, 4, 7]]


def test_without_a_layout_the_registered_attention_is_plain_sdpa() -> None:
    model, exp = causal(), ragged()
    ids = exp.ids[:1, :10]
    mine = model(input_ids=ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(mine, model(input_ids=ids).logits, rtol=0, atol=1e-5)  # its softmax is float32


# -- the gate ----------------------------------------------------------------------------------------------------------


def engine_of(head: Any) -> Any:
    """What `check_invariance` takes of an engine."""

    def infer(exp: Experience, want: frozenset[str]) -> dict[str, Tensor]:
        batches = exact.micro_batches(exp, 1, 10_000, head.packing)[0]
        return exact.infer(exp, batches, lambda e, rows: head(**stage_inputs(e, rows), want=want))

    return SimpleNamespace(module=head, infer=infer, comm=SimpleNamespace(device=torch.device("cpu")))


def see(layout: Pack, **changed: Any) -> Pack:
    """The same pack with other masks, made at first use."""
    return replace(layout, masks={}, **changed)


def foreign_suffixes(layout: Pack) -> Pack:
    """Every suffix token reads the tokens of the next row's suffix instead of its own."""
    return see(layout, suffix=layout.suffix.roll(1, 0))


def foreign_prefixes(layout: Pack) -> Pack:
    """Every suffix looks at the prefix of another group."""
    return see(layout, owner=layout.owner.roll(1))


def running_positions(layout: Pack) -> Pack:
    """Rows do not restart their positions behind the prefix."""
    return replace(layout, positions=torch.arange(layout.ids.shape[1])[None])


def test_the_gate_is_silent_on_correct_packing_and_puts_the_switch_back() -> None:
    head = PolicyHead(causal(), temperature=1.0, packing=True)
    assert check_invariance(engine_of(head), ragged(), "logp", 1e-9, rows=8) < 1e-9
    assert head.packing


@pytest.mark.parametrize("broken", [foreign_suffixes, foreign_prefixes, running_positions], ids=lambda f: f.__name__)
def test_the_gate_trips_on_a_corrupted_layout(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "pack", lambda *a: broken(pack(*a)))
    trips()


def test_the_gate_trips_on_a_corrupted_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suffix tokens see their own future."""
    mask = packing._mask
    monkeypatch.setattr(packing, "_mask", lambda *a: mask(*a).nan_to_num(neginf=0.0) if a[1] == "suffix" else mask(*a))
    trips()


def test_the_gate_trips_on_logits_that_the_head_does_not_know_how_to_scale() -> None:
    config = GraniteConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logits_scaling=4.0,
    )
    model = GraniteForCausalLM(config).double().eval()
    with pytest.raises(GateError, match=r"attention or output layer does not fit"):
        check_invariance(engine_of(PolicyHead(model, temperature=1.0, packing=False)), ragged(), "logp", 1e-3, rows=8)


def trips() -> None:
    head = PolicyHead(causal(), temperature=1.0, packing=True)
    with pytest.raises(
        GateError, match=r"log-probs change by .* nats a token when rows go through the model alone"
    ) as e:
        check_invariance(engine_of(head), ragged(), "logp", 1e-3, rows=8)
    assert "gates.invariance=0.001" in str(e.value) and str(e.value).endswith(
        "set model.packing=false, or use another model"
    )
    assert head.packing, "the switch is put back"


def test_explicit_attention_in_bf16_is_exact_attention_rounded() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v, seed = (torch.randn(2, 2, n, 8, generator=g).bfloat16() for n in (6, 9, 9, 6))
    mask = torch.zeros(6, 9).masked_fill_(~torch.ones(6, 9, dtype=torch.bool).tril(3), float("-inf"))
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        a, b, c = (x.to(dtype).requires_grad_() for x in (q, k, v))
        plain = (0.3 * a @ b.transpose(-1, -2) + mask).softmax(-1) @ c
        out = packing.Explicit.apply(a, b, c, mask, 0.3) if dtype == torch.bfloat16 else plain
        found.append([x.detach().double() for x in (out, *torch.autograd.grad(out, (a, b, c), seed.to(dtype)))])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm()) < 1e-2 * float(other.norm())
