"""Results as Markdown: python benchmarks/table.py FILE... prints; --into PAGE puts it between the page's markers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def steps(result: Mapping[str, Any]) -> Iterator[str]:
    """One row per workload and precision of grpo_step.py."""
    names = [
        "workload", "precision", "ours, s (rollout, reference, update)", "ours, tokens/s", "TRL, s (its rows per forward)",
        "throughput, ours / TRL", "peak memory, ours / TRL, GB", "share of the matrix peak: update, rollout",
    ]  # fmt: skip
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    for entry in result["entries"]:
        yield step(entry)


def step(entry: Mapping[str, Any]) -> str:
    s = entry["summary"]
    ours, trl = s.get("ours"), s.get("trl")
    cells = [entry["workload"]["name"], entry["precision"]]
    if ours:
        phases = ", ".join(f"{ours['seconds'].get(p, 0):.2f}" for p in ("rollout", "annotate", "update"))
        cells += [f"{ours['step_seconds']:.2f} ({phases})", f"{ours['tokens_per_second']:.0f}"]
    else:
        cells += ["", ""]
    cells.append(f"{trl['step_seconds']:.2f} ({s['trl_rows']})" if trl else "")
    cells.append(f"{s['throughput_ratio']:.2f}" if ours and trl else "")
    cells.append(" / ".join(f"{x['step_peak_gb']:.1f}" if x else "" for x in (ours, trl)))
    share = ours["share_of_peak"] if ours else {}
    cells.append(", ".join(f"{share[p]:.0%}" for p in ("update", "rollout") if p in share))
    return "| " + " | ".join(cells) + " |"


def equality(result: Mapping[str, Any]) -> Iterator[str]:
    """One row per comparison of the fast path with the plain one."""
    yield "| workload | dtype | loss, relative difference | gradient, relative difference | of it, fast and plain path against float64 |"
    yield "|---|---|---|---|---|"
    done = set()
    for entry in result["entries"]:
        for dtype, gap in entry.get("equality", {}).items():
            key = (entry["workload"]["name"], dtype)
            if key not in done:
                done.add(key)
                sides = [gap[k]["gradient"] for k in ("fast_against_float64", "plain_against_float64") if k in gap]
                own = ", ".join(f"{x:.1e}" for x in sides)
                yield f"| {key[0]} | {dtype} | {gap['loss']:.1e} | {gap['gradient']:.1e} | {own} |"


def costs(result: Mapping[str, Any]) -> Iterator[str]:
    """What costs.py measured."""
    yield "| cost | measured |"
    yield "|---|---|"
    start = {**result.get("commands", {}), **result.get("start", {})}
    for key, name in (("help_seconds", "`rlhf --help`"), ("compose_and_validate_seconds", "`rlhf train --cfg job`"), ("plan_seconds", "`rlhf plan`"),
                      ("first_step_seconds", "first step of a fresh process")):  # fmt: skip
        if key in start:
            yield f"| {name} | {start[key]:.2f} s |"
    if "gates" in result:
        yield f"| gates, diagnostics and logging | {result['gates']['share']:.2%} of a step |"
    for name, series in result.get("scaling", {}).items():
        for phase in ("update", "rollout"):
            f = series["fits"][phase]
            yield f"| {phase}, growing with {name} | seconds ~ operations^{f['exponent']:.2f}, R² {f['r2']:.3f} |"
    for name, ratio in result.get("zero", {}).get("against_one_process", {}).items():
        yield f"| {name} | {result['zero']['seconds'][name]['step']:.2f} s/step, {ratio:.2f} x one process |"


def heading(result: Mapping[str, Any]) -> str:
    h, v = result["hardware"], result["versions"]
    where = f"{h['accelerator']}, " if h["accelerator"] else ""
    versions = ", ".join(f"{k} {v[k]}" for k in ("torch", "transformers", "deepspeed", "trl") if v.get(k))
    machine = f"{where}{h['cpu']}, {h['cores']} cores, {h['threads']} threads, {h['memory_gib']} GiB"
    return f"{result['date']}; {machine}; {versions}; `{result['command']}`"


def text(results: Sequence[Mapping[str, Any]]) -> str:
    """All tables of the results."""
    parts = []
    for result in results:
        compared = any("equality" in e for e in result.get("entries", ()))
        tables = [steps, *([equality] if compared else [])] if "entries" in result else [costs]
        parts.append("\n\n".join([heading(result), *("\n".join(t(result)) for t in tables)]))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("files", nargs="+")
    p.add_argument("--into", default="", help="a page with the two markers")
    args = p.parse_args(argv)
    made = text([json.loads(Path(f).read_text(encoding="utf-8")) for f in args.files])
    if not args.into:
        print(made)
        return
    page = Path(args.into)
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{page}: no line {BEGIN} followed by {END}")
    page.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
