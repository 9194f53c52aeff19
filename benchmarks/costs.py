"""What is not the step itself: starting, gates and logging, growth with the batch's sizes, ZeRO over two processes.

python benchmarks/costs.py --sections start,gates,scaling,zero --data FILE --out FILE
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import flops
from channel import Child, measured
from grpo_step import RESULTS, save, spoken
from machine import describe
from models import folder_of
from summary import at_most, fit
from workloads import WORKLOADS, Job, Workload, overrides, write

BASE = Workload("scaling", 4, 4, 32, min_prompt_tokens=64)
SERIES = {
    "responses per prompt": [replace(BASE, samples=k) for k in (2, 4, 8)],
    "prompt tokens": [replace(BASE, min_prompt_tokens=n) for n in (32, 64, 128)],
    "response tokens": [replace(BASE, new_tokens=n) for n in (16, 32, 64)],
}
FILES = ["checkpoint.every=0", "checkpoint.export=false", "eval.prompts=4"]


class Bench:
    """The settings that all sections share."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.args, self.work = args, work
        self.folder = folder_of(args.model, work, "bf16" if args.device == "cuda" else "fp32")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        self.decoder = flops.decoder(AutoConfig.from_pretrained(self.folder))

    def job(self, w: Workload, *more: str) -> Job:
        records = self.work / f"records-{w.samples}-{w.new_tokens}-{w.min_prompt_tokens}"
        write(records, self.args.data, self.tokenizer, w)
        a = self.args
        return Job(w, a.precision, a.device, a.threads, str(self.folder), str(records), extra=(*a.set, *more))

    def train(self, name: str, w: Workload, more: Sequence[str]) -> tuple[float, list[dict[str, Any]]]:
        """`rlhf train` in a fresh process: seconds until the first row of metrics stands there, and all rows."""
        settings = overrides(self.job(w), *FILES, f"run.dir={self.work}", f"run.name={name}", *more)
        command = [*rlhf(), "train", *settings]
        metrics = self.work / name / "metrics.jsonl"
        began, first = time.perf_counter(), 0.0
        with (self.work / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            while process.poll() is None:
                if not first and metrics.exists() and metrics.stat().st_size:
                    first = time.perf_counter() - began
                time.sleep(0.01)
        if process.returncode:
            tail = (self.work / f"{name}.log").read_text().splitlines()[-5:]
            raise SystemExit(f"{' '.join(command)}\n{chr(10).join(tail)}")
        return first, [json.loads(x) for x in metrics.read_text().splitlines()]


def rlhf() -> list[str]:
    """The installed command beside this interpreter."""
    beside = Path(sys.executable).parent / "rlhf"
    found = str(beside) if beside.exists() else shutil.which("rlhf")
    return [found] if found else [sys.executable, "-m", "rlhf_cli.cli"]


def commands(bench: Bench) -> dict[str, Any]:
    """Commands that only print; medians."""

    def seconds(words: list[str], times: int = 10) -> float:
        spent = []
        for _ in range(times):
            began = time.perf_counter()
            subprocess.run([*rlhf(), *words], check=True, stdout=subprocess.DEVNULL)
            spent.append(time.perf_counter() - began)
        return statistics.median(spent)

    found = {
        "help_seconds": seconds(["--help"]),
        "compose_and_validate_seconds": seconds(["train", "--cfg", "job"]),
        "plan_seconds": seconds(["plan"]),
    }
    targets = {
        "rlhf --help, seconds": at_most(found["help_seconds"], 0.15),
        "compose and validate, seconds": at_most(found["compose_and_validate_seconds"], 0.6),
    }
    return {**found, "load": os.getloadavg()[0], "targets": targets}


def start(bench: Bench) -> dict[str, Any]:
    """The first step of a fresh process."""
    first, rows = bench.train("first", WORKLOADS[bench.args.workload], ["steps=1"])
    return {
        "first_step_seconds": first,
        "first_step_phases": {k: v for k, v in rows[0].items() if k.startswith("time/")},
    }


def gates(bench: Bench) -> dict[str, Any]:
    """Gates, diagnostics and logging as a share of a step."""
    job = bench.job(WORKLOADS[bench.args.workload], f"steps={bench.args.steps}")
    found = measured("gates_cost.py", job.dumps(), bench.work / "gates.log")
    return {**found, "targets": {"gates and logging, share of a step": at_most(found["share"], 0.01)}}


def scaling(bench: Bench) -> dict[str, Any]:
    """Seconds of a step against its operations, for growing numbers of responses and lengths."""
    known: dict[Workload, dict[str, Any]] = {}  # the series share a point
    found: dict[str, Any] = {}
    for name, sizes in SERIES.items():
        for w in sizes:
            if w not in known:
                known[w] = point(bench, w)
        points = [known[w] for w in sizes]
        shown = ", ".join(f"{x['gflop']['total']:.0f} GFLOP in {x['seconds']['total']:.2f} s" for x in points)
        print(f"  {name}: {shown}", flush=True)
        fits = {p: fit([x["gflop"][p] for x in points], [x["seconds"][p] for x in points]) for p in points[0]["gflop"]}
        found[name] = {"points": points, "fits": fits}
    return found


def point(bench: Bench, w: Workload) -> dict[str, Any]:
    """The steps of one workload in a process of its own; the first is left out."""
    with Child("ours.py", bench.job(w).dumps(), bench.work / "ours.log") as child:
        child.ask()
        steps = [child.ask("step") for _ in range(bench.args.steps)][1:]
    return {"workload": vars(w), **growth(bench.decoder, steps)}


def growth(d: flops.Decoder, steps: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median operations and seconds per phase, and of the whole step."""
    work = [flops.phases(d, s["groups"], "ours") for s in steps]
    gflop = {p: statistics.median(w[p] for w in work) / 1e9 for p in work[0]}
    spent = {p: statistics.median(s["seconds"][p] for s in steps) for p in gflop}
    total = statistics.median(s["step_seconds"] for s in steps)
    return {"gflop": {**gflop, "total": sum(gflop.values())}, "seconds": {**spent, "total": total}}


def zero(bench: Bench) -> dict[str, Any]:
    """Seconds of a step: one process with two threads, and two processes with one thread under ZeRO 0-3."""
    w = BASE
    shared = ["hardware.processes=2", "hardware.threads=1", f"rollout.rows={w.rows // 2}"]
    found: dict[str, Any] = {}
    for name, more in {
        "1 process, 2 threads": ["hardware.processes=1", "hardware.threads=2"],
        **{f"2 processes, ZeRO {z}": [*shared, f"hardware.zero={z}"] for z in range(4)},
    }.items():
        _, rows = bench.train(f"zero-{len(found)}", w, [f"steps={bench.args.steps}", *more])
        found[name] = {
            k: statistics.median(r.get(f"time/{k}", 0.0) for r in rows[1:] or rows)
            for k in ("step", "rollout", "score", "annotate", "update")
        }
        print(f"  {name}: {found[name]['step']:.2f} s/step", flush=True)
    alone = found["1 process, 2 threads"]["step"]
    return {
        "workload": vars(w),
        "seconds": found,
        "against_one_process": {k: v["step"] / alone for k, v in found.items()},
    }


SECTIONS = {"commands": commands, "start": start, "gates": gates, "scaling": scaling, "zero": zero}


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sections", default=",".join(SECTIONS))
    p.add_argument("--workload", default="W1", help="of start and gates; scaling and zero have their own")
    p.add_argument("--precision", default="bf16")
    p.add_argument(
        "--steps", type=int, default=3, help="of gates, scaling and zero; the first of the latter two is left out"
    )
    p.add_argument("--data", default="", help="JSON lines of question and answer; default: the packaged prompts")
    p.add_argument("--model", default="smollm2", help="as for grpo_step.py")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--threads", type=int, default=0, help="0: every core")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of ours")
    p.add_argument("--out", default="", help="result file; default: benchmarks/results/costs-DATE.json")
    args = p.parse_args(argv)
    args.threads = args.threads or len(os.sched_getaffinity(0))
    command = spoken("costs.py", sys.argv[1:] if argv is None else argv)
    result: dict[str, Any] = {
        **describe(args.device, args.threads), "command": command, "model": args.model, "precision": args.precision,
        "workload": vars(WORKLOADS[args.workload]),
    }  # fmt: skip
    out = Path(args.out) if args.out else RESULTS / f"costs-{result['date'][:10]}.json"
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(args, Path(work))
        for name in args.sections.split(","):
            print(name, flush=True)
            result[name] = SECTIONS[name](bench)
            save(out, result)
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
