"""Material for the engine tests; as a program, a few steps of every ZeRO stage under `torch.distributed.run`."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.engine.comm import Comm, start
from rlhf_cli.engine.deepspeed import DeepSpeedEngine, Setup
from rlhf_cli.engine.following import Follower
from rlhf_cli.engine.masters import MasterEngine
from rlhf_cli.models import packing
from rlhf_cli.models.heads import PolicyHead
from rlhf_cli.objectives import dpo, ppo_clip
from rlhf_cli.reduce import sequence_mean
from rlhf_cli.types import Experience, Term, Update

LR = 1e-3
SETUP = Setup(
    zero=0, bf16=False, offload="none", nvme_path="", budget=24, lr=LR, betas=(0.9, 0.999), eps=1e-2, weight_decay=0.01, clip=0.5, extra={}
)  # fmt: skip
surrogate = Term("surrogate", partial(ppo_clip, eps_low=0.2, eps_high=0.2, dual_clip=None), sequence_mean)
preference = Term("preference", partial(dpo, beta=0.3, label_smoothing=0.0))
FUSED, COUPLED = Update((surrogate,)), Update((preference, surrogate))
SCHEDULE = (FUSED, COUPLED, FUSED)


def experience() -> Experience:
    """Eight ragged rows in four groups of two, pairs across groups."""
    g = torch.Generator().manual_seed(0)
    n, t = 8, 14
    ids = torch.randint(0, 50, (n, t), generator=g)
    ids[1::2, :4] = ids[::2, :4]
    attention = torch.arange(t) < torch.randint(6, t + 1, (n, 1), generator=g)
    mask = attention & (torch.arange(t) >= 4)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(n, t, generator=g) * mask

    return Experience(
        ids=ids * attention, attention=attention, mask=mask, group=torch.arange(n) // 2,
        pairs=torch.tensor([[0, 5], [1, 6], [2, 7], [3, 4]]), ref_logp=-4 * mask + noise(0.5), old_logp=-4 * mask + noise(0.2),
        advantage=noise(2.0),
    )  # fmt: skip


def head(dtype: torch.dtype = torch.float32) -> PolicyHead:
    """A tied two-layer Llama; equal at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    packing.register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            attn_implementation=packing.ATTENTION, tie_word_embeddings=True,
        )  # fmt: skip
        return PolicyHead(LlamaForCausalLM(config).eval().to(dtype), temperature=1.0, packing=True)


def engine(comm: Comm, **changes: Any) -> DeepSpeedEngine:
    return DeepSpeedEngine(
        "policy", head(torch.bfloat16 if changes.get("bf16") else torch.float32), replace(SETUP, **changes), comm
    )


def weights(e: DeepSpeedEngine) -> dict[str, Tensor]:
    """Whole weights, copied."""
    trained = set(e.trained)
    return {name: value.clone() for name, value in e.full_state() if name in trained}


def offloaded(e: DeepSpeedEngine) -> list[str]:
    """Where DeepSpeed says that optimizer state and parameters are, if not on the device."""
    if isinstance(e.engine, MasterEngine):
        return []
    return [str(x.device) for x in (e.engine.zero_offload_optimizer(), e.engine.zero_offload_param()) if x is not None]


def steps(e: DeepSpeedEngine, updates: tuple[Update, ...] = SCHEDULE) -> list[dict[str, float]]:
    return [e.step(experience(), u, lr=LR) for u in updates]


def settings(out: Path) -> dict[str, dict[str, Any]]:
    """Every way to shard: the stages, and stage 3 with parameters and state elsewhere; a disk only where DeepSpeed can reach one."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    found: dict[str, dict[str, Any]] = {f"zero{zero}": {"zero": zero} for zero in (0, 1, 2, 3)}
    found["bf16"] = {"bf16": True}
    found["zero2-cpu"] = {"zero": 2, "offload": "cpu"}
    found["zero3-cpu"] = {"zero": 3, "offload": "cpu"}
    if AsyncIOBuilder().is_compatible(verbose=False):
        found["zero3-nvme"] = {"zero": 3, "offload": "nvme", "nvme_path": str(out / "disk")}
    return found


def followed(e: DeepSpeedEngine) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The schedule with a copy every second step and an average beside it: statistics of the steps, and the weights of both."""
    rules: dict[str, Any] = {"copy": {"every": 2, "decay": 0.0}, "average": {"every": 1, "decay": 0.5}}
    own = next(e.engine.module.parameters()).dtype
    models = {name: Follower(name, head(own), e, **rule) for name, rule in rules.items()}
    stats = []
    for step, update in enumerate(SCHEDULE, 1):
        stats += steps(e, (update,))
        for model in models.values():
            model(step)
    return stats, {f"{name}/{k}": p.detach().clone() for name, m in models.items() for k, p in m.own.items()}


def main(out: Path) -> None:
    """Every way to shard: steps, a checkpoint, more steps, and the same again from the checkpoint."""
    comm = start(torch.device("cpu"))
    for name, changes in settings(out).items():
        e = engine(comm, **changes)
        stats, beside = followed(e)
        folder = out / name
        folder.mkdir(exist_ok=True)
        comm.barrier()
        state = e.save(folder)
        comm.barrier()
        before = weights(e)
        more = steps(e, (COUPLED, FUSED))
        after = weights(e)
        e.load(folder, state)
        loaded = weights(e)
        again = steps(e, (COUPLED, FUSED))
        final = weights(e)
        if comm.rank == 0:
            kept = {
                "stats": stats,
                "beside": beside,
                "more": more,
                "again": again,
                "before": before,
                "loaded": loaded,
                "after": after,
                "final": final,
                "offload": offloaded(e),
            }
            torch.save(copy.deepcopy(kept) | {"state": state, "world": comm.world}, folder / "kept.pt")
        comm.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
