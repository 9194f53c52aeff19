"""Whether a setting pays: steps of a workload without it and with it, in turn, each side in a process of its own.

python benchmarks/settings.py "model.kernels=[compile]" --workload W1 --precision bf16
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from channel import Child
from grpo_step import save, spoken
from machine import describe
from models import folder_of
from workloads import WORKLOADS, Job, write


def measure(job: Job, settings: Sequence[str], steps: int, work: Path) -> dict[str, dict[str, Any]]:
    """Medians of `steps` steps without and with the settings, after one of each that is left out and told as the first."""
    sides = {"without": (), "with": tuple(settings)}
    children = {
        name: Child("ours.py", replace(job, extra=(*job.extra, *more)).dumps(), work / f"{name}.log")
        for name, more in sides.items()
    }
    try:
        for child in children.values():
            child.ask()
        rounds = [{name: child.ask("step") for name, child in children.items()} for _ in range(steps + 1)]
    finally:
        for child in children.values():
            child.quit()
    return {
        name: {
            "first_step_seconds": rounds[0][name]["step_seconds"],
            "step_seconds": statistics.median(r[name]["step_seconds"] for r in rounds[1:]),
            "seconds": {
                p: statistics.median(r[name]["seconds"].get(p, 0.0) for r in rounds[1:])
                for p in ("rollout", "annotate", "update")
            },
            "peak_gb": max(r[name]["step_peak_gb"] for r in rounds[1:]),
            "loss": [r[name]["loss"] for r in rounds],
            "notes": [x for x in (work / f"{name}.log").read_text().splitlines() if x.startswith("model.kernels")],
        }
        for name in sides
    }


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("settings", nargs="+", help="KEY=VALUE of the side that has them")
    p.add_argument("--workload", default="W1")
    p.add_argument("--precision", default="bf16")
    p.add_argument("--model", default="smollm2")
    p.add_argument("--data", default="")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--threads", type=int, default=0, help="0: every core")
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--out", default="", help="result file; default: only printed")
    args = p.parse_args(argv)
    args.threads = args.threads or len(os.sched_getaffinity(0))
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model, w = folder_of(args.model, work, "bf16" if args.device == "cuda" else "fp32"), WORKLOADS[args.workload]
        write(work / "records", args.data, AutoTokenizer.from_pretrained(model), w)
        job = Job(w, args.precision, args.device, args.threads, str(model), str(work / "records"))
        found = measure(job, args.settings, args.steps, work)
    for name, side in found.items():
        spent = ", ".join(f"{k} {v:.2f}" for k, v in side["seconds"].items())
        print(
            f"{name}: {side['step_seconds']:.2f} s ({spent}), first step {side['first_step_seconds']:.1f} s, {side['peak_gb']:.1f} GB"
        )
        print("".join(f"  {x}\n" for x in side["notes"]), end="")
    if args.out:
        command = spoken("settings.py", sys.argv[1:] if argv is None else argv)
        save(Path(args.out), {**describe(args.device, args.threads), "command": command, "sides": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
