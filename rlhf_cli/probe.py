"""A few real rows, and what a run is held to on them at its start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_cli import gates
from rlhf_cli.data.record import Record
from rlhf_cli.engine.deepspeed import DeepSpeedEngine
from rlhf_cli.sources.assemble import rows, sample_of
from rlhf_cli.types import Experience


def probe_rows(*, encoded: Sequence[Sequence[int]], records: Sequence[Record]) -> Experience:
    """Two groups of two rows: real prompts, each with a short and a longer answer made of its own tokens."""
    owner = [i for i in range(len(encoded)) for _ in range(2)]
    answers = [list(encoded[i][-(5 + 4 * (n % 2)) :]) for n, i in enumerate(owner)]
    return rows([encoded[i] for i in owner], answers, [sample_of(records[i], "") for i in owner], torch.tensor(owner))


def check_invariance(engine: DeepSpeedEngine, exp: Experience, want: str, limit: float, rows: int = 4) -> float:
    """Compare a few rows as the engine runs them with the same rows alone: log-probs of the model's own logits, or unpacked scores."""
    some = exp.rows(torch.arange(min(rows, len(exp))))
    alone = own_logp if want == "logp" else unpacked
    return gates.invariance(
        lambda e: engine.infer(e, frozenset({want}))[want], lambda e: alone(engine, e, want), some, limit
    )


def own_logp(engine: DeepSpeedEngine, exp: Experience, want: str) -> Tensor:
    """[N, T] log-probs from what the whole model returns for one row at a time, output scaling and all."""
    head: Any = engine.module
    found = torch.zeros(exp.ids.shape, dtype=torch.float64)
    for i, n in enumerate(exp.attention.sum(-1).tolist()):
        ids = exp.ids[i : i + 1, :n]
        with torch.no_grad():
            logits = head.model(input_ids=ids.to(engine.comm.device), use_cache=False).logits[0]
        logp = (logits[:-1].double() / head.temperature).log_softmax(-1).cpu()
        found[i, 1:n] = logp.gather(-1, ids[0, 1:, None]).squeeze(-1)
    return found * exp.mask


def unpacked(engine: DeepSpeedEngine, exp: Experience, want: str) -> Tensor:
    """Outputs of one row at a time, without packing."""
    head: Any = engine.module
    kept, head.packing = head.packing, False
    try:
        parts = [engine.infer(exp.rows(torch.tensor([i])), frozenset({want}))[want] for i in range(len(exp))]
    finally:
        head.packing = kept
    return torch.cat(parts)
