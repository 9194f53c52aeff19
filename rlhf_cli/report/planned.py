"""The printed plan: what runs, in which order, on what, and what it needs."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

from omegaconf import OmegaConf

from rlhf_cli.hardware import memory, resolve_hardware
from rlhf_cli.launch.choose import launcher_of
from rlhf_cli.plan import HEADS, Plan, validate


def describe(cfg: Any) -> str:
    """The plan as text: what runs, in which order, on what, and what it needs."""
    plan, launcher, cfg = validate(cfg), launcher_of(cfg), deepcopy(cfg)
    OmegaConf.update(cfg, "hardware", launcher.hardware(cfg, here=False), merge=True)
    hw = resolve_hardware(cfg, here=False)
    world = hw["processes"] * cfg.hardware.nodes
    machines = f"{cfg.hardware.nodes} machines, " if cfg.hardware.nodes > 1 else ""
    threads = f"{cfg.hardware.threads} threads" if cfg.hardware.threads else "all cores that the job gets"
    names = dict(cfg.names)
    title = " ".join(f"{k}={names[k]}" for k in ("algo", "reward", "dataset", "model") if names.get(k))
    lines = [title, "", "Batch"]
    lines += _batch(cfg, plan, world)
    lines.append(f"  micro-batches of up to {hw['micro_batch_tokens']} tokens; the gradient does not depend on them")
    lines += [
        "",
        "Hardware",
        f"  {hw['device']}, {machines}{world} x {threads}, {hw['precision']}, ZeRO-{cfg.hardware.zero}, offload {cfg.hardware.offload}",
    ]
    lines += ["", "Models"] + [f"  {name:<14}{why}" for name, why in plan.models.items()]
    copies = {}
    if "reference" in plan.models and not cfg.model.lora.r:
        copies["reference"] = "frozen weights"
    copies |= dict.fromkeys(cfg.frozen, "frozen weights")
    if plan.source == "sampled" and (cfg.hardware.zero == 3 or "policy" not in plan.learners):
        copies["sampler"] = "a whole copy that samples"
    lines += ["", "Memory per process (estimate)", *memory(cfg, plan.learners, copies, hw | {"processes": world})]
    lines += ["", "Flow"] + [f"  {s.name:<38}{s.does}" for s in plan.stages]
    lines += ["", "Columns", f"  {'':<16}{'made by':<32}taken by"]
    lines += [f"  {c:<16}{who:<32}{', '.join(takers) or '-'}" for c, who, takers in _columns(plan)]
    script = launcher.script(cfg)
    if script:
        lines += ["", "Batch script"] + [f"  {line}".rstrip() for line in script.splitlines()]
    if plan.notes:
        lines += ["", "Notes"] + [f"  {n}" for n in plan.notes]
    return "\n".join(lines)


def _batch(cfg: Any, plan: Plan, world: int) -> list[str]:
    """The batch identity."""
    b = cfg.batch
    over = f"over {world} process{'es' if world > 1 else ''}"
    updates = cfg.steps * b.epochs * b.minibatches
    count = f"  {cfg.steps} steps x {b.epochs} epochs x {b.minibatches} minibatches = {updates} optimizer steps"
    if plan.source == "recorded":
        return [f"  {b.prompts} records a step with all their responses, {over}", count]
    rows = b.prompts * b.samples
    drawn = b.prompts * (b.samples + plan.greedy) * b.resample
    more = "; a greedy response to each prompt besides" if plan.greedy else ""
    rollouts = f" in up to {b.resample} rollouts" if b.resample > 1 else ""
    return [
        f"  {b.prompts} prompts x {b.samples} samples = {rows} rows a step, {over}{more}",
        count,
        f"  at most {drawn * cfg.rollout.max_tokens} new tokens a step{rollouts} ({cfg.rollout.max_tokens} a response)",
    ]


def _columns(plan: Plan) -> Iterable[tuple[str, str, list[str]]]:
    made: dict[str, str] = {}
    for s in plan.stages:
        for c in s.gives:
            made.setdefault(c, s.name)
    outputs = {c: f"{learner} forward" for learner, head in plan.learners.items() for c in HEADS[head]}
    for c, who in {**made, **outputs}.items():
        yield c, who, [s.name for s in plan.stages if c in s.needs]
