"""The last layer: log-probs, entropy, temperature, logit cap, precision, and what a head receives."""

from math import log, tanh

import pytest
import torch
from torch import nn

from rlhf_cli.models.heads import _token_logp, inner, precise, stage_inputs
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
