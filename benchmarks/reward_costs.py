"""Seconds of processor time that each reward takes for 1,000 samples, in the run's own process on one thread, its children included.

    python benchmarks/reward_costs.py --output benchmarks/results/reward_costs.json

Texts are the packaged data: its references as responses, every one scored against the others or the gold one. Models are the packaged
ones. What works on long texts is measured by scripts/agreement.py on AlpacaEval's responses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from rlhf_cli.compose import compose
from rlhf_cli.data.loading import load
from rlhf_cli.rewards.make import make_scorer
from rlhf_cli.sources.assemble import sample_of
from rlhf_cli.types import Sample

JSON = ["reward=json_schema", "reward.json_schema.schema={type:object,required:[name,age]}"]
CODE = "def add(a, b):\n    return a + b\n"


def quickstart() -> list[Sample]:
    """Short answers: 20 words at most."""
    return [sample_of(r, r.references[-1]) for r in load(compose("train", [], None).dataset, "train")]


def sql() -> list[Sample]:
    """Gold queries as responses."""
    return [sample_of(r, r.references[0]) for r in load(compose("train", ["dataset=sql"], None).dataset, "train")]


def mathematics() -> list[Sample]:
    """Fractions and expressions in boxes."""
    pairs = itertools.product(range(2, 12), range(3, 13))
    return [Sample("p", rf"So it is \boxed{{\frac{{{a}}}{{{b}}}}}.", (f"{a}/{b}",)) for a, b in pairs]


def tagged() -> list[Sample]:
    """Reasoning of 100 words and an answer."""
    return [Sample("p", f"<think>{'so it goes ' * 33}</think>\n<answer>{i}</answer>", (str(i),)) for i in range(200)]


def objects() -> list[Sample]:
    """Small JSON objects."""
    return [Sample("p", json.dumps({"name": "x" * i, "age": i, "more": list(range(20))})) for i in range(200)]


def code() -> list[Sample]:
    """A right function with three assertions."""
    tests = [f"assert add({i}, 1) == {i + 1}" for i in range(3)]
    return [Sample("p", f"# {i}\n{CODE}", meta={"tests": tests}) for i in range(30)]


SOURCES: dict[str, tuple[list[str], Callable[[], list[Sample]]]] = {
    **{name: ([f"reward={name}"], quickstart) for name in ("exact_match", "length", "repetition", "embedding", "r3", "bertscore")},
    "regex": (["reward=regex", "reward.regex.pattern=.*\\."], quickstart),
    "format": (["reward=format"], tagged),
    "math_answer (verify)": (["reward=math_answer"], mathematics),
    "math_answer (number)": (["reward=math_answer", "reward.math_answer.method=number"], mathematics),
    "cosine_length": (["reward=cosine_length"], mathematics),
    "json_schema": (JSON, objects),
    "sql_execution": (["reward=sql_execution"], sql),
    "sql_partial": (["reward=sql_partial"], sql),
    "code_tests": (["reward=code_tests"], code),
    "perplexity (SmolLM2-135M)": (["reward=perplexity"], lambda: quickstart()[:100]),
}  # fmt: skip


def main() -> None:
    """Measure each, write JSON, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument(
        "--only", default="", help="names with a comma between them; the others keep their numbers in --output"
    )
    a = parser.parse_args()
    output, only = Path(a.output), set(filter(None, a.only.split(",")))
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = json.loads(output.read_text())["sources"] if only and output.exists() else {}
    for name, (words, make) in SOURCES.items():
        if only and name not in only:
            continue
        if "perplexity" in name:
            from rlhf_cli.models.smollm2 import smollm2

            words = [*words, f"reward.perplexity.path={smollm2()}"]
        scorer = make_scorer(compose("score", ["reward_workers.processes=-1", "hardware.device=cpu", *words], None))
        assert scorer is not None
        samples = make()
        group = torch.arange(len(samples))
        scorer(samples[:2], group[:2])  # imports and loads
        start = sum(os.times()[:4])
        scores = scorer(samples, group)
        seconds = 1000 * (sum(os.times()[:4]) - start) / len(samples)
        assert scores.missing is None or not scores.missing.any(), f"{name}: {scores.reasons}"
        found[name] = {"seconds_per_1000": seconds, "samples": len(samples)}
        print(f"| `{name}` | {seconds:.3g} |", flush=True)
    machine = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": 1,
    }
    output.write_text(json.dumps({"machine": machine, "sources": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
