"""What the end-to-end tests share: running the command, small data files, and comparing two runs bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TINY = ("debug=tiny", "hardware.threads=1", "hardware.device=cpu")
JOINED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RLHF_ARGV", "DS_ACCELERATOR")


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what a run inside it left there."""
    kept = {k: v for k, v in os.environ.items() if k not in JOINED}
    return kept | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "CUDA_VISIBLE_DEVICES": ""} | more


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "rlhf_cli.cli", *argv]


def shell(*argv: str, timeout: float = 400, cwd: Path | None = None, **env: str) -> Done:
    """Run the command in its own process to its end."""
    done = subprocess.run(
        command(*argv), capture_output=True, text=True, timeout=timeout, cwd=cwd, env=environment(**env), check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def begin(*argv: str, log: Path, **env: str) -> subprocess.Popen[bytes]:
    """Start the command in its own process; its output goes to `log`."""
    return subprocess.Popen(command(*argv), stdout=log.open("ab"), stderr=subprocess.STDOUT, env=environment(**env))


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a command with all its descendants, children first seen first, and wait until they are gone."""
    family = [process.pid, *descendants(process.pid)]
    for pid in family:
        _signal(pid, signal.SIGKILL)
    process.wait()
    until(lambda: not any(_alive(pid) for pid in family[1:]), process=None)


def descendants(pid: int) -> list[int]:
    found = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, listing.read_text().split()):
            found += [child, *descendants(child)]
    return found


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(happened: Callable[[], bool], *, process: subprocess.Popen[bytes] | None, limit: float = 480) -> bool:
    """Wait for `happened`; False when the process ended before."""
    end = time.monotonic() + limit
    while not happened():
        if process is not None and process.poll() is not None:
            return False
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.003)
    return True


# ---- data ----


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def pairs(path: Path, n: int = 12) -> Path:
    rows = [{"prompt": f"Say {i}.", "chosen": f"{i}, gladly", "rejected": "no" * (1 + i % 3)} for i in range(n)]
    return write_rows(path, rows)


def rankings(path: Path, n: int = 12) -> Path:
    rows = [
        {"prompt": f"Count to {i}.", "responses": ["one", "one two", "zero " * (i % 3 + 1)], "scores": [1.0, 2.0, 0.5]}
        for i in range(n)
    ]
    return write_rows(path, rows)


def demonstrations(path: Path, n: int = 12) -> Path:
    return write_rows(path, [{"prompt": f"Name {i}.", "response": f"The number {i}"} for i in range(n)])


def thumbs(path: Path, n: int = 12) -> Path:
    return write_rows(path, [{"prompt": f"Try {i}.", "response": f"trial {i}", "label": i % 2 == 0} for i in range(n)])


def python_reward(path: Path, body: str) -> str:
    """A user's reward file; `body` computes `values` from `responses`. Returns the override that chooses it."""
    path.write_text(f"import os, time\n\ndef score(responses):\n    {body}\n    return values\n", encoding="utf-8")
    return f"reward.python.path={path}:score"


VALUES = "values = [sum(map(ord, r)) % 7 / 7 for r in responses]"


def held(run: Path, hold: Path) -> str:
    """The body of a reward that stands still after the first step of `run` while `hold` exists: a moment to be stopped in.

    Rank 0 stands still in Python, where it hears signals; the others wait for it. While it does, there is a file HOLD-here.
    """
    begun = f"os.environ.get('RANK', '0') == '0' and os.path.exists('{run}/metrics.jsonl') and os.path.getsize('{run}/metrics.jsonl')"
    stands = f"open('{hold}-here', 'a').close(); time.sleep(0.05)"
    return f"while os.path.exists('{hold}') and {begun}: {stands}\n    {VALUES}"


# ---- looking at runs ----


def jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that another process may be writing: a last line without its end is not a row yet."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text(encoding="utf-8"))


def notes(run: Path) -> str:
    return (run / "logs" / "notes.log").read_text(encoding="utf-8")


def numbers(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Every logged number that a repeated run must repeat."""
    names = [
        "metrics.jsonl",
        "evaluations.jsonl",
        "samples.jsonl",
        *sorted(p.name for p in run.glob("heldout-*.jsonl")),
    ]
    return {n: [{k: v for k, v in r.items() if not k.startswith("time/")} for r in jsonl(run / n)] for n in names}


def weights(run: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of export/ and of the last checkpoint, moments included."""
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    for folder in (run / "export", last):
        for file in sorted(folder.glob("*.safetensors")):
            for name, value in load_file(file).items():
                yield f"{folder.name}/{file.name}/{name}", value


def assert_same(a: Path, b: Path) -> None:
    """Bit for bit: every parameter, every moment, every logged number."""
    first, second = dict(weights(a)), dict(weights(b))
    assert first.keys() == second.keys() and len(first) > 10
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), f"{name} differs"
    one, two = numbers(a), numbers(b)
    assert one.keys() == two.keys()
    for name, rows in one.items():
        assert len(rows) == len(two[name]), f"{name}: {len(rows)} rows and {len(two[name])}"
        for r, s in zip(rows, two[name], strict=True):
            wrong = {k: (r.get(k), s.get(k)) for k in {**r, **s} if r.get(k, "") != s.get(k, "")}
            assert not wrong, f"{name} at step {r.get('step')}: {wrong}"
