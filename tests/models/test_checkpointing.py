"""Activation checkpointing: the same numbers, from activations that were made twice."""

from typing import Any

import pytest
import torch
from test_packing import ragged

from rlhf_cli.config import LoraSection
from rlhf_cli.models import packing
from rlhf_cli.models.heads import PolicyHead, stage_inputs
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.tiny import tiny_causal
from rlhf_cli.wiring import prepare


def trained(adapters: bool, checkpointing: bool, packed: bool) -> tuple[Any, dict[str, Any], int]:
    """The loss, every gradient, and how often a layer's gated part began."""
    packing.register()
    model = tiny_causal(0, torch.float32)
    if adapters:
        model = add_lora(model, LoraSection(r=2), 0)
        for name, p in model.named_parameters():
            if "lora_B" in name:  # they start at 0, where no gradient reaches the other half
                p.data.normal_(generator=torch.Generator().manual_seed(1))
    prepare(model, checkpointing=checkpointing)
    head, exp, calls = PolicyHead(model, temperature=1.0, packing=packed), ragged(), []
    for name, m in model.named_modules():
        if name.endswith("layers.0.mlp"):  # counted where it begins: the second pass stops once it has what is missing
            m.register_forward_pre_hook(lambda *_: calls.append(1))
    outs = head(**stage_inputs(exp, torch.arange(len(exp))), want=frozenset({"logp"}))
    weights = torch.randn(outs["logp"].shape, generator=torch.Generator().manual_seed(0))
    loss = (weights * outs["logp"]).sum()
    loss.backward()
    return loss, {n: p.grad for n, p in head.named_parameters() if p.requires_grad}, len(calls)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_loss_and_gradients_are_those_without(adapters: bool, packed: bool) -> None:
    loss, wanted, once = trained(adapters, False, packed)
    again, found, twice = trained(adapters, True, packed)
    assert (once, twice) == (1, 2), "the backward pass makes the activations again"
    assert torch.equal(loss, again)
    assert set(found) == set(wanted) and all(float(g.norm()) > 0 for g in wanted.values())
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
