"""From measured steps to the numbers that are compared, and the targets that they are held to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import flops

# (workload, precision) -> least throughput relative to TRL at its best micro-batch.
FASTER = {
    ("W1", "fp32"): 2.8, ("W1", "bf16"): 3.5, ("W2", "fp32"): 4.0, ("W2", "bf16"): 5.0, ("W4", "bf16"): 2.5,
}  # fmt: skip
MEMORY = {"fp32": 0.6, "bf16": 1.0}  # most peak memory relative to TRL's
UPDATE = {"fp32": 0.65, "bf16": 0.5}  # least share of the matrix peak in the update
ROLLOUT = 0.25  # and in the rollout
# The peak that a model's layers reach at the number of rows that a phase has.
OWN_LAYERS = {"rollout": "rollout_layers", "annotate": "update_layers", "update": "update_layers"}
EQUAL = {"float64": 1e-10, "float32": 1e-5}  # largest relative difference of loss and gradient


def side(record: Mapping[str, Any], d: flops.Decoder, name: str, peak: Mapping[str, float]) -> dict[str, Any]:
    """Medians over all steps but the first of the process, and shares of the peaks."""
    steps = record["steps"][1:] or record["steps"]
    names = list(steps[0]["seconds"])
    spent = {p: statistics.median(s["seconds"].get(p, 0.0) for s in steps) for p in names}
    work = flops.phases(d, steps[0]["groups"], name)
    speed = {
        p: statistics.median(flops.phases(d, s["groups"], name)[p] / s["seconds"][p] / 1e9 for s in steps) for p in work
    }
    total = statistics.median(s["step_seconds"] for s in steps)
    return {
        "step_seconds": total,
        "step_seconds_all": [round(s["step_seconds"], 3) for s in steps],
        "first_step_seconds": record["steps"][0]["step_seconds"],
        "seconds": spent,
        "peak_gb": {p: max(s["peak_gb"].get(p, 0.0) for s in steps) for p in names},
        "step_peak_gb": max(s["step_peak_gb"] for s in record["steps"]),
        "load_peak_gb": record["load_peak_gb"],
        "tokens_per_second": statistics.median(s["tokens"] / s["step_seconds"] for s in steps),
        "gflop": {p: n / 1e9 for p, n in work.items()},
        "gflops": speed,
        "share_of_peak": {p: v / peak["square"] for p, v in speed.items()},
        "share_of_own_layers": {p: v / peak[OWN_LAYERS[p]] for p, v in speed.items()},
    }


def summarise(entry: Mapping[str, Any], d: flops.Decoder) -> dict[str, Any]:
    """Both sides, TRL's best micro-batch, ratios, and which targets are met."""
    peak = entry["peak_gflops"]
    found: dict[str, Any] = {}
    if "ours" in entry:
        found["ours"] = side(entry["ours"], d, "ours", peak)
    tried = {n: side(x, d, "trl", peak) for n, x in entry["trl"].items() if "steps" in x}
    if tried:
        best = min(tried, key=lambda n: tried[n]["step_seconds"])
        found |= {
            "trl": tried[best],
            "trl_rows": int(best),
            "trl_step_seconds": {n: x["step_seconds"] for n, x in tried.items()},
        }
        found["trl_least_memory_gb"] = min(x["step_peak_gb"] for x in tried.values())
    if "ours" in found and tried:
        found["throughput_ratio"] = found["ours"]["tokens_per_second"] / found["trl"]["tokens_per_second"]
        found["memory_ratio"] = found["ours"]["step_peak_gb"] / found["trl"]["step_peak_gb"]
        found["same_prompts"] = same_prompts(entry, best)
    found["targets"] = targets(entry, found)
    return found


def same_prompts(entry: Mapping[str, Any], best: str) -> bool:
    """Whether both sides saw the same prompts, token for token, at equal steps."""
    mine = {s["step"]: s["digest"] for s in entry["ours"]["steps"]}
    return all(mine[s["step"]] == s["digest"] for s in entry["trl"][best]["steps"] if s["step"] in mine)


def targets(entry: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every target that this entry can be held to: its value, the limit, and whether it is met."""
    name, precision = entry["workload"]["name"], entry["precision"]
    made: dict[str, dict[str, Any]] = {}
    least = FASTER.get((name, precision))
    if "throughput_ratio" in found:
        if least:
            made["throughput against TRL"] = at_least(found["throughput_ratio"], least)
        made["peak memory against TRL"] = at_most(found["memory_ratio"], MEMORY[precision])
        made["same prompts on both sides"] = at_least(float(found["same_prompts"]), 1.0)
    if "ours" in found:
        for key, what in (("share_of_peak", "large matrices"), ("share_of_own_layers", "its own layers")):
            shares = found["ours"][key]
            made[f"update, share of the peak of {what}"] = at_least(shares["update"], UPDATE[precision])
            made[f"rollout, share of the peak of {what}"] = at_least(shares["rollout"], ROLLOUT)
    for dtype, gap in entry.get("equality", {}).items():
        made[f"loss, {dtype}"] = at_most(gap["loss"], EQUAL[dtype])
        made[f"gradient, {dtype}"] = at_most(gap["gradient"], EQUAL[dtype])
        if "fast_against_float64" in gap:
            made[f"gradient, {dtype} against float64"] = at_most(gap["fast_against_float64"]["gradient"], EQUAL[dtype])
    return made


def at_least(value: float, limit: float) -> dict[str, Any]:
    return {"value": value, "at_least": limit, "met": value >= limit}


def at_most(value: float, limit: float) -> dict[str, Any]:
    return {"value": value, "at_most": limit, "met": value <= limit}


def line(entry: Mapping[str, Any]) -> str:
    """The entry in one line for the terminal."""
    s = entry["summary"]
    parts: list[str] = []
    if "ours" in s:
        o = s["ours"]
        spent = ", ".join(f"{k} {v:.2f}" for k, v in o["seconds"].items() if v >= 0.005)
        parts.append(
            f"ours {o['step_seconds']:.2f} s ({spent}), {o['tokens_per_second']:.0f} tokens/s, {o['step_peak_gb']:.1f} GB"
        )
    if "trl" in s:
        t = s["trl"]
        spent = ", ".join(f"{k} {v:.2f}" for k, v in t["seconds"].items() if v >= 0.005)
        parts.append(f"TRL at {s['trl_rows']} rows {t['step_seconds']:.2f} s ({spent}), {t['step_peak_gb']:.1f} GB")
    if "throughput_ratio" in s:
        parts.append(f"{s['throughput_ratio']:.2f} x its throughput, {s['memory_ratio']:.0%} of its memory")
    missed = [k for k, v in s["targets"].items() if not v["met"]]
    return "; ".join([*parts, f"missed: {', '.join(missed)}" if missed else "every target met"])


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares y = a + b x, its R^2, and the slope of log y against log x (1: proportional)."""
    slope, start = statistics.linear_regression(x, y)
    mean = statistics.fmean(y)
    rest = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    total = sum((b - mean) ** 2 for b in y)
    from math import log

    power = statistics.linear_regression([log(a) for a in x], [log(b) for b in y]).slope
    return {"intercept": start, "slope": slope, "r2": 1 - rest / total if total else 1.0, "exponent": power}
