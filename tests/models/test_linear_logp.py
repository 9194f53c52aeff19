"""Log-probs straight from hidden states and the output matrix, against log_softmax; and which output layers are only a matrix."""

import pytest
import torch
from torch import Tensor, nn

from rlhf_cli.models.heads import CHUNK, LinearLogp, plain_weight

D, V = 5, 11


def material(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, targets, and a cotangent."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(k, D, generator=g, dtype=torch.float64).requires_grad_() for k in (n, V))
    return (
        hidden,
        weight,
        torch.randint(0, V, (n,), generator=g),
        torch.randn(n, generator=g, dtype=torch.float64),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("n", [0, 1, CHUNK, 2 * CHUNK + 3])
def test_values_and_gradients_are_those_of_log_softmax(n: int, temperature: float) -> None:
    hidden, weight, target, seed = material(n)
    ours = LinearLogp.apply(hidden, weight, target, temperature)
    own = ((hidden @ weight.T) / temperature).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight), seed) for x in (ours, own)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_keeps_its_own(frozen: int) -> None:
    hidden, weight, target, seed = material(CHUNK + 3)
    wanted = torch.autograd.grad(LinearLogp.apply(hidden, weight, target, 0.7), (hidden, weight), seed)[1 - frozen]
    inputs = [hidden.detach(), weight.detach()]
    inputs[1 - frozen].requires_grad_()
    LinearLogp.apply(*inputs, target, 0.7).backward(seed)
    assert inputs[frozen].grad is None and torch.equal(inputs[1 - frozen].grad, wanted)


def test_bf16_is_reduced_in_float32_and_its_gradients_are_bf16() -> None:
    hidden, weight, target, seed = material(CHUNK + 3)
    half = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    logp = LinearLogp.apply(*half, target, 1.0)
    assert logp.dtype == torch.float32
    logp.backward(seed.float())
    wide = [x.detach().double().requires_grad_() for x in half]
    LinearLogp.apply(*wide, target, 1.0).backward(seed)
    for a, b in zip(half, wide, strict=True):
        assert a.grad.dtype == torch.bfloat16
        assert (a.grad.double() - b.grad).norm() < 0.02 * b.grad.norm()


def test_only_a_bare_matrix_has_a_plain_weight() -> None:
    from peft import LoraConfig, get_peft_model

    class Other(nn.Linear):
        pass

    plain = nn.Linear(D, V, bias=False)
    assert plain_weight(plain) is plain.weight
    assert plain_weight(nn.Linear(D, V)) is None
    assert plain_weight(Other(D, V, bias=False)) is None
    wrapped = get_peft_model(nn.Sequential(nn.Linear(D, V, bias=False)), LoraConfig(r=2, target_modules=["0"]))
    assert plain_weight(wrapped.base_model.model[0]) is None
    plain.weight.ds_id = 0  # type: ignore[attr-defined]
    assert plain_weight(plain) is None, "a ZeRO-3 shard"


def test_a_vocabulary_of_several_blocks_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_cli.models.heads.BLOCK", {"cpu": 1})
    monkeypatch.setattr("rlhf_cli.models.heads.MULTIPLE", 4)  # 11 tokens: blocks of 4, 4 and 3
    hidden, weight, target, seed = material(7)
    hidden = (hidden * 30).detach().requires_grad_()  # the largest logit moves from block to block
    ours = LinearLogp.apply(hidden, weight, target, 0.7)
    own = ((hidden @ weight.T) / 0.7).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    torch.testing.assert_close(ours, own, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight), seed) for x in (ours, own)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
