"""Memory that does not suffice is said in one line, wherever it was asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_cli.engine.memory import out_of_memory

LOOK = """
from pathlib import Path
from rlhf_cli.engine.memory import keep_freed_memory
keep_freed_memory()
import torch
x = torch.ones(40_000_000)
heap = Path("/proc/self/smaps").read_text().split("[heap]")[1].split("VmFlags:")
print(heap[1].splitlines()[0])
begin, end = (int(a, 16) for a in next(m for m in Path("/proc/self/maps").read_text().splitlines() if m.endswith("[heap]")).split()[0].split("-"))
print(begin <= x.data_ptr() < end)
"""
SAID = "out of memory; halve hardware.micro_batch_tokens, set rollout.rows=16, or type model.checkpointing=true"


def test_every_allocators_refusal_says_what_to_type() -> None:
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(1 << 60, dtype=torch.uint8)  # more than addresses reach
    for e in (cpu.value, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()):
        assert str(out_of_memory(e)) == SAID


def test_other_errors_stay_what_they_are() -> None:
    assert out_of_memory(RuntimeError("shapes differ")) is None
    assert out_of_memory(ValueError("DefaultCPUAllocator: is a word")) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="NOT LINUX: the heap is not asked for huge pages")
def test_tensors_lie_in_a_heap_of_huge_pages() -> None:
    import resource

    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("NO HUGE PAGES in this kernel")
    if any(resource.getrlimit(r)[0] != resource.RLIM_INFINITY for r in (resource.RLIMIT_AS, resource.RLIMIT_DATA)):
        pytest.skip("LIMITED ADDRESSES: the heap is not reserved")
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("STRICT OVERCOMMIT: the heap is not reserved")
    flags, inside = subprocess.check_output([sys.executable, "-c", LOOK], text=True).splitlines()
    assert "hg" in flags.split() and inside == "True"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="NOT LINUX: nothing is reserved")
def test_where_addresses_are_limited_the_heap_is_not_reserved() -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 44, resource.RLIM_INFINITY))"
    flags, inside = subprocess.check_output([sys.executable, "-c", limit + LOOK], text=True).splitlines()
    assert "hg" not in flags.split() and inside == "True"
