"""Fused norms and gated layers against autograd's own, and which modules they replace."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_cli.models import fused
from rlhf_cli.models.tiny import tiny_causal, tiny_config

EPS = 1e-5


def noise(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def same(ours: Tensor, own: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Values, and gradients under a cotangent that is not constant."""
    seed = noise(*own.shape, seed=9).detach()
    for a, b in zip(
        (ours, *torch.autograd.grad(ours, inputs, seed)), (own, *torch.autograd.grad(own, inputs, seed)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # at 1e-3, eps is ten times the mean square
def test_rms_norm_is_its_formula(scale: float) -> None:
    x, weight = (scale * noise(2, 5, 7)).detach().requires_grad_(), noise(7, seed=1)
    same(fused.RMSNorm.apply(x, weight, EPS), norm(x, weight, EPS), (x, weight))


def test_a_frozen_norm_weight_gets_no_gradient() -> None:
    x, weight = noise(3, 7), noise(7, seed=1).detach()
    fused.RMSNorm.apply(x, weight, EPS).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_swiglu_is_its_formula() -> None:
    gate, up = noise(2, 5, 7), noise(2, 5, 7, seed=1)
    same(fused.SwiGLU.apply(gate, up), gate * torch.sigmoid(gate) * up, (gate, up))


def results(model: Any) -> list[Tensor]:
    """Logits and every gradient."""
    ids = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.logsumexp(-1).mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


def test_a_llama_keeps_its_outputs_and_gradients() -> None:
    model, layers = tiny_causal(0, torch.float32), tiny_config().num_hidden_layers
    before = results(model)
    assert fused.install(model) == (2 * layers + 1) + layers
    replaced = [type(m).__name__ for m in model.modules() if "forward" in vars(m)]
    assert sorted(replaced) == ["LlamaMLP"] * layers + ["LlamaRMSNorm"] * (2 * layers + 1)
    for a, b in zip(results(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_copy_uses_its_own_weights() -> None:
    model = tiny_causal(0, torch.float32)
    fused.install(model)
    other, before = copy.deepcopy(model), results(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    for a, b in zip(results(other), before, strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(results(model)[0], before[0])


class Norm(nn.Module):
    """A norm by its names; `shift` is added to the weight."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.variance_epsilon, self.shift = EPS, shift

    def forward(self, hidden_states: Tensor) -> Tensor:
        return norm(hidden_states, self.weight + self.shift, self.variance_epsilon)


class Gated(nn.Module):
    """A gated layer by its names."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(
    ("module", "count"),
    [(Norm(0.0), 1), (Norm(1.0), 0), (Gated(F.silu), 1), (Gated(F.gelu), 0), (Gated(F.relu), 0)],
    ids=["norm", "one plus weight", "silu", "gelu", "relu"],
)
def test_a_module_is_known_by_what_it_computes(module: nn.Module, count: int) -> None:
    assert fused.install(nn.Sequential(module)) == count
    assert ("forward" in vars(module)) == bool(count)


def test_a_layer_that_still_gives_zero_tells_nothing() -> None:
    module = Gated(F.gelu)
    nn.init.zeros_(module.down_proj.weight)
    nn.init.zeros_(module.down_proj.bias)
    assert fused.install(nn.Sequential(module)) == 0


def test_modules_of_one_class_may_differ() -> None:
    layers = nn.Sequential(Gated(F.silu), Gated(F.gelu))
    assert fused.install(layers) == 1
