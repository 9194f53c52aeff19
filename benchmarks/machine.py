"""The machine: what it is, and how fast it multiplies matrices. As a script: measures the peaks for a job, given as JSON."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

SQUARE = {"cpu": 2048, "cuda": 8192}
SECONDS = 0.6  # at least, per shape
PACKAGES = ("torch", "transformers", "trl", "deepspeed", "peft", "accelerate", "sacrebleu", "numpy", "rlhf-cli")


def describe(device: str, threads: int) -> dict[str, Any]:
    """Hardware, versions and date: what a result is worth nothing without."""
    import psutil

    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": threads,
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
            "accelerator": None,
        },
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }
    if device == "cuda":
        import torch

        found["hardware"]["accelerator"] = torch.cuda.get_device_name()
        found["versions"]["cuda"] = torch.version.cuda
    return found


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Its name, and the matrix units that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = {k.strip(): v.strip() for k, _, v in (x.partition(":") for x in lines)}
    units = [u for u in ("avx512f", "avx512_bf16", "amx_bf16") if u in known.get("flags", "").split()]
    return f"{known.get('model name', platform.machine())} ({' '.join(units) or 'no AVX-512'})"


def peaks(
    shapes: Sequence[tuple[int, int]], update_rows: int, decode_rows: int, dtype: Any, device: str
) -> dict[str, float]:
    """Median GFLOP/s of `torch.nn.functional.linear`: on a large square, and on a model's own layers.

    `update_layers` has as many rows as an update has tokens, `rollout_layers` as many as are decoded at a time.
    """
    import torch

    size = SQUARE[device]
    return {
        "square": rate([(size, size)], size, dtype, device, torch),
        "update_layers": rate(shapes, update_rows, dtype, device, torch),
        "rollout_layers": rate(shapes, decode_rows, dtype, device, torch),
    }


def rate(shapes: Sequence[tuple[int, int]], rows: int, dtype: Any, device: str, torch: Any) -> float:
    """GFLOP/s of one pass through linear layers [(inputs, outputs)] with `rows` rows each."""
    pairs = [
        (torch.randn(rows, a, device=device).to(dtype), torch.randn(b, a, device=device).to(dtype)) for a, b in shapes
    ]

    def once() -> None:
        for x, w in pairs:
            torch.nn.functional.linear(x, w)
        if device == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        return sum(2 * rows * a * b for a, b in shapes) / median_seconds(once) / 1e9


def median_seconds(once: Callable[[], None]) -> float:
    """Of calls for about SECONDS, after three that warm up."""
    for _ in range(3):
        once()
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 5:
        began = time.perf_counter()
        once()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    from channel import Answers
    from workloads import Job

    from rlhf_cli.launch.local import calm

    job, answers = Job.loads(sys.argv[1]), Answers()
    calm(job.threads, alone=True)
    import torch
    from flops import decoder
    from transformers import AutoConfig

    torch.set_num_threads(job.threads)
    shapes = decoder(AutoConfig.from_pretrained(job.model)).linear()
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    found = peaks(shapes, job.rows, job.workload.rows, dtype, job.device)
    answers.send(
        {**found, "square_size": SQUARE[job.device], "update_rows": job.rows, "rollout_rows": job.workload.rows}
    )


if __name__ == "__main__":
    main()
