"""A stand-in for `rlhf train`, run as a script: milliseconds a step, the same files, the same answer to signals.

The score after step n is 1000 * optim.lr * n + seed / 100. Seed 13 fails until a file `mended` lies beside the sweep;
seed 7 ends like one that handed its run to a queue, seed 75 like one that hung, and seed 76 like one that somebody cancelled. A point stands still after a step, until it is asked to stop, while `hold-POINT` or
`hold`, for every point, lies beside the sweep.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def write(path: Path, name: str, value: object) -> None:
    (path / name).write_text(json.dumps(value), encoding="utf-8")


def append(path: Path, name: str, row: object) -> None:
    with (path / name).open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


def main(argv: list[str]) -> int:
    words = dict(w.partition("=")[::2] for w in argv if "=" in w)
    sweep = Path(words["run.dir"].strip("'"))
    path = sweep / words["run.name"].strip("'")
    path.mkdir(parents=True, exist_ok=True)
    seed, steps, lr = int(words.get("seed", 0)), int(words.get("steps", 2)), float(words.get("optim.lr", 1e-3))
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda n, _: asked.append(n))
    append(sweep, "starts.jsonl", {"point": path.name, "cores": sorted(os.sched_getaffinity(0)), "at": time.time()})
    if seed == 7:
        return 0
    if seed == 13 and not (sweep / "mended").exists():
        print("loading\nrlhf: error: seed 13 is unlucky", flush=True)
        return 3
    if seed in (75, 76):
        status, reason = ("failed", "rank 0 silent for 9 s in phase update") if seed == 75 else ("preempted", "SIGTERM")
        write(path, "status.json", {"status": status, "step": 1, "reason": reason})
        return 75
    names = {"algo": words.get("algo", "grpo"), "reward": words.get("reward", "bleu")}
    config = {"seed": seed, "steps": steps, "optim": {"lr": lr}, "reward": {names["reward"]: {}}, "names": names}
    write(path, "config.yaml", config)
    rows = path / "metrics.jsonl"
    done = len(rows.read_text().splitlines()) if rows.exists() else 0
    for step in range(done + 1, steps + 1):
        time.sleep(0.03)
        score = 1000 * lr * step + seed / 100
        append(
            path, "metrics.jsonl", {"step": step, "score/mean": score, "time/step": 2.0, "count/response_tokens": 10}
        )
        append(path, "evaluations.jsonl", {"step": step, "eval/reward": score})
        while any((sweep / name).exists() for name in ("hold", f"hold-{path.name}")) and not asked:
            time.sleep(0.01)
        if asked:
            write(path, "status.json", {"status": "preempted", "step": step})
            return 75
    write(path, "status.json", {"status": "finished", "step": steps, "reason": ""})
    append(sweep, "ends.jsonl", {"point": path.name, "at": time.time()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
