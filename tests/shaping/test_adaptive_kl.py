"""The KL penalty that holds a target."""

from typing import Any

import pytest
import torch

from rlhf_cli.shaping import AdaptiveKL, token_kl

MASK = torch.tensor([[False, True, True, True], [False, True, False, False]])
REF = torch.zeros(2, 4, dtype=torch.float64)
# sums of 3 and 1 nats over rows: 2 nats a row, 1 nat a token
SAMPLER = torch.where(MASK, 1.0, 50.0).double()
ZIEGLER: dict[str, Any] = {"per": "row", "bound": 0.2, "count": "rows", "horizon": 100.0}
RL4LMS: dict[str, Any] = {"per": "token", "bound": 0.2, "count": "steps", "horizon": 10.0}


def controller(**settings: Any) -> AdaptiveKL:
    return AdaptiveKL(**({"beta": 0.5, "kind": "k1", "target": 2.0} | ZIEGLER | settings))


def test_the_penalty_is_that_of_the_present_beta() -> None:
    shaper = controller(target=1.0)
    first, second = shaper(SAMPLER, REF, MASK), shaper(SAMPLER, REF, MASK)
    assert torch.equal(first, token_kl(SAMPLER, REF, MASK, beta=0.5, kind="k1"))
    # KL is 2, twice the target, so the error is cut to 0.2; two rows of a horizon of 100
    assert second[0, 1].item() == pytest.approx(-0.5 * (1 + 0.2 * 2 / 100))
    assert shaper.stats == pytest.approx({"kl": 2.0, "kl_beta": 0.502})


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"target": 2.0}, 1.0),  # on target
        ({"target": 1.9}, 1 + (2 / 1.9 - 1) * 2 / 100),  # an error of 0.0526, not cut
        ({"target": 1000.0}, 1 - 0.2 * 2 / 100),
        ({"target": 0.5, **RL4LMS}, 1 + 0.1 * 0.2),  # 1 nat a token
        ({"target": 1.1, **RL4LMS}, 1 + 0.1 * (1 / 1.1 - 1)),
    ],
)
def test_beta_moves_by_the_bounded_relative_error(settings: dict[str, Any], factor: float) -> None:
    shaper = controller(**settings)
    shaper(SAMPLER, REF, MASK)
    assert shaper.beta == pytest.approx(0.5 * factor, rel=1e-12)


def test_it_goes_on_from_its_state() -> None:
    one, other = controller(target=1.0), controller(target=1.0)
    one(SAMPLER, REF, MASK)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(SAMPLER, REF, MASK), other(SAMPLER, REF, MASK)) and one.beta == other.beta


def test_it_finds_the_beta_that_holds_the_target() -> None:
    # a policy whose KL is 1 / beta (as under a linear reward): the target of 4 nats is held at beta = 0.25
    shaper = controller(target=4.0, horizon=20.0)
    for _ in range(400):
        d = torch.full((2, 4), 1 / shaper.beta / 2, dtype=torch.float64)  # [1, 3] tokens: 2 a row on average
        shaper(d, REF, MASK)
    assert shaper.beta == pytest.approx(0.25, rel=1e-3)
