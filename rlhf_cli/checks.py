"""Settings that are wrong by themselves or exclude each other, whatever the method. Imports no torch."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlhf_cli.config import nearest
from rlhf_cli.errors import ConfigError
from rlhf_cli.models import kernels
from rlhf_cli.rollout.backends import BACKENDS, require

SWITCHES = ("shuffled_reward", "stand_ins")  # of `debug`


AT_LEAST = {
    "batch.prompts": 1,
    "batch.samples": 1,
    "batch.epochs": 1,
    "batch.minibatches": 1,
    "batch.resample": 1,
    "rollout.max_tokens": 1,
    "rollout.min_tokens": 0,
    "rollout.temperature": 0,
    "rollout.top_k": 0,
    "rollout.rows": 0,
    "dataset.hardest": 0,
    "steps": 0,
    "model.lora.r": 0,
    "optim.lr": 0,
    "optim.eps": 0,
    "optim.clip": 0,
    "optim.weight_decay": 0,
    "optim.warmup": 0,
    "checkpoint.keep": 1,
    "checkpoint.every": 0,
    "eval.every": 0,
    "eval.prompts": 0,
    "eval.bootstrap": 1,
    "gates.constant_steps": 1,
    "gates.logp_every": 1,
    "rollout.vllm.tensor_parallel": 1,
    "rollout.vllm.max_model_len": 0,
    "hardware.timeout": 1,
    "reward_workers.processes": -1,
    "reward_workers.timeout": 0.01,
    "hardware.processes": 0,
    "hardware.nodes": 1,
    "hardware.threads": 0,
    "hardware.micro_batch_tokens": 0,
}
"""Smallest value that a number may have."""


def check_numbers(cfg: Any) -> None:
    """Cross-field checks of plain settings."""
    hw = cfg.hardware
    for key, least in AT_LEAST.items():
        value = OmegaConf.select(cfg, key)
        if value < least:
            raise ConfigError(f"{key}={value}: must be at least {least}")
    for key, value, allowed in (
        ("hardware.precision", hw.precision, ("auto", "fp32", "bf16")),
        ("hardware.device", hw.device, ("auto", "cpu", "cuda")),
        ("hardware.offload", hw.offload, ("none", "cpu", "nvme")),
        ("hardware.zero", hw.zero, (0, 1, 2, 3)),
        ("rollout.backend", cfg.rollout.backend, tuple(BACKENDS)),
        ("rollout.vllm.mode", cfg.rollout.vllm.mode, ("inprocess", "server")),
        ("rollout.vllm.transfer", cfg.rollout.vllm.transfer, ("auto", "files", "ipc", "nccl")),
        ("rollout.vllm.sleep", cfg.rollout.vllm.sleep, (0, 1, 2)),
        ("dataset.band", cfg.dataset.band, ("hardest", "medium", "easiest", "random")),
        ("optim.schedule", cfg.optim.schedule, ("constant", "linear", "cosine")),
        *(("debug", switch, SWITCHES) for switch in cfg.debug),
    ):
        if value not in allowed:
            choices = ", ".join(map(str, allowed))
            raise ConfigError(
                f"{key}: {value!r} is not allowed; choose one of {choices}{nearest(str(value), map(str, allowed))}"
            )
    require(cfg.rollout.backend)
    kernels.check(cfg)
    for wrong, message in (*_conflicts(cfg), *_vllm_conflicts(cfg)):
        if wrong:
            raise ConfigError(message)
    check_deepspeed(hw.deepspeed)


def _conflicts(cfg: Any) -> Iterable[tuple[bool, str]]:
    """(does it hold, what to say) of settings that exclude each other."""
    b, r, hw = cfg.batch, cfg.rollout, cfg.hardware
    yield (
        b.prompts % b.minibatches > 0,
        f"batch.prompts={b.prompts} does not divide into batch.minibatches={b.minibatches} of whole groups; choose a divisor",
    )
    yield (
        bool(cfg.model.lora.r) and cfg.model.reference != "auto",
        "model.reference loads a second full model, and under LoRA the disabled adapter is the reference; drop one of the two",
    )
    yield r.min_tokens > r.max_tokens, f"rollout.min_tokens={r.min_tokens} is above rollout.max_tokens={r.max_tokens}"
    yield (
        len(cfg.optim.betas) != 2 or not all(0 <= x < 1 for x in cfg.optim.betas),
        f"optim.betas={list(cfg.optim.betas)}: AdamW takes two numbers from 0 to below 1, e.g. optim.betas=[0.9,0.999]",
    )
    yield (
        r.cuda_graphs and (hw.device == "cpu" or r.backend != "builtin" or bool(cfg.model.lora.r)),
        "rollout.cuda_graphs works on an NVIDIA GPU, with rollout=builtin and without model.lora; type rollout.cuda_graphs=false",
    )
    for key, top_p in (("rollout", r.top_p), ("prepass", cfg.prepass.top_p)):
        yield top_p is not None and not 0 < top_p <= 1, f"{key}.top_p={top_p}: must be above 0 and at most 1"
    t = cfg.prepass.temperature
    yield t is not None and t <= 0, f"prepass.temperature={t}: must be above 0; null is as in training"
    yield (
        hw.offload == "cpu" and hw.zero < 2,
        f"hardware.offload=cpu needs hardware.zero=2 or 3; it is {hw.zero}",
    )
    yield (
        hw.offload == "nvme" and hw.zero < 3,
        f"hardware.offload=nvme needs hardware.zero=3; it is {hw.zero}",
    )
    yield (
        hw.offload == "nvme" and not hw.nvme_path,
        "hardware.offload=nvme: where to? type hardware.nvme_path=FOLDER on a local NVMe disk",
    )
    yield (
        bool(hw.nvme_path) and hw.offload != "nvme",
        f"hardware.nvme_path is not used with hardware.offload={hw.offload}; type hardware.offload=nvme",
    )


def _vllm_conflicts(cfg: Any) -> Iterable[tuple[bool, str]]:
    """(does it hold, what to say) of settings of the vLLM engine."""
    if cfg.rollout.backend != "vllm":
        return
    v, device = cfg.rollout.vllm, cfg.hardware.device
    yield bool(v.url) and v.mode != "server", "rollout.vllm.url names a server; type rollout.vllm.mode=server"
    yield (
        v.sleep > 0 and (device == "cpu" or bool(v.url)),
        f"rollout.vllm.sleep={v.sleep} frees GPU memory of an engine that this run starts; set rollout.vllm.sleep=0",
    )
    yield (
        v.transfer in ("ipc", "nccl") and device == "cpu",
        f"rollout.vllm.transfer={v.transfer} is between GPUs; type rollout.vllm.transfer=files",
    )
    yield (
        (v.transfer == "ipc" and v.mode == "server") or (v.transfer == "nccl" and v.mode == "inprocess"),
        f"rollout.vllm.transfer={v.transfer} does not fit rollout.vllm.mode={v.mode}: "
        "an engine in the learner's GPU takes ipc, a server on other GPUs takes nccl, and both take files",
    )
    yield (
        v.tensor_parallel > 1 and v.mode == "inprocess",
        f"rollout.vllm.tensor_parallel={v.tensor_parallel} needs GPUs beside the learner's; type rollout.vllm.mode=server",
    )


OWNED = {  # DeepSpeed keys that other settings decide, and which
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "hardware.micro_batch_tokens",
    "gradient_accumulation_steps": "hardware.micro_batch_tokens",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "hardware.precision",
    "fp16": "hardware.precision",
    "zero_optimization.stage": "hardware.zero",
    "zero_optimization.offload_optimizer.device": "hardware.offload",
    "zero_optimization.offload_param.device": "hardware.offload",
}


def check_deepspeed(extra: Mapping[str, Any]) -> None:
    """Refuse keys that other settings decide, and top-level keys that DeepSpeed does not know and would skip without a word."""
    for key, other in OWNED.items():
        node: Any = extra
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node is not None:
            raise ConfigError(f"hardware.deepspeed.{key}: {other} decides it; set that instead")
    unknown = [k for k in extra if k not in _deepspeed_words()] if extra else []
    if unknown:
        found = nearest(unknown[0], _deepspeed_words())
        raise ConfigError(f"hardware.deepspeed.{unknown[0]}: DeepSpeed has no such key{found}")


@cache
def _deepspeed_words() -> frozenset[str]:
    """Every quoted name in the files of DeepSpeed that read its configuration, without importing it."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("hardware.deepspeed: DeepSpeed is not installed; type rlhf doctor")
    root = Path(spec.submodule_search_locations[0])
    files = [p for name in ("config.py", "constants.py", "engine.py") for p in root.rglob(name)]
    words = [re.findall(r"[\"'](\w+)[\"']", p.read_text(encoding="utf-8", errors="replace")) for p in files]
    return frozenset(w for found in words for w in found)
