"""Settings that are wrong by themselves or exclude each other, whatever the method. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rlhf_cli.config import nearest
from rlhf_cli.errors import ConfigError
from rlhf_cli.rollout.backends import BACKENDS, require

SWITCHES = ("shuffled_reward",)  # of `debug`


def check_numbers(cfg: Any) -> None:
    """Cross-field checks of plain settings."""
    b, hw = cfg.batch, cfg.hardware
    for key, value, least in (
        ("batch.prompts", b.prompts, 1),
        ("batch.samples", b.samples, 1),
        ("batch.epochs", b.epochs, 1),
        ("batch.minibatches", b.minibatches, 1),
        ("rollout.max_tokens", cfg.rollout.max_tokens, 1),
        ("rollout.min_tokens", cfg.rollout.min_tokens, 0),
        ("rollout.temperature", cfg.rollout.temperature, 0),
        ("rollout.top_k", cfg.rollout.top_k, 0),
        ("rollout.rows", cfg.rollout.rows, 0),
        ("steps", cfg.steps, 0),
        ("model.lora.r", cfg.model.lora.r, 0),
        ("optim.lr", cfg.optim.lr, 0),
        ("optim.eps", cfg.optim.eps, 0),
        ("optim.clip", cfg.optim.clip, 0),
        ("optim.weight_decay", cfg.optim.weight_decay, 0),
        ("optim.warmup", cfg.optim.warmup, 0),
        ("checkpoint.keep", cfg.checkpoint.keep, 1),
        ("checkpoint.every", cfg.checkpoint.every, 0),
        ("eval.every", cfg.eval.every, 0),
        ("eval.prompts", cfg.eval.prompts, 0),
        ("eval.bootstrap", cfg.eval.bootstrap, 1),
        ("gates.constant_steps", cfg.gates.constant_steps, 1),
        ("gates.logp_every", cfg.gates.logp_every, 1),
        ("rollout.vllm.tensor_parallel", cfg.rollout.vllm.tensor_parallel, 1),
        ("rollout.vllm.max_model_len", cfg.rollout.vllm.max_model_len, 0),
        ("hardware.timeout", hw.timeout, 1),
        ("hardware.processes", hw.processes, 0),
        ("hardware.threads", hw.threads, 0),
        ("hardware.micro_batch_tokens", hw.micro_batch_tokens, 0),
    ):
        if value < least:
            raise ConfigError(f"{key}={value}: must be at least {least}")
    for key, value, allowed in (
        ("hardware.precision", hw.precision, ("auto", "fp32", "bf16")),
        ("hardware.device", hw.device, ("auto", "cpu", "cuda")),
        ("hardware.offload", hw.offload, ("none", "cpu")),
        ("hardware.zero", hw.zero, (0, 1, 2, 3)),
        ("rollout.backend", cfg.rollout.backend, tuple(BACKENDS)),
        ("rollout.vllm.mode", cfg.rollout.vllm.mode, ("inprocess", "server")),
        ("rollout.vllm.transfer", cfg.rollout.vllm.transfer, ("auto", "files", "ipc", "nccl")),
        ("rollout.vllm.sleep", cfg.rollout.vllm.sleep, (0, 1, 2)),
        ("optim.schedule", cfg.optim.schedule, ("constant", "linear", "cosine")),
        *(("debug", switch, SWITCHES) for switch in cfg.debug),
    ):
        if value not in allowed:
            choices = ", ".join(map(str, allowed))
            raise ConfigError(
                f"{key}: {value!r} is not allowed; choose one of {choices}{nearest(str(value), map(str, allowed))}"
            )
    require(cfg.rollout.backend)
    for wrong, message in (*_conflicts(cfg), *_vllm_conflicts(cfg)):
        if wrong:
            raise ConfigError(message)


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
    yield not 0 < r.top_p <= 1, f"rollout.top_p={r.top_p}: must be above 0 and at most 1"
    yield (
        hw.offload != "none" and hw.zero < 2,
        f"hardware.offload={hw.offload} needs hardware.zero=2 or 3; it is {hw.zero}",
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
