"""The built-in backend: the learner's own model samples, or a copy of it where ZeRO-3 shards the learner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from rlhf_cli.data.text import end_id
from rlhf_cli.engine.comm import Comm
from rlhf_cli.engine.deepspeed import DeepSpeedEngine
from rlhf_cli.errors import GateError
from rlhf_cli.rollout import graphs
from rlhf_cli.rollout.sampler import Decoding, Sampler

SAMPLES_WITH_ACTOR = True  # under ZeRO-3 it needs a copy of the model


def make_sampler(cfg: Any, actor: nn.Module, tokenizer: Any, comm: Comm) -> Sampler:
    """The built-in sampler; it also stops at the token that the chat template ends a turn with."""
    sampler = Sampler(actor, tokenizer, decoding_of(cfg), device=comm.device)
    sampler.eos = sorted({*sampler.eos, end_id(tokenizer, cfg.dataset.chat)})
    if cfg.rollout.cuda_graphs:
        graphs.use(sampler)
    return sampler


def make_publish(
    cfg: Any,
    sampler: Sampler,
    actor: nn.Module,
    learner: DeepSpeedEngine | None,
    comm: Comm,
    count: Callable[[Mapping[str, float], str], None],
) -> Callable[[], None]:
    """Nothing to do, unless a copy samples."""
    return partial(refresh, actor, learner) if learner is not None and cfg.hardware.zero == 3 else _nothing


def refresh(actor: nn.Module, engine: DeepSpeedEngine) -> None:
    """Copy the learner's weights into the model that samples, and make sure that they changed."""
    own = {f"model.{k}": v for k, v in (*actor.named_parameters(), *actor.named_buffers())}
    moved = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for name, value in engine.full_state():
            if not name.startswith("model."):
                continue  # a value head does not sample
            moved += (own[name] - value.to(own[name].dtype)).abs().sum().double().cpu()
            own[name].copy_(value)
    if engine.moved and float(moved) == 0.0:
        raise GateError("the weights that sample did not change after an update: the copy from the learner is broken")
    engine.moved = False  # a step without rows moves nothing


def decoding_of(cfg: Any, **changes: Any) -> Decoding:
    """How training samples; `changes` for evaluation."""
    r = cfg.rollout
    settings = {
        "max_tokens": r.max_tokens, "min_tokens": r.min_tokens, "temperature": r.temperature, "top_p": r.top_p, "top_k": r.top_k,
        "stop": tuple(r.stop), "rows": r.rows,
    }  # fmt: skip
    return Decoding(**(settings | changes))


def _nothing() -> None:
    pass
