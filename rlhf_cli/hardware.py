"""What this machine has and what a run needs of it, decided without torch."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ConfigError


def resolve_hardware(cfg: Any, *, here: bool = True) -> dict[str, Any]:
    """The `auto` values of `hardware`, decided for this machine; with `here` off, a GPU run may be planned without a GPU."""
    gpus = _gpus()
    device = cfg.hardware.device if cfg.hardware.device != "auto" else ("cuda" if gpus else "cpu")
    if here and device == "cuda" and not gpus:
        raise ConfigError("hardware.device=cuda: no NVIDIA GPU is visible; type hardware=cpu")
    processes = cfg.hardware.processes or (max(1, gpus) if device == "cuda" else 1)
    if here and device == "cuda" and processes > gpus:
        raise ConfigError(f"hardware.processes={processes}: {gpus} GPUs are visible")
    precision = cfg.hardware.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" or _cpu_has("amx_bf16") else "fp32"
    threads = cfg.hardware.threads or max(1, len(os.sched_getaffinity(0)) // processes)
    budget = cfg.hardware.micro_batch_tokens or (16384 if device == "cuda" else _group_tokens(cfg, precision))
    return {
        "device": device,
        "processes": processes,
        "precision": precision,
        "threads": threads,
        "micro_batch_tokens": budget,
    }


def _group_tokens(cfg: Any, precision: str) -> int:
    """A micro-batch on a CPU: the largest sampled group whole, since every part of a cut one reads its prompt again.

    At most 2048 tokens, and at least 1024; 1280 in bf16, whose matrix products are slow on fewer rows (docs/speed.md).
    """
    longest = cfg.dataset.max_prompt_tokens + cfg.batch.samples * cfg.rollout.max_tokens
    return min(2048, max(1280 if precision == "bf16" else 1024, longest))


def reward_processes(cfg: Any) -> int:
    """Worker processes of each rank that score rewards; auto is half the cores, shared by the ranks, 1 to 16."""
    chosen = cfg.reward_workers.processes
    ranks = max(1, cfg.hardware.processes)
    return max(0, chosen) if chosen else min(16, max(1, len(os.sched_getaffinity(0)) // (2 * ranks)))


def _gpus() -> int:
    return len(visible_gpus())


def visible_gpus() -> list[str]:
    """The GPUs that a process started here would see, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [x.strip() for x in visible.split(",") if x.strip() and x.strip() != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    return [str(i) for i in range(len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit()]))]


def _cpu_has(flag: str) -> bool:
    try:
        return flag in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False


def parameters(cfg: Any) -> float | None:
    """Parameters of the model, in billions, from its files or its name; None when neither tells."""
    if cfg.model.source == "smollm2":
        return 0.1345
    if cfg.model.source == "tiny":
        return 0.0001
    folder = Path(cfg.model.path) if cfg.model.path else None
    if folder and folder.is_dir():
        size = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
        return size / 4e9 if size else None
    match = re.search(r"(\d+(?:\.\d+)?)\s*([bm])\b", cfg.model.path.lower().replace("_", "-"))
    return float(match[1]) / (1 if match[2] == "b" else 1000) if match else None


def memory(cfg: Any, learners: Iterable[str], copies: Mapping[str, str], hw: Mapping[str, Any]) -> list[str]:
    """Lines of the memory estimate of one process; `copies`: whole models besides the learners, and what they do."""
    n = parameters(cfg)
    if n is None:
        return ["  unknown: the model is neither local nor named by its size"]
    world, zero, low = hw["processes"] * cfg.hardware.nodes, cfg.hardware.zero, 2 if hw["precision"] == "bf16" else 4
    trained = n * 0.02 if cfg.model.lora.r else n
    rows = []
    for name in learners:
        weights = n * low / (world if zero == 3 else 1)
        gradients = trained * 4 / (world if zero >= 2 else 1)
        state = trained * (8 + (4 if low == 2 else 0)) / (world if zero >= 1 else 1)
        offloaded = " (state offloaded)" if cfg.hardware.offload != "none" else ""
        rows.append(
            (
                name,
                weights + gradients + (0 if offloaded else state),
                f"weights {weights:.2f} + gradients {gradients:.2f} + AdamW {state:.2f}{offloaded}",
            )
        )
    rows += [(name, n * low, what) for name, what in copies.items()]
    rows.append(
        (
            "activations",
            _activations(n, hw["micro_batch_tokens"], low),
            f"one micro-batch of {hw['micro_batch_tokens']} tokens",
        )
    )
    total = sum(r[1] for r in rows)
    return [f"  {name:<14}{gb:7.2f} GB   {what}" for name, gb, what in rows] + [f"  {'total':<14}{total:7.2f} GB"]


def _activations(billions: float, tokens: int, low: int) -> float:
    """GB held for the backward pass: about 13 values per hidden unit and layer and token; hidden x layers ~ 17k at 0.13B, growing as n^0.6."""
    units = 17_000 * (billions / 0.1345) ** 0.6
    return tokens * units * 26 * low / 2**30 + 3 * 1024 * 50_000 * 4 / 2**30


def free_port() -> int:
    """A port nobody listens on now."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
