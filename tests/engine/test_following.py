"""Models that follow the policy: copies and averages, under every ZeRO stage, against TRL's, and through a checkpoint."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_bed import FUSED, engine, head, steps, weights
from torch import Tensor

from rlhf_cli import readers, state
from rlhf_cli.engine.comm import Comm, start
from rlhf_cli.engine.following import Follower
from rlhf_cli.errors import GateError

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def comm() -> Iterator[Comm]:
    before = {k: os.environ.get(k) for k in LAUNCHER}
    yield start(torch.device("cpu"))
    for k, v in before.items():
        os.environ.pop(k, None)
        if v is not None:
            os.environ[k] = v


def own(f: Follower) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in f.own.items()}


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_copy_is_taken_every_few_steps_and_not_before(comm: Comm, zero: int) -> None:
    e = engine(comm, zero=zero)
    lagged = Follower("lagged", head(), e, every=2, decay=0.0)
    first = own(lagged)
    steps(e, (FUSED,))
    lagged(1)
    assert all(torch.equal(first[k], x) for k, x in own(lagged).items()), "before: the old copy"
    steps(e, (FUSED,))
    lagged(2)
    now = weights(e)
    assert all(torch.equal(now[k], x) for k, x in own(lagged).items()), "after two steps: the policy"
    assert any(not torch.equal(first[k], x) for k, x in now.items())


def test_the_sampler_s_mask_is_the_model_that_follows(comm: Comm) -> None:
    e, module = engine(comm), head()
    lagged = Follower("lagged", module, e, every=1, decay=0.0)
    sampler, tokenizer = SimpleNamespace(eos=[0], mask=None), SimpleNamespace(all_special_ids=[])
    section = SimpleNamespace(model="lagged", top_p=0.5, min_tokens=1)
    cfg, found = SimpleNamespace(rollout=SimpleNamespace(mask=section)), {"lagged": SimpleNamespace(module=module)}
    readers.mask_sampler(cfg, sampler, found, tokenizer)  # type: ignore[arg-type]
    mask: Any = sampler.mask
    assert mask.model is module.model
    ids = torch.arange(1, 41)[None]

    @torch.no_grad()
    def allowed(model: Any) -> Tensor:
        return mask.allowed(model(input_ids=ids).logits[0])

    first = allowed(mask.model)
    steps(e, (FUSED,) * 5)
    assert torch.equal(allowed(mask.model), first), "before the refresh: the old sets"
    lagged(1)
    now = allowed(mask.model)
    assert not torch.equal(now, first) and torch.equal(now, allowed(e.module.model)), "after it: those of the policy"


def test_an_average_is_that_of_trl(comm: Comm) -> None:
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    e = engine(comm)
    mean, other = Follower("ema", head(), e, every=1, decay=0.75), head()
    for step in (1, 2, 3):
        steps(e, (FUSED,))
        mean(step)
        # TR-DPO's mixture: alpha of the policy
        callbacks.SyncRefModelCallback._sync_target_model(e.module, other, 0.25)
    wanted = dict(other.named_parameters())
    assert all(torch.allclose(wanted[k], x, atol=1e-7) for k, x in own(mean).items())


def test_an_average_in_bf16_does_not_stand_still(comm: Comm) -> None:
    # a weight 1 that moves by 1/256 of 0.01 a step: bf16 alone would never leave 1
    e = engine(comm, bf16=True)
    module = head(torch.bfloat16)
    name = next(iter(e.trained))
    mean = Follower("ema", module, e, every=1, decay=0.99)
    assert mean.average is not None
    mean.average[name].fill_(1.0)
    e.full_state = lambda: iter([(name, torch.full_like(mean.own[name], 1.0078125))])  # type: ignore[method-assign]
    for step in range(1, 101):
        mean(step)
    wanted = 1 + 0.0078125 * (1 - 0.99**100)  # 1.00495
    assert float(mean.average[name].flatten()[0]) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_checkpoint_goes_on_bit_for_bit(comm: Comm, bf16: bool, tmp_path: Path) -> None:
    e = engine(comm, bf16=bf16)
    dtype = torch.bfloat16 if bf16 else torch.float32
    mean = Follower("ema", head(dtype), e, every=1, decay=0.9)
    steps(e, (FUSED,))
    mean(1)
    saved = state.save({"frozen.ema": mean}, tmp_path, comm)
    again = Follower("ema", head(dtype), e, every=1, decay=0.9)
    state.load({"frozen.ema": again}, tmp_path, copy.deepcopy(saved))
    steps(e, (FUSED,))
    mean(2), again(2)
    assert all(torch.equal(x, own(again)[k]) for k, x in own(mean).items())
    if mean.average is not None and again.average is not None:
        assert all(torch.equal(x, again.average[k]) for k, x in mean.average.items())


def test_a_model_of_other_names_cannot_follow(comm: Comm) -> None:
    with pytest.raises(GateError, match=r"^odd: it has no weight model\.\S+, so it cannot follow the policy$"):
        Follower("odd", torch.nn.Linear(2, 2), engine(comm), every=1, decay=0.0)
