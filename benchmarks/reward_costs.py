"""Seconds that each reward takes for 1,000 samples, in the run's own process on one thread: of the processor, and by the clock.

    python benchmarks/reward_costs.py --output benchmarks/results/reward_costs.json

Processor time is that of the process and of the children that it has waited for, so other programs do not count; by the clock they do.
Texts are the packaged data: SmolLM2's responses to short instructions, in their groups, or what a reward's own kind of record asks
for. Models are the packaged ones, or tiny:SEED, random ones of two layers, whose cost is what surrounds a model: a reward model of
135 million parameters costs what perplexity does. A judge is the rule (judge.backend=rule), whose cost is that of writing questions and
reading replies. What works on long texts is measured by scripts/agreement.py on AlpacaEval's responses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf_cli import verbs, wiring
from rlhf_cli.compose import compose
from rlhf_cli.data.loading import load
from rlhf_cli.data.record import Record
from rlhf_cli.engine.comm import Comm
from rlhf_cli.models.smollm2 import smollm2
from rlhf_cli.rewards.make import make_scorer
from rlhf_cli.sources.assemble import sample_of
from rlhf_cli.types import Sample

CODE = "def add(a, b):\n    return a + b\n"
FUNCTION = "def score(responses, references):\n    return [float(r.strip() in refs) for r, refs in zip(responses, references)]\n"
SHORT, TINY, RULE = "short responses", "short responses; tiny:1, random", "short responses; judge.backend=rule"
THINK = f"<think>{'so it goes ' * 33}</think>"


def records(name: str) -> list[Record]:
    """The training part of a packaged dataset."""
    return load(compose("train", [f"dataset={name}"], None).dataset, "train")


def texts(prompts: int = 200) -> list[Sample]:
    """Responses of SmolLM2 to short instructions, two to four a prompt, with what some rewards read besides."""
    found = [sample_of(r, text) for r in records("scored")[:prompts] for text in r.responses]
    turns = [{"reward": 0.5, "parts": {}}] * 4
    return [replace(s, meta={**s.meta, "category": "all", "intent": 1, "turns": turns}) for s in found]


def few() -> list[Sample]:
    """The same, fewer."""
    return texts(40)


def some() -> list[Sample]:
    """Fewer still, for a model of 135 million parameters."""
    return texts(16)


def least() -> list[Sample]:
    """The fewest, for what decodes."""
    return texts(4)


def sql() -> list[Sample]:
    """Gold queries as responses."""
    return [sample_of(r, r.references[0]) for r in records("sql")]


def wrong_sql() -> list[Sample]:
    """Queries that run and return something else."""
    return [sample_of(r, "SELECT 'nothing'") for r in records("sql")]


def mathematics() -> list[Sample]:
    """Fractions in boxes."""
    pairs = itertools.product(range(2, 12), range(3, 13))
    return [Sample("p", rf"So it is \boxed{{\frac{{{a}}}{{{b}}}}}.", (f"{a}/{b}",), uid=f"{a}/{b}") for a, b in pairs]


def linked() -> list[Sample]:
    """Boxed answers to two wordings of a problem, four to each."""
    return [sample_of(r, rf"So it is \boxed{{{r.references[0]}}}.") for r in records("rephrased") for _ in range(4)]


def tagged() -> list[Sample]:
    """Reasoning of 100 words and an answer."""
    return [Sample("p", f"{THINK}\n<answer>{i}</answer>", (str(i),), uid=str(i)) for i in range(200)]


def knights() -> list[Sample]:
    """Reasoning of 100 words and the solution of a puzzle."""
    return [sample_of(r, f"{THINK}\n<answer>{r.references[0]}</answer>") for r in records("knights")]


def objects() -> list[Sample]:
    """Small JSON objects."""
    rows = ({"name": "x" * i, "age": i, "more": list(range(20))} for i in range(200))
    return [Sample("p", json.dumps(row), uid=str(i)) for i, row in enumerate(rows)]


def code() -> list[Sample]:
    """A right function with three assertions."""
    tests = [[f"assert add({i}, 1) == {i + 1}"] * 3 for i in range(30)]
    return [Sample("p", f"# {i}\n{CODE}", meta={"tests": t}, uid=str(i)) for i, t in enumerate(tests)]


def pair_verdicts() -> list[Sample]:
    """Right verdicts after reasoning of 100 words."""
    return [Sample("p", f"{THINK}<answer>1</answer>", meta={"better": "1"}, uid=str(i)) for i in range(200)]


def score_verdicts() -> list[Sample]:
    """Two scores with reasons."""
    said = {"principles": "to be right", "critique": "so it goes " * 33, "score_A": 7, "score_B": 4}
    return [Sample("p", json.dumps(said), meta={"better": "A"}, uid=str(i)) for i in range(200)]


def ranking_verdicts() -> list[Sample]:
    """Scores and order of four responses after reasoning of 100 words."""
    gold = {f"model-{i}": 5 - i for i in range(1, 5)}
    said = json.dumps({"scores": gold, "best-to-worst": list(gold)})
    return [Sample("p", f"{THINK}\n{said}", meta={"gold": gold}, uid=str(i)) for i in range(200)]


class Case(NamedTuple):
    """What is measured of an option."""

    words: Sequence[str]  # besides reward=NAME
    make: Callable[[], list[Sample]]
    on: str  # samples and model, as the table says it


def tiny(name: str) -> Case:
    """A reward whose model is a random tiny one."""
    return Case([f"reward.{name}.path=tiny:1"], few, TINY)


CASES: dict[str, Case] = {
    **dict.fromkeys(("bleu", "bleuberi", "extrinsic_bleu", "chrf", "ter", "rouge", "meteor", "grue"), Case([], texts, SHORT)),
    **dict.fromkeys(("exact_match", "length", "repetition"), Case([], texts, SHORT)),
    "regex": Case(["reward.regex.pattern=.*\\."], texts, SHORT),
    "environment": Case([], texts, "dialogues of four turns; without the environment"),
    **dict.fromkeys(("embedding", "r3", "bertscore", "clause_distance"), Case([], few, f"{SHORT}; all-MiniLM-L6-v2")),
    "format": Case([], tagged, "100 words of reasoning"),
    "levels": Case([], tagged, "100 words of reasoning"),
    "levels_knights": Case([], knights, "100 words of reasoning, `dataset=knights`"),
    "math_answer (verify)": Case([], mathematics, "fractions in boxes"),
    "math_answer (number)": Case(["reward.math_answer.method=number"], mathematics, "fractions in boxes"),
    **dict.fromkeys(("cosine_length", "hidden_answer"), Case([], mathematics, "fractions in boxes")),
    "co_reward": Case(["dataset=rephrased"], linked, "boxed answers, `dataset=rephrased`"),
    "json_schema": Case(["reward.json_schema.schema={type:object,required:[name,age]}"], objects, "small objects"),
    **dict.fromkeys(("sql_execution", "sql_partial"), Case([], sql, "`dataset=sql`, gold queries")),
    "sql_judge": Case(["judge.backend=rule"], wrong_sql, "`dataset=sql`, wrong queries; judge.backend=rule"),
    "code_tests": Case([], code, "a function with three assertions"),
    "perplexity": Case([f"reward.perplexity.path={smollm2()}"], some, f"{SHORT}; SmolLM2-135M, fp32"),
    **{name: tiny(name) for name in ("model", "by_category", "attributes", "robust_heads", "principles", "sentiment", "intent")},
    "ensemble": Case(["reward.ensemble.path=[tiny:1,tiny:2,tiny:3]", "combine=min"], few, f"{SHORT}; three of tiny:1 to 3, random"),
    "implicit": Case(["reward.implicit.path=tiny:1", "reward.implicit.reference=tiny:2"], few, f"{SHORT}; tiny:1 and tiny:2, random"),
    **dict.fromkeys(("judge", "judge_pairwise", "judge_pivot", "judge_anchor", "judge_listwise", "mpo"), Case(["judge.backend=rule"], few, RULE)),
    "oni": Case(["judge.backend=rule"], few, f"{RULE}; with the updates of its own net after the step"),
    "pair_verdict": Case(["judge.backend=rule"], pair_verdicts, "100 words of reasoning; judge.backend=rule"),
    "scores_verdict": Case([], score_verdicts, "a JSON object of 100 words"),
    "ranking_verdict": Case([], ranking_verdicts, "100 words of reasoning, four scores"),
    "self": Case(["model=tiny_random"], least, f"{SHORT}; tiny_random writes three grades of 128 tokens, none readable"),
    "http": Case(["reward.http.url=http://127.0.0.1:{port}/"], few, f"{SHORT}; a local server in the same process"),
    "python": Case(["reward.python.path={file}:score"], texts, f"{SHORT}; a function of one line"),
}  # fmt: skip
"""Option of conf/reward, and a setting where one is measured twice -> what is measured."""


class Answers(BaseHTTPRequestHandler):
    """A server of the user's: the length of each response."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["samples"]
        body = json.dumps({"values": [len(s["response"]) for s in sent]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def processor() -> float:
    """Seconds of this process and of the children that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure(name: str, case: Case, places: dict[str, str]) -> dict[str, Any]:
    """One option: a first call that imports and loads, and a second one that counts."""
    words = [w.format(**places) if "{port}" in w or "{file}" in w else w for w in case.words]
    cfg = compose(
        "score", [f"reward={name.split()[0]}", *words, "reward_workers.processes=-1", "hardware.device=cpu"], None
    )
    scorer, comm = make_scorer(cfg), Comm(torch.device("cpu"))
    assert scorer is not None
    if name == "self":
        wiring.attended(scorer, verbs._sampler(cfg, cfg.model, torch.device("cpu")), cfg)
    samples = case.make()
    uids = {uid: i for i, uid in enumerate(dict.fromkeys(s.uid for s in samples))}
    group = torch.tensor([uids[s.uid] for s in samples])
    first = samples if name == "oni" else samples[:8]
    scorer.observe(first, scorer(first, group[: len(first)]), comm)
    cpu, clock = processor(), time.perf_counter()
    scores = scorer(samples, group)
    scorer.observe(samples, scores, comm)
    cpu, clock = processor() - cpu, time.perf_counter() - clock
    lost = int(scores.missing.sum()) if scores.missing is not None else 0
    assert name == "self" or not lost, f"{name}: {lost} of {len(samples)}: {scores.reasons}"
    each = 1000 / len(samples)
    return {"seconds_per_1000": cpu * each, "clock_per_1000": clock * each, "samples": len(samples), "on": case.on}


def table(found: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = ["| cost of | samples and model | s per 1,000, processor | by the clock |", "|---|---|---|---|"]
    for name, r in found.items():
        option, _, setting = name.partition(" ")
        numbers = [f"{r[k]:.2g}" if r[k] < 100 else f"{r[k]:.0f}" for k in ("seconds_per_1000", "clock_per_1000")]
        lines.append(f"| `{option}`{setting and ' ' + setting} | {r['on']} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure each, write JSON, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--only", default="", help="names with a comma between them; the others keep their numbers")
    a = parser.parse_args()
    output, only = Path(a.output), set(filter(None, a.only.split(",")))
    torch.set_num_threads(1)
    old: dict[str, Any] = json.loads(output.read_text())["sources"] if only and output.exists() else {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found: dict[str, Any] = {}
    machine = {"machine": platform.machine(), "torch": torch.__version__, "python": platform.python_version()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "my_rewards.py"
        file.write_text(FUNCTION)
        places = {"port": str(server.server_port), "file": str(file)}
        for name, case in CASES.items():
            if not only or name in only:
                found[name] = measure(name, case, places)
                print(f"{name}: {found[name]['seconds_per_1000']:.3g}", flush=True)
            elif name in old:
                found[name] = old[name]
            text = json.dumps({"machine": {**machine, "threads": 1}, "sources": found}, indent=1)
            output.write_text(text + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
