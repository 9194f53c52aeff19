"""InfAlign: calibration, transforms, and win rates by quadrature."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_cli.shaping import InfAlignOptimal, infalign_ctrl
from rlhf_cli.shaping.inference import calibrated, optimal_transform, win_rates

F = torch.float64
U = torch.linspace(0, 1, 4001, dtype=F)


def test_calibration_by_hand_with_ties_half() -> None:
    refs = torch.tensor([[0.0, 1.0, 1.0, 3.0]], dtype=F).expand(3, 4)
    r = torch.tensor([1.0, -1.0, 5.0], dtype=F)
    assert calibrated(r, refs).tolist() == [0.5, 0, 1]  # 1 below and 2 ties of 4
    gaps = torch.tensor([[0.0, float("nan"), 3.0]], dtype=F)
    assert calibrated(r[:1], gaps).tolist() == [0.5]


def test_calibration_undoes_increasing_maps_and_averages_one_half() -> None:
    g = torch.Generator().manual_seed(1)
    refs = torch.randn(1, 64, generator=g, dtype=F)
    r = torch.randn(9, generator=g, dtype=F)
    wide = refs.expand(9, 64)
    assert torch.equal(calibrated(r, wide), calibrated((3 * r).exp() + 5, (3 * wide).exp() + 5))
    assert calibrated(refs[0], refs.expand(64, 64)).mean().item() == pytest.approx(0.5)


def test_transforms_by_hand() -> None:
    refs = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=F).expand(2, 4)
    r = torch.tensor([1.5, -1.0], dtype=F)  # u = 1/2 and 0

    def phi(**settings: object) -> list[float]:
        return infalign_ctrl(r, refs, **settings).tolist()  # type: ignore[arg-type]

    assert phi(transform="identity", t=10.0) == [0.5, 0]
    assert phi(transform="exponential", t=10.0) == pytest.approx([math.exp(-5), math.exp(-10)])
    assert phi(transform="exponential", t=-10.0) == pytest.approx([-math.exp(-5), -1])
    assert phi(transform="log", t=10.0) == pytest.approx([math.log(0.5), math.log(1 / 8)])


def test_one_response_wants_the_identity() -> None:
    for worst in (False, True):
        assert torch.allclose(optimal_transform(1, 0.4, worst=worst), U, atol=1e-9)


def test_log_is_best_of_n() -> None:
    # f = n u^(n-1), KL log n - (n - 1) / n, win rate n / (n + 1), whatever decoding follows
    n = 4
    kl, win, *_ = win_rates(U.clamp(min=1e-12).log(), 1 / (n - 1), 1)
    assert kl.item() == pytest.approx(math.log(4) - 0.75, abs=1e-5) == pytest.approx(0.636294, abs=1e-5)
    assert win.item() == pytest.approx(0.8, abs=1e-5)
    for later in (1, 2, 4, 8):
        assert win_rates(U.clamp(min=1e-12).log(), 1 / (n - 1), later)[2].item() == pytest.approx(0.8, abs=1e-5)


def test_the_identity_has_the_closed_form() -> None:
    b = 0.338
    kl, win, *_ = win_rates(U, b, 4)
    wanted = 1 / (1 - math.exp(-1 / b)) - b
    assert win.item() == pytest.approx(wanted, abs=1e-6) == pytest.approx(0.7167, abs=2e-4)
    assert kl.item() == pytest.approx(wanted / b - math.log(b * (math.exp(1 / b) - 1)), abs=1e-6)


def at_kl(make: "callable", wanted: float, low: float, high: float) -> tuple[Tensor, float]:  # type: ignore[valid-type]
    """The transform, and the beta under which its policy has the KL; KL falls with beta."""
    for _ in range(60):
        b = math.sqrt(low * high)
        kl = win_rates(make(b), b, 4)[0].item()
        low, high = (b, high) if kl > wanted else (low, b)
    return make(b), b


FIXED = {
    # name: Phi at a beta, beta range, wins of one response, best of 4, worst of 4
    "identity": (lambda b: U, (0.05, 5), (0.7168, 0.7476, 0.8101)),
    "exponential": (lambda b: torch.exp(10 * (U - 1)), (1e-2, 10), (0.6626, 0.8164, 0.6298)),
    "negative": (lambda b: -torch.exp(-10 * U), (1e-2, 10), (0.6708, 0.6264, 0.8827)),
}


@pytest.mark.parametrize("name", list(FIXED))
def test_win_rates_at_one_kl(name: str) -> None:
    make, (low, high), wanted = FIXED[name]
    phi, b = at_kl(make, 0.3, low, high)
    found = [x.item() for x in win_rates(phi, b, 4)]
    assert found[0] == pytest.approx(0.3, abs=1e-6) and found[1:] == pytest.approx(wanted, abs=2e-4)
    if name == "identity":
        assert b == pytest.approx(0.338, abs=1e-3)
    if name == "exponential":
        assert b * math.exp(10) == pytest.approx(8516, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("worst", "wanted"), [(False, (0.6599, 0.8169, 0.6267)), (True, (0.6755, 0.6297, 0.8840))])
def test_the_fixed_point_wins_its_own_column(worst: bool, wanted: tuple[float, ...]) -> None:
    points = 801
    low, high = 0.05, 5.0
    for _ in range(26):
        b = math.sqrt(low * high)
        phi = optimal_transform(4, b, worst=worst, points=points)
        kl, *wins = win_rates(phi, b, 4)
        low, high = (b, high) if kl > 0.3 else (low, b)
    assert [w.item() for w in wins] == pytest.approx(wanted, abs=3e-4)
    own = 1 if not worst else 2
    assert all(wanted[own] > other[own] for _, _, other in FIXED.values())


def test_the_table_is_interpolated() -> None:
    made = InfAlignOptimal(mode="best", n=1, beta=0.5)
    refs = torch.arange(8.0).expand(3, 8)
    assert torch.allclose(made(torch.tensor([-1.0, 2.5, 9.0]), refs), torch.tensor([0.0, 3 / 8, 1.0]), atol=1e-6)
    best = InfAlignOptimal(mode="best", n=4, beta=0.5)
    assert (best.table.diff() >= 0).all() and best.table[-1] == 1 and best.table[2000] < 0.2, "it stresses the top"
