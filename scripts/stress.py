"""Kill runs with SIGKILL at chosen and at random moments, resume until they are done, and compare with runs that were left alone.

    python scripts/stress.py --kills 50 --setups 1x0,1x3,2x0,2x2,2x3 --out benchmarks/results/stress.json
    python scripts/stress.py --kills 4 --setups 2x2 --moments rename,renamed,checkpoint,random

A setup is PROCESSES x ZeRO stage. Runs are tiny: PPO with two learners, two passes a step, a schedule, a checkpoint at every step. Moments
are taken in turn, and the next one only after the one before was hit. They are hit from inside, by a sitecustomize module that this script
puts on the path of its own runs: just after a phase begins, or before or after the rename that makes a checkpoint; `random` is a time. Of
several ranks every other kill strikes one alone, except at random moments; else the whole family of processes dies. Ends with 1 unless
every run equals its twin.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

STEPS = 8
KILLS_A_RUN = 5
LIMIT = 300  # seconds that one attempt may take
PHASES = ("load", "rollout", "score", "update", "checkpoint")
KNOWN = (*PHASES, "rename", "renamed", "random")
MOMENTS = ("rollout", "score", "update", "checkpoint", "rename", "load", "rollout", "update", "renamed", "random")
MISSES = 5  # runs in a row that end before their moment came: it never does

HOOK = """
import os, signal, sys, threading, time
moment = os.environ.get("STRESS_MOMENT", "")
if moment:
    name, nth, delay, whole, rank = moment.split(":")
    left = [int(nth)]

    def die():
        with open(os.environ["STRESS_STRUCK"], "a") as f:
            f.write(name + "\\n")
        if whole == "1" and "RLHF_WRITER" in os.environ:
            os.kill(int(os.environ["RLHF_WRITER"]), signal.SIGKILL)  # the launcher; everything below dies with it
        os.kill(os.getpid(), signal.SIGKILL)

    def struck():
        left[0] -= 1
        return left[0] == 0

    if os.environ.get("RANK", rank) == rank:
        if name in ("rename", "renamed"):
            def around(real):
                def rename(a, b, *more, **named):
                    mine = "step-" in str(a)
                    if mine and name == "rename" and struck():
                        die()
                    done = real(a, b, *more, **named)
                    if mine and name == "renamed" and struck():
                        die()
                    return done
                return rename
            os.rename = around(os.rename)
        else:
            from rlhf_cli.record.heartbeat import Heartbeat
            beat = Heartbeat.beat
            def watched(self, phase=None):
                beat(self, phase)
                if phase == name and struck():
                    threading.Timer(float(delay), die).start()
            Heartbeat.beat = watched
"""


def main() -> int:
    """Run the setups one after the other until each had its share of the kills."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=50, help="kills in all, divided among the setups")
    options.add_argument("--setups", default="1x0,1x3,2x0,2x2,2x3", help="PROCESSESxZERO,...")
    options.add_argument("--moments", default=",".join(MOMENTS), help=f"in this order, of {', '.join(KNOWN)}")
    options.add_argument("--seed", type=int, default=0, help="of the moments")
    options.add_argument("--dir", type=Path, default=None, help="where the runs go; empty: a temporary folder")
    options.add_argument("--out", type=Path, default=None, help="a JSON file for the figures")
    given = options.parse_args()
    moments = given.moments.split(",")
    unknown = sorted(set(moments) - set(KNOWN))
    if unknown:
        options.error(f"--moments {unknown[0]}: unknown; there are {', '.join(KNOWN)}")
    with tempfile.TemporaryDirectory() as scratch:
        figures = Stress(given.dir or Path(scratch), moments, given.seed).run(given.kills, given.setups.split(","))
    print(json.dumps(figures, indent=2))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if figures["exact"] == figures["kills"] >= given.kills else 1


class Stress:
    """The kills of one folder, at `moments` in turn. `chance` chooses ranks, delays and random moments."""

    def __init__(self, folder: Path, moments: Sequence[str], seed: int) -> None:
        self.folder, self.chance, self.seed = folder.resolve(), random.Random(seed), seed
        hook = self.folder / "hook"
        hook.mkdir(parents=True, exist_ok=True)
        (hook / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
        (self.folder / "mine.py").write_text(
            "import time\n\ndef score(responses):\n    time.sleep(0.1)\n    return [sum(map(ord, r)) % 7 / 7 for r in responses]\n",
            encoding="utf-8",
        )
        self.moments, self.hits = moments, 0

    def run(self, kills: int, setups: list[str]) -> dict[str, Any]:
        """The figures: kills, and those after which the run ended with the bits of its twin; where they struck."""
        began, rows = time.monotonic(), []
        for i, setup in enumerate(setups):
            share = kills // len(setups) + (i < kills % len(setups))
            rows.append(self.setup(setup, share))
        return {
            "commit": commit(),
            "kills": sum(r["kills"] for r in rows),
            "exact": sum(r["exact"] for r in rows),
            "seed": self.seed,
            "minutes": round((time.monotonic() - began) / 60, 1),
            "setups": rows,
        }

    def setup(self, setup: str, kills: int) -> dict[str, Any]:
        """A run that is left alone, then runs that are killed up to KILLS_A_RUN times each."""
        processes, zero = map(int, setup.split("x"))
        twin = self.command(f"{setup}-alone", processes, zero)
        began = time.monotonic()
        code, log = self.attempt(twin, {}, self.folder / f"{setup}-alone.log")
        whole = time.monotonic() - began
        assert code == 0, log
        row: dict[str, Any] = {"setup": setup, "kills": 0, "exact": 0, "runs": 0, "wrong": []}
        where: Counter[str] = Counter()
        misses = 0
        while row["kills"] < kills:
            assert misses < MISSES, f"{setup}: nothing was struck in {MISSES} runs: {self.moment()} does not come"
            name = f"{setup}-{row['runs']}"
            struck = self.killed_until_done(name, processes, zero, min(KILLS_A_RUN, kills - row["kills"]), whole)
            problem = difference(self.folder / f"{setup}-alone", self.folder / name)
            misses = 0 if struck else misses + 1
            row["runs"] += 1
            row["kills"] += len(struck)
            row["exact"] += len(struck) * (problem is None)
            row["wrong"] += [f"{name}: {problem}"] if problem else []
            where.update(struck)
            print(f"{name}: {len(struck)} kills ({', '.join(struck)}): {problem or 'the same bits'}", flush=True)
        return row | {"where": dict(sorted(where.items()))}

    def killed_until_done(self, name: str, processes: int, zero: int, most: int, whole: float) -> list[str]:
        """Kill, start again, `most` times or until the run ends before its killer; then let it end. Returns where it was struck."""
        struck: list[str] = []
        run, log = self.folder / name, self.folder / f"{name}.log"
        for _ in range(most * 4):
            last = len(struck) == most
            again = ["resume", str(run)] if (run / "config.yaml").exists() else self.command(name, processes, zero)
            hit = self.kill_once(again, log, processes, whole) if not last else ""
            if hit:
                self.hits += 1
                struck.append(hit)
            elif (last and self.attempt(again, {}, log)[0] == 0) or finished(run):
                return struck
        raise SystemExit(f"{name}: does not end; see {log}")

    def kill_once(self, command: list[str], log: Path, processes: int, whole: float) -> str:
        """One attempt that is to die. Returns where it was struck; empty when it ended before."""
        moment, everyone = self.moment(), processes == 1 or self.whole_family()
        who = "" if everyone else " of one rank"
        if moment == "random":
            after = self.chance.uniform(0.2, whole)
            code, _ = self.attempt(command, {}, log, after)
            return "random" if code == -signal.SIGKILL else ""
        rank = 0 if moment in ("rename", "renamed") else self.chance.randrange(processes)
        nth, delay = self.chance.choice((1, 1, 2)), self.chance.uniform(0, 0.08)
        note = log.with_suffix(".struck")
        note.unlink(missing_ok=True)
        told = f"{moment}:{nth}:{delay}:{int(everyone)}:{rank}"
        self.attempt(command, {"STRESS_MOMENT": told, "STRESS_STRUCK": str(note)}, log)
        return f"{moment}{who}" if note.exists() else ""

    def moment(self) -> str:
        """The one that is to be hit next."""
        return self.moments[self.hits % len(self.moments)]

    def whole_family(self) -> bool:
        """Whether it strikes all ranks: every other time, and at the same moment the other way round when its turn comes again."""
        return (self.hits + self.hits // len(self.moments)) % 2 == 1

    def attempt(self, words: list[str], more: dict[str, str], log: Path, after: float = LIMIT) -> tuple[int, str]:
        """Start the command, kill its whole family after some seconds. Returns (exit status, log)."""
        paths = [str(self.folder / "hook"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""} | more
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "rlhf_cli.cli", *words], stdout=out, stderr=out, env=environment
            )
            try:
                code = process.wait(after)
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
                assert after < LIMIT, f"hangs: {words}; see {log}"
        kill_family(process.pid)
        process.wait()
        return code, log.read_text(encoding="utf-8", errors="replace")[-3000:]

    def command(self, name: str, processes: int, zero: int) -> list[str]:
        """The experiment: everything that has state has some."""
        return [
            "train", "algo=ppo", "debug=tiny", f"steps={STEPS}", "batch.minibatches=2", "optim.lr=0.001", "optim.warmup=1",
            "optim.schedule=cosine", "eval.every=2", "reward=python", f"reward.python.path={self.folder}/mine.py:score",
            "hardware=cpu", "hardware.threads=1", f"hardware.processes={processes}", f"hardware.zero={zero}", f"run.dir={self.folder}",
            f"run.name={name}",
        ]  # fmt: skip


def kill_family(pid: int) -> None:
    """SIGKILL a process with all its descendants, and wait until they are gone."""
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for p in family:
        try:
            p.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)


def commit() -> str:
    """The code that was tested; a `+` says that files differ from it."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}{'+' if changed.strip() else ''}"


def finished(run: Path) -> bool:
    """Whether the run says that it reached its end."""
    path = run / "status.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["status"] == "finished"


def difference(a: Path, b: Path) -> str | None:
    """The first thing in which two finished runs differ, or None: numbers and texts as logged, checkpoint and export byte by byte."""
    for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl"):
        if rows(a / name) != rows(b / name):
            return name
    files = [
        {p.relative_to(run).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in whole_files(run)}
        for run in (a, b)
    ]
    return next((k for k in sorted({*files[0], *files[1]}) if files[0].get(k) != files[1].get(k)), None)


def whole_files(run: Path) -> list[Path]:
    """Held-out responses, the last checkpoint and the export."""
    last = run / "checkpoints" / f"step-{STEPS:06d}"
    found = [*run.glob("heldout-*.jsonl"), *last.rglob("*"), *(run / "export").rglob("*")]
    assert (last / "manifest.json").exists() and (run / "export").is_dir(), f"{run} is not whole"
    return [p for p in found if p.is_file()]


def rows(path: Path) -> list[dict[str, Any]]:
    """Logged rows without what clocks say."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


if __name__ == "__main__":
    sys.exit(main())
