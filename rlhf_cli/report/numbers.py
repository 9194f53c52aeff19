"""Run directories as numbers, read without torch: configuration, how it ended, metrics, held-out scores, cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ConfigError
from rlhf_cli.record.metrics import read
from rlhf_cli.record.rundir import RunDir

DEFAULTS = ("eval/reward", "score/mean")  # the metric of a run, the first that there is
LAST = 10  # rows of metrics.jsonl whose mean is a run's value, where nothing was evaluated
DEEP = 3  # folders below the one given in which runs are looked for
Row = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """One run directory, or a point of a sweep that was never started (no config)."""

    path: Path
    noted: str = ""  # what sweep.json says of it
    error: str = ""  # and why it failed

    @cached_property
    def config(self) -> Row:
        """config.yaml as plain values."""
        import yaml

        file = self.path / "config.yaml"
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return yaml.load(file.read_text(encoding="utf-8"), loader) if file.exists() else {}

    @cached_property
    def status(self) -> Row:
        """status.json."""
        return RunDir(self.path).status()

    @property
    def state(self) -> str:
        """finished, or what it is instead."""
        said = self.status.get("status", "")
        if said == "finished" or not self.noted:
            return {"preempted": "interrupted"}.get(said, said) or "not started"
        return self.noted

    @cached_property
    def metrics(self) -> list[Row]:
        """Rows of metrics.jsonl."""
        return read(self.path / "metrics.jsonl")

    @cached_property
    def evaluations(self) -> list[Row]:
        """Rows of evaluations.jsonl."""
        return read(self.path / "evaluations.jsonl")

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))

    def has(self, metric: str) -> bool:
        return not math.isnan(self.value(metric))

    def value(self, metric: str) -> float:
        """The metric at the end: of the last evaluation, or the mean of the last rows of metrics.jsonl. NaN: there is none."""
        last = next((r[metric] for r in reversed(self.evaluations) if r.get(metric) is not None), None)
        if last is not None:
            return float(last)
        found = [r[metric] for r in self.metrics if r.get(metric) is not None][-LAST:]
        return math.fsum(found) / len(found) if found else math.nan

    def series(self, metric: str) -> list[tuple[int, float]]:
        """The metric by step, of evaluations or of training."""
        rows = self.evaluations if any(metric in r for r in self.evaluations) else self.metrics
        return [(r["step"], float(r[metric])) for r in rows if r.get(metric) is not None]

    @cached_property
    def heldout(self) -> dict[str, float]:
        """Mean score of each held-out prompt after the last evaluation, by uid; prompts without a score are absent."""
        files = sorted(self.path.glob("heldout-*.jsonl"), key=lambda f: int(f.stem.rpartition("-")[2]))
        found: dict[str, list[float]] = {}
        for line in files[-1].read_text(encoding="utf-8").splitlines() if files else []:
            row = json.loads(line)
            if row.get("score") is not None:
                found.setdefault(str(row["uid"]), []).append(row["score"])
        return {uid: math.fsum(x) / len(x) for uid, x in found.items()}

    @property
    def seconds(self) -> float:
        """Wall time of its steps and of what lay between them."""
        return math.fsum(r.get("time/step", 0.0) + r.get("time/between", 0.0) for r in self.metrics)

    @property
    def tokens(self) -> int:
        """Trained tokens of all responses."""
        return sum(int(r.get("count/response_tokens", 0)) for r in self.metrics)


def find(paths: Iterable[Path]) -> list[RunFiles]:
    """The runs at or below the given folders, points of sweeps in their order; each once."""
    found: dict[Path, RunFiles] = {}
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"compare: {path}: no such folder; give runs, sweeps, or a folder that holds them")
        here = list(_below(path, DEEP))
        if not here:
            raise ConfigError(f"compare: {path}: holds no run (no config.yaml, no sweep.json); give runs or a sweep")
        found |= {r.path.resolve(): r for r in here if r.path.resolve() not in found}
    return list(found.values())


def _below(path: Path, depth: int) -> Iterator[RunFiles]:
    record = path / "sweep.json"
    if record.exists():
        points = json.loads(record.read_text(encoding="utf-8"))["points"]
        yield from (RunFiles(path / p["name"], p["status"], p.get("error", "")) for p in points)
    elif (path / "config.yaml").exists():
        yield RunFiles(path)
    elif depth:
        for child in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
            yield from _below(child, depth - 1)


def shared_metric(runs: Sequence[RunFiles], asked: str) -> str:
    """The metric to compare: the one asked for, or the first default that every finished run has."""
    done = [r for r in runs if r.state == "finished"]
    names = dict.fromkeys(k for r in done for rows in (r.evaluations, r.metrics) for k in (rows[-1] if rows else {}))
    if asked and not any(r.has(asked) for r in done):
        known = ", ".join(n for n in names if n != "step" and not n.startswith("time/"))
        raise ConfigError(f"metric={asked}: no finished run has it; they have {known or 'nothing yet'}")
    for name in (asked,) if asked else DEFAULTS:
        if done and (asked or all(r.has(name) for r in done)):
            return name
    raise ConfigError(
        "compare: the finished runs share no default metric; type metric=NAME, e.g. metric=eval/policy/loss"
    )


def metric_of(path: Path, asked: str) -> float:
    """The number of one run that a search improves; NaN where it has none."""
    run = RunFiles(path)
    return next((v for m in ((asked,) if asked else DEFAULTS) if not math.isnan(v := run.value(m))), math.nan)


def flat(config: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; a list is a value."""
    for name, value in config.items():
        inner = f"{key}.{name}" if key else str(name)
        if isinstance(value, Mapping) and value:
            yield from flat(value, inner)
        else:
            yield inner, value
