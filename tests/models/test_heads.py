"""The last layer: log-probs, entropy, temperature, logit cap, precision, and what a head receives."""

from math import log, tanh

import pytest
import torch
from torch import nn

from rlhf_cli.models import packing
from rlhf_cli.models.heads import PolicyHead, ScalarHead, SharedHead, _token_logp, inner, precise, stage_inputs
from rlhf_cli.models.tiny import tiny_causal, tiny_scalar
from rlhf_cli.types import Experience


@pytest.mark.parametrize(
    ("temperature", "cap", "p"),
    [
        (1.0, None, 3 / 4),  # logits 0 and log 3: odds 1 to 3
        (0.5, None, 9 / 10),  # halving the temperature squares the odds
        (1.0, 2.0, 1 / (1 + 2.718281828459045 ** (-2 * tanh(log(3) / 2)))),  # odds exp(2 tanh(log 3 / 2))
    ],
)
def test_log_prob_and_entropy_of_a_two_word_vocabulary(temperature: float, cap: float | None, p: float) -> None:
    logits = torch.tensor([[0.0, log(3)]], dtype=torch.float64)
    logp, entropy = _token_logp(nn.Identity(), logits, torch.tensor([1]), temperature, cap, True)
    assert logp.item() == pytest.approx(log(p), abs=1e-12)
    assert entropy.item() == pytest.approx(-p * log(p) - (1 - p) * log(1 - p), abs=1e-12)
    assert len(_token_logp(nn.Identity(), logits, torch.tensor([1]), temperature, cap, False)) == 1


def test_half_precision_logits_are_reduced_in_float32_and_float64_stays() -> None:
    (logp,) = _token_logp(
        nn.Identity(), torch.zeros(1, 1000, dtype=torch.bfloat16), torch.tensor([3]), 1.0, None, False
    )
    assert logp.dtype == torch.float32
    assert logp.item() == pytest.approx(-log(1000), abs=1e-5)  # bf16 would be off by 0.01
    assert precise(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_a_head_receives_the_chosen_rows_cut_to_their_longest() -> None:
    attention = torch.arange(6) < torch.tensor([6, 2, 3])[:, None]
    exp = Experience(
        ids=torch.arange(18).view(3, 6),
        attention=attention,
        mask=attention & (torch.arange(6) > 0),
        group=torch.tensor([5, 6, 7]),
    )
    got = stage_inputs(exp, torch.tensor([2, 1]))
    assert got["ids"].tolist() == [[12, 13, 14], [6, 7, 8]]
    assert got["attention"].tolist() == [[True] * 3, [True, True, False]]
    assert got["mask"].tolist() == [[False, True, True], [False, True, False]]
    assert got["group"].tolist() == [7, 6]


def test_inner_sees_through_a_wrapper() -> None:
    model = nn.Linear(1, 1)
    assert inner(model) is model

    class Wrapper(nn.Module):
        def get_base_model(self) -> nn.Module:
            return model

    assert inner(Wrapper()) is model


@pytest.mark.parametrize("packed", [True, False])
def test_a_shared_trunk_gives_what_two_heads_on_equal_trunks_give(packed: bool) -> None:
    packing.register()
    causal, scalar = tiny_causal(0, torch.float64), tiny_scalar(0, torch.float64)  # seeded alike: one backbone
    for model in (causal, scalar):
        model.set_attn_implementation(packing.ATTENTION)
    shared = SharedHead(causal, temperature=0.7, packing=packed, seed=3)
    scalar.score.weight.data.copy_(shared.value.weight.data)
    attention = torch.arange(7) < torch.tensor([7, 5, 6])[:, None]
    columns = {
        "ids": torch.randint(0, 250, (3, 7), generator=torch.Generator().manual_seed(0)),
        "attention": attention,
        "mask": attention & (torch.arange(7) > 2),
        "group": torch.tensor([0, 1, 2]),
    }
    want = frozenset({"logp", "entropy", "value_new"})
    outs = shared(**columns, want=want)
    tokens = PolicyHead(causal, temperature=0.7, packing=packed)(**columns, want=frozenset({"logp", "entropy"}))
    values = ScalarHead(scalar, packing=packed)(**columns, want=frozenset({"value_new"}))
    for name, expected in (tokens | values).items():
        assert torch.allclose(outs[name], expected, atol=1e-12), name
        assert outs[name][columns["mask"]].abs().min() > 0 and not outs[name][~columns["mask"]].any()
    assert shared(**columns, want=frozenset({"value_new"})).keys() == {"value_new"}
    outs["value_new"].sum().backward()
    assert causal.get_input_embeddings().weight.grad.abs().max() > 0, "the critic trains the trunk"
    again = SharedHead(causal, temperature=1.0, packing=packed, seed=3)
    assert torch.equal(again.value.weight, shared.value.weight)


def test_only_the_model_s_weights_sample_and_are_exported() -> None:
    names = [
        n
        for n, _ in SharedHead(tiny_causal(0, torch.float32), temperature=1.0, packing=True, seed=0).named_parameters()
    ]
    assert [n for n in names if not n.startswith("model.")] == ["value.weight"]
