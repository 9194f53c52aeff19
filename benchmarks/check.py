"""Whether a change made training slower: W1, against the stored result of a machine of this kind.

python benchmarks/check.py            compare; status 1 below 85 % of the stored result
python benchmarks/check.py --store    store a new result

Machines are shared and slow down, so what is compared is our speed relative to a fixed piece of torch code that runs in turn with
our steps: tokens per unit of that work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from channel import Child
from machine import describe
from models import folder_of
from workloads import WORKLOADS, Job, write

STORED = Path(__file__).parent / "results" / "check.json"
LEAST = 0.85


def measure(args: argparse.Namespace, work: Path) -> dict[str, float]:
    """Median tokens per second, seconds of the fixed work, and their product."""
    from transformers import AutoTokenizer

    folder = folder_of(args.model, work, "bf16" if args.device == "cuda" else "fp32")
    w = WORKLOADS[args.workload]
    write(work / "records", "", AutoTokenizer.from_pretrained(folder), w)
    job = Job(w, args.precision, args.device, args.threads, str(folder), str(work / "records"))
    speeds, reference = [], []
    with (
        Child("calibrate.py", job.dumps(), work / "calibrate.log") as fixed,
        Child("ours.py", job.dumps(), work / "ours.log") as ours,
    ):
        fixed.ask()
        ours.ask()
        ours.ask("step")  # the first is slower
        for _ in range(args.steps):
            before = fixed.ask("measure")["seconds"]
            step = ours.ask("step")
            after = fixed.ask("measure")["seconds"]
            speeds.append(step["tokens"] / step["step_seconds"])
            reference.append((before + after) / 2)
            print(f"  step {step['step_seconds']:.2f} s, fixed work {reference[-1]:.3f} s", flush=True)
    score = statistics.median(a * b for a, b in zip(speeds, reference, strict=True))
    return {
        "tokens_per_second": statistics.median(speeds),
        "fixed_work_seconds": statistics.median(reference),
        "tokens_per_fixed_work": score,
    }


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--store", action="store_true", help="store the result as the one to compare with")
    p.add_argument("--workload", default="W1")
    p.add_argument("--precision", default="bf16")
    p.add_argument("--model", default="smollm2")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--threads", type=int, default=0, help="0: every core")
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--stored", default=str(STORED))
    args = p.parse_args(argv)
    args.threads = args.threads or len(os.sched_getaffinity(0))
    about = describe(args.device, args.threads)
    where = about["hardware"]["accelerator"] or about["hardware"]["cpu"]
    key = f"{where}, {args.threads} threads, {args.model}, {args.workload}, {args.precision}"
    stored: dict[str, Any] = json.loads(Path(args.stored).read_text()) if Path(args.stored).exists() else {}
    print(key)
    with tempfile.TemporaryDirectory() as work:
        found = measure(args, Path(work))
    if args.store:
        stored[key] = {**about, **found}
        Path(args.stored).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        print(f"stored: {found['tokens_per_fixed_work']:.1f} tokens per unit of fixed work")
        return 0
    if key not in stored:
        print(f"{args.stored} has no result of this kind of machine; make one: python benchmarks/check.py --store")
        return 2
    ratio = found["tokens_per_fixed_work"] / stored[key]["tokens_per_fixed_work"]
    print(f"{ratio:.0%} of the stored speed of {stored[key]['date']} (at least {LEAST:.0%} wanted)")
    return int(ratio < LEAST)


if __name__ == "__main__":
    raise SystemExit(main())
