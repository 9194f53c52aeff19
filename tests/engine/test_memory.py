"""Memory that does not suffice is said in one line, wherever it was asked for."""

from __future__ import annotations

import pytest
import torch

from rlhf_cli.engine.memory import out_of_memory

SAID = "out of memory; halve hardware.micro_batch_tokens, set rollout.rows=16, or type model.checkpointing=true"


def test_every_allocators_refusal_says_what_to_type() -> None:
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(1 << 60, dtype=torch.uint8)  # more than addresses reach
    for e in (cpu.value, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()):
        assert str(out_of_memory(e)) == SAID


def test_other_errors_stay_what_they_are() -> None:
    assert out_of_memory(RuntimeError("shapes differ")) is None
    assert out_of_memory(ValueError("DefaultCPUAllocator: is a word")) is None
