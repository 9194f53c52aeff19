"""What a reward costs a step: in place, in worker processes, and what is left of it when groups come one after another.

    python benchmarks/rewards.py --step 30 --processes 1

Texts are random words of a Zipf-like distribution, references of the same length; group sizes and counts are as in training.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from grpo_step import spoken
from machine import describe

from rlhf_cli.config import build, check_node
from rlhf_cli.rewards.pool import Pooled, Workers
from rlhf_cli.types import Sample

BLEU = {
    "_target_": "rlhf_cli.rewards.bleu.Bleu", "smooth": "exp", "smooth_value": None, "max_order": 4, "effective_order": True,
    "tokenize": "13a", "lowercase": False,
}  # fmt: skip


def texts(groups: int, k: int, words: int) -> tuple[list[Sample], torch.Tensor]:
    """`k` responses to each of `groups` prompts, 60 % of their words those of the reference."""
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(5000)]
    weights = [1 / (i + 3) for i in range(5000)]
    samples = []
    for g in range(groups):
        reference = rng.choices(vocabulary, weights, k=words)
        for _ in range(k):
            response = [w if rng.random() < 0.6 else rng.choices(vocabulary, weights)[0] for w in reference]
            samples.append(Sample(f"p{g}", " ".join(response), (" ".join(reference),), {}, str(g)))
    return samples, torch.arange(groups).repeat_interleave(k)


def main() -> None:
    """Print one JSON object of seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=128)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--words", type=int, default=300)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--step", type=float, default=30.0, help="seconds over which the groups are complete, one by one"
    )
    parser.add_argument("--out", default="", help="result file; default: only printed")
    a = parser.parse_args()
    samples, group = texts(a.groups, a.k, a.words)
    sig, settings = check_node(BLEU, "bleu")
    local = build(BLEU, "bleu")
    local(samples[: a.k], group[: a.k])  # imports

    start = time.perf_counter()
    plain = local(samples, group)
    blocking = time.perf_counter() - start

    workers = Workers(a.processes, 30.0)
    pool = Pooled("bleu", local, (sig.target, settings), workers)
    start = time.perf_counter()
    pool(samples[:1], group[:1])
    startup = time.perf_counter() - start

    start = time.perf_counter()
    pooled = pool(samples, group)
    at_once = time.perf_counter() - start
    assert torch.equal(pooled.value, plain.value), "the pool changed a score"

    handing = 0.0
    begun = time.perf_counter()
    for g in range(a.groups):
        time.sleep(max(0.0, begun + (g + 1) * a.step / a.groups - time.perf_counter()))
        start = time.perf_counter()
        pool.begin(samples[g * a.k : (g + 1) * a.k])
        handing += time.perf_counter() - start
    start = time.perf_counter()
    late = pool(samples, group)
    left = time.perf_counter() - start
    assert torch.equal(late.value, plain.value), "the pool changed a score"
    found = {
        "samples": len(samples), "words": a.words, "processes": a.processes, "step": a.step, "in_place": blocking, "worker_start": startup,
        "pool_at_once": at_once, "handing_over": handing, "left_at_the_end": left, "share_of_step": (handing + left) / a.step,
    }  # fmt: skip
    found = {k: round(v, 4) for k, v in found.items()}
    print(json.dumps(found))
    if a.out:
        about = {**describe("cpu", torch.get_num_threads()), "command": spoken("rewards.py", sys.argv[1:])}
        Path(a.out).write_text(json.dumps({**about, "bleu": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
