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
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from channel import Child
from machine import describe, version
from models import folder_of
from workloads import WORKLOADS, Job, write

STORED = Path(__file__).parent / "results" / "check.json"
LEAST = 0.85
SCORE = "tokens_per_fixed_work"


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
        SCORE: score,
    }


def verdict(key: str, found: Mapping[str, float], stored: Mapping[str, Any], file: str) -> tuple[int, str]:
    """Exit status and what to say: 0 fast enough, 1 slower than LEAST of the stored speed, 2 nothing to compare with."""
    if key not in stored:
        known = "; ".join(stored) or "nothing"
        return 2, (
            f"{file} has no result of this kind of machine and job, it has: {known}; make one: python benchmarks/check.py --store"
        )
    was = stored[key]
    ratio = found[SCORE] / was[SCORE]
    text = f"{ratio:.0%} of the stored speed of {was['date']} (at least {LEAST:.0%} wanted)"
    changed = [
        f"{name} {old} -> {new}"
        for name, old in was.get("versions", {}).items()
        if (new := version(name) if name != "python" else platform.python_version()) != old
    ]
    return int(not ratio >= LEAST), text + (f"; since then: {', '.join(changed)}" if changed else "")


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
    if not args.store and key not in stored:  # before minutes of measuring
        status, text = verdict(key, {}, stored, Path(args.stored).name)
        print(text)
        return status
    with tempfile.TemporaryDirectory() as work:
        found = measure(args, Path(work))
    if args.store:
        stored[key] = {**about, **found}
        Path(args.stored).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        print(f"stored: {found[SCORE]:.1f} tokens per unit of fixed work")
        return 0
    status, text = verdict(key, found, stored, Path(args.stored).name)
    print(text)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
