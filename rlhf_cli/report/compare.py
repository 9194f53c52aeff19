"""`rlhf compare`: one row per configuration, seeds collapsed, each tested against a baseline, with what it cost."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.catalog import typed
from rlhf_cli.errors import ConfigError
from rlhf_cli.report import student
from rlhf_cli.report.configurations import Configuration, group
from rlhf_cli.report.numbers import RunFiles, find, flat, shared_metric
from rlhf_cli.report.student import Estimate

REWARDED = ("eval/reward", "score/")  # metrics whose numbers mean something only beside the same reward
LABEL = 44  # columns of a configuration's name; a longer one stands on its own line


@dataclass
class Row:
    """A configuration measured."""

    configuration: Configuration
    value: Estimate
    over: str  # what the interval counts as random: seeds, prompts, or nothing
    baseline: Configuration | None = None  # itself: it is the baseline
    difference: Estimate | None = None
    pairs: tuple[int, int] = (0, 0)  # seeds, prompts

    def cost(self, name: str) -> float:
        """Mean over its runs of `seconds`, `tokens` or `steps`."""
        runs = self.configuration.runs
        found = [float(len(r.metrics) if name == "steps" else getattr(r, name)) for r in runs]
        return math.fsum(found) / len(found) if found else math.nan


@dataclass
class Comparison:
    """What `rlhf compare` found."""

    metric: str
    rows: list[Row]
    empty: list[RunFiles]  # points that were never started
    also: tuple[str, ...] = ()  # other metrics, whose means stand beside


def compare(paths: Iterable[Path], *, baseline: str = "", metric: str = "", also: Sequence[str] = ()) -> Comparison:
    """Measure every configuration below `paths`; runs that are not finished are named and never averaged in."""
    runs = find(paths)
    configurations = group(runs)
    chosen, *others = (shared_metric(runs, m) for m in (metric, *also))
    rows = [_measure(c, chosen) for c in configurations]
    candidates = _candidates(configurations, baseline, chosen)
    for row in rows:
        row.baseline = _closest(row.configuration, candidates, chosen)
        if row.baseline is not None and row.baseline is not row.configuration:
            row.difference, row.pairs = _difference(row.configuration, row.baseline, chosen)
    return Comparison(chosen, rows, [r for r in runs if not r.config], tuple(others))


# ---- numbers ----


def _measure(c: Configuration, metric: str) -> Row:
    values = [r.value(metric) for r in c.runs]
    if not values or any(map(math.isnan, values)):
        return Row(c, Estimate(math.nan), "")
    if len(values) > 1:
        return Row(c, student.interval(values), "seeds")
    last = c.runs[0].evaluations[-1] if c.runs[0].evaluations else {}
    low, high = last.get(f"{metric}_low"), last.get(f"{metric}_high")
    if low is None or high is None:
        return Row(c, Estimate(values[0]), "")
    return Row(c, Estimate(values[0], low, high), "prompts")


def _difference(c: Configuration, base: Configuration, metric: str) -> tuple[Estimate | None, tuple[int, int]]:
    """Paired by seed, and by held-out prompt where the metric is their score."""
    of, other = ({r.seed: r for r in x.runs} for x in (c, base))
    seeds = [s for s in of if s in other]
    if not seeds:
        return None, (0, 0)
    prompts: list[str] = []
    if metric == "eval/reward":
        scored = [r.heldout for s in seeds for r in (of[s], other[s])]
        prompts = [uid for uid in scored[0] if all(uid in x for x in scored)]
    if prompts:
        table = [[of[s].heldout[u] - other[s].heldout[u] for u in prompts] for s in seeds]
    else:
        table = [[of[s].value(metric) - other[s].value(metric)] for s in seeds]
    return student.paired(table), (len(seeds), len(prompts))


# ---- the baseline ----


def _comparable(a: Configuration, b: Configuration, metric: str) -> bool:
    """Whether numbers of the two measure the same: the same reward, on held-out prompts that both have."""
    if not metric.startswith(REWARDED):
        return True
    one, two = a.any, b.any
    same = one.config.get("reward") == two.config.get("reward")
    apart = one.heldout and two.heldout and not one.heldout.keys() & two.heldout.keys()
    return same and not apart


def _candidates(configurations: Sequence[Configuration], asked: str, metric: str) -> list[Configuration]:
    """Configurations that `baseline=` names; without it the first that can be compared with those after it."""
    done = [c for c in configurations if c.runs]
    if not asked:
        return [c for i, c in enumerate(done) if not any(_comparable(c, d, metric) for d in done[:i])]
    found = [c for c in done if _is(c, asked)]
    if not found:
        labels = "; ".join(c.label for c in done) or "none"
        raise ConfigError(f"baseline={asked}: no finished configuration; type a run's name or settings, of: {labels}")
    return found


def _is(c: Configuration, asked: str) -> bool:
    """Whether `asked` is one of its runs, or settings that it has."""
    if any(asked == r.path.name or Path(asked).resolve() == r.path.resolve() for r in c.runs):
        return True
    if asked == c.label:
        return True
    have = dict(flat(c.any.config)) | c.any.config.get("names", {})
    pairs = [p.strip().partition("=") for p in _split(asked)]
    known = have.keys() | c.settings.keys()  # a key that only other runs have is null in this one
    return all(equals and key in known and typed(have.get(key)) == typed(_value(v)) for key, equals, v in pairs)


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth = [""], 0
    for ch in text:
        depth += (ch in "[{") - (ch in "]}")
        if ch == "," and not depth:
            parts.append("")
        else:
            parts[-1] += ch
    return parts


def _value(text: str) -> Any:
    import yaml

    made = yaml.safe_load(text)
    try:
        return float(made) if isinstance(made, str) else made  # YAML reads 1e-5 as a word
    except ValueError:
        return made


def _closest(c: Configuration, candidates: Sequence[Configuration], metric: str) -> Configuration | None:
    """The comparable candidate that shares most settings with `c`."""
    if c in candidates:
        return c
    fit = [b for b in candidates if _comparable(c, b, metric)]
    return max(fit, key=lambda b: len(c.settings.items() & b.settings.items()), default=None)


# ---- text ----


def text(found: Comparison) -> str:
    """The table, what its columns mean, and what was left out."""
    head = ["", "seeds", "mean", "95 % interval", "difference, 95 % interval", "p", "time", "tokens", *found.also]
    cells = [[row.configuration.label, *_cells(row), *_beside(row, found.also)] for row in found.rows]
    width = min(LABEL, max((len(c[0]) for c in cells), default=0))
    sizes = [max(len(line[i]) for line in (head, *cells)) for i in range(1, len(head))]
    lines = [f"\n{found.metric}\n", _line(head, width, sizes)]
    lines += [_line(c, width, sizes) for c in cells]
    return "\n".join([*lines, "", *_notes(found), *_left_out(found)])


def _line(cells: Sequence[str], width: int, sizes: Sequence[int]) -> str:
    numbers = "  ".join(
        c.rjust(n) if i == 1 or i > 3 else c.ljust(n) for i, (c, n) in enumerate(zip(cells[1:], sizes, strict=True))
    )
    name = cells[0] if len(cells[0]) <= width else f"{cells[0]}\n  {'':<{width}}"
    return f"  {name:<{width}}  {numbers}".rstrip()


def _cells(row: Row) -> list[str]:
    c, v, d = row.configuration, row.value, row.difference
    counts: dict[str, int] = {}
    for r in c.others:
        counts[r.state] = counts.get(r.state, 0) + 1
    seeds = ", ".join([str(len(c.runs)), *(f"{n} {state}" for state, n in counts.items())])
    if math.isnan(v.mean):
        return [seeds, "-", "", "", "", "", ""]
    mark = "*" if row.over == "prompts" else ""
    interval = "-" if math.isnan(v.low) else f"[{v.low:.4g}, {v.high:.4g}]{mark}"
    against = "baseline" if row.baseline is c else "-"
    p = ""
    if d is not None:
        against = f"{d.mean:+.4g}" if math.isnan(d.low) else f"{d.mean:+.4g} [{d.low:+.4g}, {d.high:+.4g}]"
        p = "-" if math.isnan(d.p) else "<0.001" if d.p < 0.001 else f"{d.p:.3f}"
    return [seeds, f"{v.mean:.4g}", interval, against, p, duration(row.cost("seconds")), count(row.cost("tokens"))]


def _beside(row: Row, metrics: Sequence[str]) -> list[str]:
    """Means of other metrics."""
    values = [_measure(row.configuration, m).value.mean for m in metrics]
    return ["-" if math.isnan(v) else f"{v:.4g}" for v in values]


def _notes(found: Comparison) -> list[str]:
    """What the numbers are, only as far as they stand in the table."""
    overs, pairs = {r.over for r in found.rows}, {r.pairs for r in found.rows if r.difference is not None}
    evaluated = any(found.metric in e for r in found.rows for run in r.configuration.runs for e in run.evaluations)
    when = "at the last evaluation" if evaluated else "mean of the last 10 steps"
    lines = [f"{found.metric}: {when}, mean over seeds. Time and trained tokens are means per run."]
    if "seeds" in overs:
        lines.append("Interval: Student's t over seeds.")
    if "prompts" in overs:
        lines.append("* One seed: bootstrap over held-out prompts, which says nothing about other seeds.")
    if pairs:
        lines += [f"Difference: {line}" for line in _how(pairs)]
    if len([r for r in found.rows if r.difference is not None]) > 1:
        lines.append("p is of each row alone, not corrected for the number of rows.")
    apart = [r for r in found.rows if r.baseline is None and r.configuration.runs]
    if apart:
        lines.append("-: no baseline has the same reward and held-out prompts, so a difference would mean nothing.")
    if len([r for r in found.rows if r.baseline is r.configuration]) > 1:
        lines.append("Several baselines: each row is tested against the one with its reward and most of its settings.")
    return lines


def _how(pairs: Iterable[tuple[int, int]]) -> list[str]:
    """How differences were paired and tested; `pairs` are the numbers of seeds and prompts."""
    both = sorted(p for p in pairs if p[0] > 1 and p[1])
    lines = []
    if both:
        sizes = ", ".join(f"{s} x {n}" for s, n in both)
        lines.append(
            f"paired by seed and prompt ({sizes}); t test with both random, Satterthwaite's degrees of freedom."
        )
    if any(s == 1 and n for s, n in pairs):
        lines.append("of one seed paired by prompt, t test; it says nothing about other seeds.")
    if any(s and not n for s, n in pairs):
        lines.append("paired by seed, t test over seeds; none with one seed.")
    return lines


def _left_out(found: Comparison) -> list[str]:
    rows = [r.configuration for r in found.rows]
    lines = [f"  {r.path}  {r.state}  {_why(r)}".rstrip() for r in [*(o for c in rows for o in c.others), *found.empty]]
    lines += [f"  {r.path}  finished, but a later run has its seed" for c in rows for r in c.repeated]
    return ["", "Not counted", *lines] if lines else []


def _why(run: RunFiles) -> str:
    """`at step 3: GateError: ...`, as far as known."""
    reason = " ".join(str(run.error or run.status.get("reason", "")).split())
    step = f"at step {run.status['step']}" if run.status else ""
    return ": ".join(filter(None, (step, reason)))[:200]


def duration(seconds: float) -> str:
    """0.5 s, 12 s, 7.1 min, 2.4 h."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def count(number: float) -> str:
    """812, 54.2k, 3.12M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


# ---- files ----


def write_csv(found: Comparison, path: Path) -> None:
    """One line per configuration, numbers in full."""
    keys = list(dict.fromkeys(k for r in found.rows for k in r.configuration.settings))
    names = [
        "metric",
        "seeds",
        "values",
        "mean",
        "low",
        "high",
        "interval_over",
        "baseline",
        "difference",
        "difference_low",
    ]
    names += ["difference_high", "p", "paired_seeds", "paired_prompts", "seconds", "tokens", "steps", "unfinished"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as f:
        out = csv.writer(f)
        out.writerow(["configuration", *keys, *names])
        out.writerows(_record(found.metric, row, keys) for row in found.rows)


def _record(metric: str, row: Row, keys: Sequence[str]) -> list[Any]:
    c, v, d = row.configuration, row.value, row.difference or Estimate(math.nan)
    values = " ".join(repr(r.value(metric)) for r in c.runs)
    numbers = [v.mean, v.low, v.high, row.over, row.baseline.label if row.baseline else "", d.mean, d.low, d.high, d.p]
    costs = [*row.pairs, row.cost("seconds"), row.cost("tokens"), row.cost("steps")]
    unfinished = " ".join(f"{r.path.name}:{r.state}" for r in c.others)
    line = [c.label, *(c.settings.get(k, "") for k in keys), metric, " ".join(map(str, c.seeds)), values]
    return ["" if isinstance(x, float) and math.isnan(x) else x for x in [*line, *numbers, *costs, unfinished]]


# ---- the verb ----


def main(words: Sequence[str]) -> int:
    """`rlhf compare DIR|RUN... [baseline=...] [metric=...] [also=METRIC,...] [csv=FILE] [plot=FILE] [frontier=FILE]`."""
    options = {"baseline": "", "metric": "", "also": "", "csv": "", "plot": "", "frontier": ""}
    paths = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or Path(word).exists():
            paths.append(Path(word))
        elif key in options:
            options[key] = value
        else:
            raise ConfigError(f"compare: {word}: no such folder or setting; settings: {', '.join(options)}")
    if not paths:
        raise ConfigError("compare: which runs? type rlhf compare DIR or RUN ..., e.g. rlhf compare runs/sweeps/NAME")
    also = list(filter(None, options["also"].split(",")))
    found = compare(paths, baseline=options["baseline"], metric=options["metric"], also=also)
    print(text(found))
    written = _write(found, options)
    if written:
        print("\n" + "\n".join(written))
    return 0


def _write(found: Comparison, options: Mapping[str, str]) -> list[str]:
    """The files that were asked for; a sentence about each."""
    said = []
    configurations = [r.configuration for r in found.rows]
    if options["csv"]:
        write_csv(found, Path(options["csv"]))
        said.append(f"the table is in {options['csv']}")
    if options["plot"]:
        from rlhf_cli.report import curves

        curves.draw(configurations, found.metric, Path(options["plot"]))
        said.append(f"the curves are in {options['plot']}")
    if options["frontier"]:
        from rlhf_cli.report import frontier

        without = frontier.draw(configurations, found.metric, Path(options["frontier"]))
        said.append(f"the frontier is in {options['frontier']}")
        said += [f"left out, it logged no KL from a reference: {c.label}" for c in without]
    return said
