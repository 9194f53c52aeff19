"""Ours against TRL, step by step in one run: time and peak memory per phase, tokens per second, shares of the machine's peak.

python benchmarks/grpo_step.py --workloads W1,W2,W3 --precisions fp32,bf16 --rows 4,8,32 --data FILE --out FILE

Both sides get the same prompts in the same order, the same reward, and generate every token. Each side is a process of its own;
their steps alternate, so that a machine that slows down slows both. TRL runs once for each number of rows per forward (--rows),
and its best counts. The first step of each is reported apart. Medians over the others are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import flops
from channel import Child, measured
from machine import describe
from models import folder_of
from summary import line, summarise
from workloads import WORKLOADS, Job, Workload, write

RESULTS = Path(__file__).parent / "results"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--workloads", default="W1,W2,W3", help=f"of {', '.join(WORKLOADS)}")
    p.add_argument("--precisions", default="fp32,bf16")
    p.add_argument("--steps", type=int, default=4, help="steps of each side, the first of which is left out")
    p.add_argument("--rows", default="4,8,32", help="TRL's rows per forward that are tried")
    p.add_argument("--only", choices=("ours", "trl"), help="one side alone")
    p.add_argument(
        "--no-equality", action="store_true", help="leave out the check of our fast path against the plain one"
    )
    p.add_argument("--data", default="", help="JSON lines of question and answer; default: the packaged prompts")
    p.add_argument("--model", default="smollm2", help="smollm2, random-tiny, random-0.5b, random-1b, or a folder")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--threads", type=int, default=0, help="0: every core")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of ours")
    p.add_argument("--work", default="", help="folder for records, logs and random models; default: a temporary one")
    p.add_argument("--out", default="", help="result file; default: benchmarks/results/grpo_step-DATE.json")
    return p.parse_args(argv)


Steps = list[dict[str, Any]]


def alternate(sides: Sequence[tuple[Child | None, Steps]], steps: int) -> None:
    """One step of each side in turn; each adds its records to its list."""
    for _ in range(steps):
        for child, found in sides:
            if child is not None:
                found.append(child.ask("step"))


def compare(job: Job, tries: Sequence[int], args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One workload in one precision: ours, and TRL at every micro-batch that divides the rows."""
    w = job.workload
    sizes = [n for n in tries if n <= w.rows and w.rows % n == 0] or [w.rows]
    entry: dict[str, Any] = {"workload": vars(w), "precision": job.precision, "trl": {}}
    with Child("ours.py", job.dumps(), work / "ours.log") if args.only != "trl" else nullcontext() as ours:
        if ours:
            entry["ours"] = {**ours.ask(), "steps": []}
        if args.only == "ours":
            alternate([(ours, entry["ours"]["steps"])], args.steps)
            return entry
        mine: Steps = entry["ours"]["steps"] if ours else []
        for n in sizes:
            theirs = Job(**{**vars(job), "rows": n, "start": len(mine)})
            entry["trl"][str(n)] = against(ours, mine, theirs, args.steps, work)
    return entry


def against(ours: Child | None, mine: Steps, theirs: Job, steps: int, work: Path) -> dict[str, Any]:
    """TRL at one micro-batch, in turn with ours, whose steps are added to `mine`."""
    other: Steps = []
    with Child("trl_side.py", theirs.dumps(), work / f"trl-{theirs.rows}.log") as child:
        try:
            found = child.ask()
            alternate([(ours, mine), (child, other)], steps)
        except RuntimeError as e:  # too much memory, say; the others still count
            if ours is not None and ours.ended():
                raise
            print(f"  trl, {theirs.rows} rows: {e}", flush=True)
            return {"failed": str(e).splitlines()[-1]}
    text = f"  trl, {theirs.rows} rows: {seconds(other):.2f} s/step"
    print(text + (f"; ours {seconds(mine[-steps:]):.2f}" if ours else ""), flush=True)
    return {**found, "steps": other}


def seconds(steps: Sequence[dict[str, Any]]) -> float:
    """Median of all steps but the first."""
    return statistics.median(s["step_seconds"] for s in steps[1:] or steps)


def layer_rows(entry: dict[str, Any]) -> int:
    """Tokens of one update without padding: the rows at which the layers' own peak is measured."""
    steps = (entry.get("ours") or next(x for x in entry["trl"].values() if "steps" in x))["steps"]
    return int(statistics.median(flops.packed(s["groups"]).tokens for s in steps))


def one(w: Workload, precision: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Measure, and say what came out."""
    from transformers import AutoConfig, AutoTokenizer

    folder = folder_of(args.model, work, "bf16" if args.device == "cuda" else "fp32")
    records = work / f"records-{w.name}"
    write(records, args.data, AutoTokenizer.from_pretrained(folder), w)
    job = Job(w, precision, args.device, args.threads, str(folder), str(records), extra=tuple(args.set))
    print(f"{w.name} {precision}: {w.prompts} prompts x {w.samples} responses x {w.new_tokens} tokens", flush=True)
    began = time.perf_counter()
    entry = compare(job, [int(n) for n in args.rows.split(",")], args, work)
    at = Job(**{**vars(job), "rows": layer_rows(entry)})
    entry["peak_gflops"] = measured("machine.py", at.dumps(), work / "machine.log")
    first = precision == args.precisions.split(",")[0]  # the comparison has dtypes of its own
    if first and not args.no_equality and args.only != "trl":
        entry["equality"] = {}
        for dtype in ("float32", "float64"):
            at = Job(**{**vars(job), "precision": dtype})
            entry["equality"][dtype] = measured("equality.py", at.dumps(), work / f"equality-{dtype}.log")
    entry["summary"] = summarise(entry, flops.decoder(AutoConfig.from_pretrained(folder), w.lora))
    entry["took_seconds"] = time.perf_counter() - began
    print("  " + line(entry), flush=True)
    return entry


def spoken(script: str, words: Sequence[str]) -> str:
    """The command line as it goes into a result: files by their names, since folders mean nothing elsewhere."""
    return " ".join(["python", f"benchmarks/{script}", *(Path(w).name if "/" in w else w for w in words)])


def save(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    args.threads = args.threads or len(os.sched_getaffinity(0))
    command = spoken("grpo_step.py", sys.argv[1:] if argv is None else argv)
    result: dict[str, Any] = {
        **describe(args.device, args.threads),
        "command": command,
        "model": args.model,
        "entries": [],
    }
    out = Path(args.out) if args.out else RESULTS / f"grpo_step-{result['date'][:10]}.json"
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work or temporary)
        work.mkdir(parents=True, exist_ok=True)
        for name in args.workloads.split(","):
            for precision in args.precisions.split(","):
                result["entries"].append(one(WORKLOADS[name], precision, args, work))
                save(out, result)  # what is measured stays, whatever comes after
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
