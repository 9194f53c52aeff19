"""What a finished run has to say: was there a gain, what changed, where it lies, what to type next."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.config import load_config
from rlhf_cli.record.metrics import read
from rlhf_cli.record.progress import duration
from rlhf_cli.report.evaluate import Row, bootstrap, by_prompt, paired, read_rows

WIDTH = 100


def text(path: Path) -> str:
    """The closing report of a run directory."""
    cfg = load_config(path)
    files = sorted(f for f in path.glob("heldout-*.jsonl") if int(f.stem.rpartition("-")[2]) <= cfg.steps)
    lines = ["", f"Run {path}: {cfg.steps} steps, {_time(path)}"]
    if len(files) >= 2:
        lines += ["", *_gain(read_rows(files[0]), read_rows(files[-1]), cfg)]
    lines += _recorded(path)
    lines += ["", *_next(path, cfg, bool(files))]
    return "\n".join(lines)


def _gain(before: Sequence[Row], after: Sequence[Row], cfg: Any) -> list[str]:
    first, last = (bootstrap(by_prompt(rows), cfg.eval.bootstrap) for rows in (before, after))
    gain = paired(before, after, cfg.eval.bootstrap)
    verdict = "the interval excludes 0" if gain.excludes_zero else "the interval includes 0: no change is shown"
    name = "+".join(cfg.reward or {}) or "reward"
    lines = [
        f"Held-out {name} on {len(after)} prompts (greedy), 95 % intervals",
        f"  before      {first.mean:.4f}  [{first.low:.4f}, {first.high:.4f}]",
        f"  after       {last.mean:.4f}  [{last.low:.4f}, {last.high:.4f}]",
        f"  difference {gain}  paired by prompt; {verdict}",
        "",
        "Before and after",
    ]
    earlier = {(r["uid"], r["sample"]): r for r in before}
    ranked = sorted(
        (r for r in after if r.get("score") is not None),
        key=lambda r: r["score"] - (earlier[r["uid"], r["sample"]]["score"] or 0.0),
    )
    for r in _spread(ranked):
        old = earlier[r["uid"], r["sample"]]
        lines += _wrap("prompt ", r["prompt"])
        lines += _wrap(f"before {_score(old)} ", old["response"])
        lines += _wrap(f"after  {_score(r)} ", r["response"])
        lines.append("")
    return lines[:-1]


def _spread(ranked: Sequence[Row]) -> list[Row]:
    """Three rows: the median change, and those a sixth from either end, so that no example is the best or worst of all."""
    n = len(ranked)
    return [ranked[i] for i in sorted({(n - 1) * 5 // 6, (n - 1) // 2, (n - 1) // 6}, reverse=True)] if n else []


def _score(row: Row) -> str:
    return "  -  " if row.get("score") is None else f"{row['score']:.3f}"


def _wrap(label: str, body: str) -> list[str]:
    flat = " ".join(body.split()) or "(empty)"
    short = textwrap.shorten(flat, 3 * (WIDTH - 16), placeholder=" ...")
    return textwrap.wrap(short, WIDTH, initial_indent=f"  {label}", subsequent_indent=" " * (len(label) + 2))


def _recorded(path: Path) -> list[str]:
    """First and last value of the losses and accuracies on held-out recorded rows."""
    rows = read(path / "evaluations.jsonl") if (path / "evaluations.jsonl").exists() else []
    names = [k for r in rows for k in r if k.endswith(("/loss", "accuracy"))]
    lines = []
    for name in dict.fromkeys(names):
        values = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
        if len(values) > 1:
            lines.append(f"  {name.removeprefix('eval/'):<26}{values[0][1]:.4f} -> {values[-1][1]:.4f}")
    return ["", "Held-out records, before -> after", *lines] if lines else []


def _next(path: Path, cfg: Any, sampled: bool) -> list[str]:
    wanted = ("metrics.jsonl", "samples.jsonl", "heldout-*.jsonl", "tensorboard", "export")
    there = [n for n in wanted if next(path.glob(n), None)]
    lines = [f"Files        {path}/{{{', '.join(there)}}}"]
    if not (path / "export").exists():
        return [*lines, f"Next         rlhf resume {path} steps={2 * cfg.steps}"]
    if "policy" not in cfg.updates:
        return [*lines, f"Next         rlhf train algo=grpo reward=model reward.model.path={path}"]
    return [
        *lines,
        f"Next         rlhf eval {path}" if sampled else f"Next         rlhf generate {path} input=prompts.jsonl",
    ]


def _time(path: Path) -> str:
    rows = read(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []
    seconds = sum(r.get("time/step", 0.0) + r.get("time/between", 0.0) for r in rows)
    return duration(seconds)
