"""A learner under DeepSpeed: the one engine for a laptop CPU, one GPU, and ZeRO 0-3 over many processes.

Checkpoints hold whole fp32 tensors by parameter name, whatever the stage and the number of processes, so a run can go on with
another of either; nothing is pickled.
"""

from __future__ import annotations

import io
import math
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cli.diagnostics import DIAGNOSTICS, WHOLE
from rlhf_cli.engine import step as exact
from rlhf_cli.engine.comm import Comm
from rlhf_cli.engine.masters import MasterEngine
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.inject import call, needs
from rlhf_cli.models.heads import stage_inputs
from rlhf_cli.pulse import alive
from rlhf_cli.types import COLUMNS, Experience, Update

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Setup:
    """What an engine needs to know besides its module."""

    zero: int
    bf16: bool
    offload: str
    nvme_path: str
    budget: int  # tokens per micro-batch
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float
    extra: Mapping[str, Any]


class DeepSpeedEngine:
    """A module that returns columns, its optimizer, and the exact step over all processes."""

    def __init__(self, name: str, module: nn.Module, setup: Setup, comm: Comm) -> None:
        self.name, self.setup, self.comm = name, setup, comm
        self.updates = 0  # optimizer steps taken
        self.moved = False  # the last step changed weights
        self._finite: list[Tensor] = []
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        # Without ZeRO, DeepSpeed's bf16 would accumulate gradients in bf16; its stage 1 keeps them in fp32, by copies of all of them.
        own = setup.zero == 0 and setup.offload == "none" and not setup.extra
        self.stage = 1 if setup.bf16 and setup.zero == 0 and not own else setup.zero
        if own:
            self.engine: Any = MasterEngine(module, partial(_adamw, setup), setup.clip, comm.world)
            self._optimizer = self.engine.optimizer
            self._make_moments()  # what stays is allocated before what comes and goes, which would leave holes
        else:
            self._optimizer = _adamw(setup, list(trained.values()))
            with redirect_stdout(io.StringIO()):  # it prints memory tables
                self.engine, *_ = _initialize(module, self._optimizer, setup, self.stage)
        self.trained = {n: p for n, p in self.engine.module.named_parameters() if n in trained}
        for p in self.trained.values():
            p.register_hook(self._watch)

    @property
    def module(self) -> nn.Module:
        """The wrapped head."""
        return self.engine.module

    def _watch(self, grad: Tensor) -> None:
        self._finite.append(grad.sum())  # a non-finite entry makes the sum non-finite; read once per step

    def _forward(self, want: frozenset[str]) -> exact.Forward:
        return lambda exp, rows: self.engine(**stage_inputs(exp, rows), want=want)

    def batches(self, exp: Experience, matter: Tensor | None = None) -> exact.Batches:
        """This rank's micro-batches, of all rows or of those that `matter` [N]."""
        packing = bool(self.module.packing)
        return exact.micro_batches(exp, self.comm.world, self.setup.budget, packing, matter)[self.comm.rank]

    def infer(self, exp: Experience, want: frozenset[str], matter: Tensor | None = None) -> dict[str, Tensor]:
        """Outputs `want` of all rows or of those that `matter`, 0 elsewhere, without gradient, on every rank."""
        outs = exact.infer(exp, self.batches(exp, matter), self._forward(want))
        return {k: self.comm.sum(v) for k, v in outs.items()}

    def step(self, exp: Experience, update: Update, *, lr: float) -> dict[str, float]:
        """One optimizer step on the terms of `update`. Raises GateError before the optimizer on a non-finite loss or gradient."""
        terms = update.terms
        matter = exact.that_matter(terms, exp)
        batches = self.batches(exp, matter)
        forward = self._forward(exact.wanted(terms))
        self._finite.clear()
        if exact.single_pass_is_exact(terms):
            mine = exact.single_pass(terms, exp, batches, forward, self._backward)
            outs = {k: self.comm.sum(v) for k, v in mine.items()}
        else:
            outs = self.infer(exp, exact.wanted(terms), matter)
            exact.two_pass(terms, exp, outs, batches, forward, self._backward)
        full = exact.complete(exp, outs)
        losses = exact.term_losses(terms, exp, full, [exact.weights_of(t, exp) for t in terms])
        stats = {f"loss/{k}": float(v) for k, v in losses.items()}
        stats["loss"] = sum(stats.values())
        self._refuse_non_finite(stats)
        stats["grad_norm"] = self._apply(lr)
        stats["lr"] = lr
        self.updates += 1
        self.moved = lr > 0 and stats["grad_norm"] > 0
        kept = matter.nonzero().flatten()
        if len(kept) < len(exp):  # the others were not forwarded, so nothing is known of them
            exp, full = exp.rows(kept), {k: v[kept] for k, v in full.items()}
        return stats | (diagnose(exp, full) if len(kept) else {})

    def evaluate(self, exp: Experience, update: Update) -> dict[str, float]:
        """The terms' values and the diagnostics without an update."""
        full = exact.complete(exp, self.infer(exp, exact.wanted(update.terms)))
        losses = exact.term_losses(update.terms, exp, full, [exact.weights_of(t, exp) for t in update.terms])
        stats = {f"loss/{k}": float(v) for k, v in losses.items()}
        return {**stats, "loss": sum(stats.values()), **diagnose(exp, full)}

    def _backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(
            self.comm.world * loss.to(self.comm.device), scale_wrt_gas=False
        )  # DeepSpeed averages over ranks; our shares add up

    def _refuse_non_finite(self, stats: Mapping[str, float]) -> None:
        grads = bool(torch.stack([g.float() for g in self._finite]).isfinite().all()) if self._finite else True
        bad = sorted(k for k, v in stats.items() if not math.isfinite(v))
        for rank, (losses, ok) in enumerate(self.comm.gather((bad, grads))):
            if losses or not ok:
                what = f"{losses[0]} is not finite" if losses else "a gradient is not finite"
                raise GateError(
                    f"rank {rank}: {self.name}: {what} at optimizer step {self.updates}; no weight was changed. "
                    "Lower optim.lr, or set hardware.precision=fp32"
                )

    def _apply(self, lr: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        if self.stage > 0 or isinstance(self.engine, MasterEngine):
            self.engine.step()
            return float(self.engine.get_global_grad_norm())
        grads = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.setup.clip:
            torch.nn.utils.clip_grads_with_norm_(list(self.trained.values()), self.setup.clip, norm)
        self.engine.step()
        return float(norm)

    # -- weights in and out ------------------------------------------------------------------------------------------

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of every parameter and buffer, one at a time; a collective under ZeRO-3."""
        import deepspeed

        for name, p in self.engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([p]) if self.stage == 3 else nullcontext():
                yield name, p.detach()
            alive()
        yield from self.engine.module.named_buffers()

    def save(self, folder: Path) -> dict[str, Any]:
        """Write fp32 weights and moments of the trained parameters into `folder` (rank 0); all ranks must call."""
        from safetensors.torch import save_file

        parts = ("weights", *(MOMENTS if self.updates else ()))
        for part in parts:
            whole = {}
            for name, p in self.trained.items():
                value = self._read(p, part)
                alive()
                if self.comm.rank == 0:
                    whole[name] = value.detach().cpu().contiguous()
            if self.comm.rank == 0:
                save_file(whole, folder / f"{self.name}.{part}.safetensors")
        return {"updates": self.updates}

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Read what `save` wrote, for any stage and number of processes."""
        from safetensors import safe_open

        self.updates = int(state["updates"])
        if self.updates:
            self._make_moments()
        for part in ("weights", *(MOMENTS if self.updates else ())):
            with safe_open(folder / f"{self.name}.{part}.safetensors", framework="pt") as f:
                for name, p in self.trained.items():
                    self._write(p, part, f.get_tensor(name))

    def _read(self, p: nn.Parameter, part: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if isinstance(self.engine, MasterEngine):
            return self._master(p, part)
        if self.stage == 0:
            return p if part == "weights" else self._optimizer.state[p].get(part, torch.zeros_like(p))
        return safe_get_full_fp32_param(p) if part == "weights" else safe_get_full_optimizer_state(p, part)

    def _write(self, p: nn.Parameter, part: str, value: Tensor) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = value.to(self.comm.device)
        if isinstance(self.engine, MasterEngine):
            self._master(p, part).copy_(value)
            if part == "weights":
                p.data.copy_(value)
        elif self.stage == 0:
            (p.data if part == "weights" else self._optimizer.state[p][part]).copy_(value)
        elif part == "weights":
            safe_set_full_fp32_param(p, value)
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0) if self.stage == 3 else nullcontext():
                p.data.copy_(value.to(p.dtype))
        else:
            safe_set_full_optimizer_state(p, value, part)

    def _master(self, p: nn.Parameter, part: str) -> Tensor:
        """A parameter's part of the flat fp32 weights or moments."""
        own = self.engine
        return own.masters[p] if part == "weights" else own.views(self._optimizer.state[own.flat][part])[p]

    def _make_moments(self) -> None:
        """AdamW makes its state at the first step; a resumed one needs it before."""
        wrapped = self.engine.optimizer
        for attribute in (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
        ):
            masters = getattr(wrapped, attribute, None)
            if masters is not None:
                break
        else:
            masters = [self.engine.flat] if isinstance(self.engine, MasterEngine) else list(self.trained.values())
        for x in masters:
            state = self._optimizer.state[x]
            if not state:  # DeepSpeed keeps views into existing moments, so those stay in place
                state |= {m: torch.zeros_like(x.data) for m in MOMENTS}
            state["step"] = torch.tensor(float(self.updates), device=x.device)
        link = getattr(wrapped, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()


class Frozen:
    """A model that is only read, its rows shared among ranks like the learners': the reference. It has no mask of what was allowed."""

    def __init__(
        self, module: nn.Module, setup: Setup, comm: Comm, around: AbstractContextManager[Any] | Any = None
    ) -> None:
        self.module, self.setup, self.comm = module, setup, comm
        self.around = around or nullcontext

    def infer(self, exp: Experience, want: frozenset[str]) -> dict[str, Tensor]:
        """Outputs `want` of all rows, on every rank."""
        exp = replace(exp, allowed=None)
        batches = exact.micro_batches(exp, self.comm.world, self.setup.budget, bool(self.module.packing))[
            self.comm.rank
        ]
        with self.around():
            outs = exact.infer(exp, batches, lambda e, rows: self.module(**stage_inputs(e, rows), want=want))
        return {k: self.comm.sum(v) for k, v in outs.items()}


def _adamw(setup: Setup, params: list[nn.Parameter]) -> Any:
    return torch.optim.AdamW(
        params, lr=setup.lr, betas=setup.betas, eps=setup.eps, weight_decay=setup.weight_decay, fused=setup.offload == "none"
    )  # fmt: skip


def diagnose(exp: Experience, outs: Mapping[str, Tensor]) -> dict[str, float]:
    """Every diagnostic whose columns this run has."""
    have = set(outs) | {c for c in COLUMNS if getattr(exp, c) is not None}
    chosen = DIAGNOSTICS | {name: fn for name, fn in WHOLE.items() if needs(fn) <= have}
    return {name: float(call(fn, exp, outs)) for name, fn in chosen.items() if needs(fn) <= have}


def _initialize(module: nn.Module, optimizer: Any, setup: Setup, stage: int) -> tuple[Any, ...]:
    """DeepSpeed's engine; what it says against the user's own keys, or against this machine, is a ConfigError."""
    import deepspeed

    if setup.offload == "nvme":
        _require_aio(setup.nvme_path)
    try:
        return deepspeed.initialize(model=module, optimizer=optimizer, config=_config(setup, stage))
    except (ValueError, AssertionError, KeyError, TypeError) as e:
        if not setup.extra:
            raise
        raise ConfigError(
            f"hardware.deepspeed={dict(setup.extra)}: DeepSpeed refuses it: {' '.join(str(e).split())}"
        ) from e


def _require_aio(folder: str) -> None:
    """DeepSpeed writes to an NVMe disk through its async_io operator, which it compiles on first use."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    install = "install libaio (apt-get install libaio-dev, or dnf install libaio-devel), g++ and ninja, or type hardware.offload=cpu"
    try:
        builder = AsyncIOBuilder()
        if not builder.is_compatible(verbose=False):
            raise ConfigError(f"hardware.offload=nvme: DeepSpeed's async_io needs libaio, which is not here; {install}")
        builder.load(verbose=False)
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as e:
        why = (str(e).strip().splitlines() or [type(e).__name__])[0].partition(": [")[0]  # a compiler's command follows
        raise ConfigError(f"hardware.offload=nvme: DeepSpeed's async_io cannot be built ({why}); {install}") from e
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"hardware.nvme_path={folder}: {e.strerror}") from None


def _config(setup: Setup, stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if setup.offload != "none":
        where = {"device": setup.offload} | ({"nvme_path": setup.nvme_path} if setup.offload == "nvme" else {})
        zero["offload_optimizer"] = dict(where)
        if stage == 3:
            zero["offload_param"] = dict(where)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": setup.clip if stage > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if setup.bf16:
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return _merge(config, setup.extra)


def _merge(base: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in extra.items():
        base[key] = _merge(dict(base.get(key, {})), value) if isinstance(value, Mapping) else value
    return base
