"""How far each reward agrees with a recorded judge: `rlhf score` for every source, as one table.

    python scripts/agreement.py --input rankings.jsonl --output benchmarks/results/agreement.json
    python scripts/agreement.py --input rankings.jsonl --output benchmarks/results/agreement.json --only BERTScore --heavy 140

The file holds, one JSON object a line, a prompt, four references, the responses of several models, and a judge's scores of
these: for AlpacaEval, dataset=alpaca_eval. BLEU with one reference is the mean over each of the four by itself. Rewards are scored in
the run's own process on one thread, so that seconds are those of a core, without what other programs took of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from rlhf_cli.compose import compose
from rlhf_cli.models.smollm2 import smollm2
from rlhf_cli.verbs import score_report

ONE = 'dataset.columns.references="references[{i}]"'
SOURCES: dict[str, tuple[list[str], ...]] = {
    "length (words)": (["reward=length", "reward.length.target=100000", "reward.length.slack=0"],),
    "BLEU, 1 reference": tuple(["reward=bleu", ONE.format(i=i)] for i in range(4)),
    "BLEU, 4 references": (["reward=bleu"],),
    "BLEUBERI's BLEU, 1 reference": tuple(["reward=bleuberi", ONE.format(i=i)] for i in range(4)),
    "BLEUBERI's BLEU, 4 references": (["reward=bleuberi"],),
    "ROUGE-1": (["reward=rouge", "reward.rouge.variant=rouge1"],),
    "ROUGE-2": (["reward=rouge", "reward.rouge.variant=rouge2"],),
    "ROUGE-L": (["reward=rouge"],),
    "chrF": (["reward=chrf"],),
    "METEOR": (["reward=meteor"],),
    "embedding, to references": (["reward=embedding"],),
    "embedding, to the prompt": (["reward=embedding", "reward.embedding.to=prompt"],),
    "repetition": (["reward=repetition"],),
    "exact match": (["reward=exact_match"],),
}
"""Name -> the words after `rlhf score`; several are averaged."""

HEAVY: dict[str, tuple[list[str], ...]] = {
    "BERTScore": (["reward=bertscore"],),
    "R3": (["reward=r3"],),
    "clause distance, negative": (["reward=clause_distance", "reward.clause_distance.weight=-1"],),
    "perplexity, SmolLM2-135M": (
        ["reward=perplexity", "reward.perplexity.dtype=bf16", "reward.perplexity.path=SMOLLM2"],
    ),
    "TER, 1 reference": (["reward=ter", ONE.format(i=0)],),
}
"""The same for sources that take minutes, on the first --heavy prompts."""


def measure(path: str, words: list[str], limit: int) -> dict[str, float]:
    """One `rlhf score`, as numbers."""
    where = ["dataset=alpaca_eval", f"input={path}", f"dataset.limit={limit}", "hardware.device=cpu"]
    words = [w.replace("SMOLLM2", str(smollm2())) for w in words]
    cfg = compose("score", [*where, "reward_workers.processes=-1", *words], None)
    before, start = sum(os.times()[:4]), time.perf_counter()
    found, _ = score_report(cfg)
    busy = min(1.0, (sum(os.times()[:4]) - before) / (time.perf_counter() - start))  # others use the core too
    row = found.rows[0]
    assert row.milliseconds is not None
    bands = {name: share for name, (share, _) in zip(("shorter", "alike", "longer"), row.agreement.bands, strict=True)}
    return {
        "prompts": found.groups, "samples": found.samples, "pairs": row.agreement.pairs, "accuracy": row.agreement.accuracy,
        "ties": row.agreement.ties, "tau": row.agreement.tau, **bands, "length_within": row.length_within,
        "missing": row.missing, "seconds_per_1000": row.milliseconds * busy,
    }  # fmt: skip


def mean(runs: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each number over runs."""
    return {k: statistics.fmean(r[k] for r in runs) for k in runs[0]}


def table(found: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    heads = ["reward", "agreement", "tau-b", "winner shorter", "alike", "winner longer", "length", "s per 1,000"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, r in found.items():
        numbers = [r[k] for k in ("accuracy", "tau", "shorter", "alike", "longer", "length_within")]
        cells = [f"{x:.3f}" for x in numbers] + [f"{r['seconds_per_1000']:.2f}"]
        few = f" ({r['prompts']:.0f} prompts)" if r["prompts"] < max(x["prompts"] for x in found.values()) else ""
        lines.append("| " + " | ".join([name + few, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--limit", type=int, default=0, help="use the first N prompts; 0: all")
    parser.add_argument(
        "--heavy", type=int, default=100, help="prompts for sources that take minutes; 0: leave them out"
    )
    parser.add_argument("--only", default="", help="names with a semicolon between them; the others keep their numbers")
    a = parser.parse_args()
    torch.set_num_threads(1)
    output, only = Path(a.output), set(filter(None, a.only.split(";")))
    found: dict[str, Any] = json.loads(output.read_text())["sources"] if only and output.exists() else {}
    heavy = {k: (v, a.heavy) for k, v in HEAVY.items()} if a.heavy else {}
    for name, (runs, limit) in ({k: (v, a.limit) for k, v in SOURCES.items()} | heavy).items():
        if only and name not in only:
            continue
        start = time.perf_counter()
        found[name] = mean([measure(a.input, words, limit) for words in runs])
        found[name]["commands"] = [
            shlex.join(["rlhf", "score", "dataset=alpaca_eval", "input=FILE", *words]) for words in runs
        ]
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    machine = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": 1,
    }
    output.write_text(json.dumps({"machine": machine, "sources": found}, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
