"""The shipped data set `scored`: responses of SmolLM2-135M-Instruct to the quickstart instructions, each with its sentence BLEU.

rlhf generate input=rlhf_cli/data/quickstart/train.jsonl eval.samples=4 rollout.max_tokens=48 rollout.temperature=0.9 output=OUT.jsonl
python scripts/scored_quickstart.py OUT.jsonl rlhf_cli/data/quickstart/train.jsonl rlhf_cli/data/scored/train.jsonl 200
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rlhf_cli.compose import compose
from rlhf_cli.config import build
from rlhf_cli.types import Sample


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def main(responses: str, quickstart: str, out: str, limit: str) -> None:
    """One ranking for each of the first `limit` prompts: its different responses, best first. Prompts with one score alone are left out."""
    bleu: Any = build(compose("score", ["reward=bleu"], None).reward.bleu, "reward.bleu", reserved=("weight",))
    texts: dict[str, list[str]] = {}
    for row in lines(responses):
        texts.setdefault(row["prompt"], []).append(row["response"])
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with Path(out).open("w", encoding="utf-8") as f:
        for record in lines(quickstart)[: int(limit)]:
            different = sorted(set(texts[record["prompt"]]))
            samples = [Sample(record["prompt"], t, tuple(record["references"])) for t in different]
            scored = [(round(r.value, 4), s.response) for r, s in zip(bleu.rows(samples), samples, strict=True)]
            scored.sort(key=lambda x: (-x[0], x[1]))
            if len({s for s, _ in scored}) > 1:
                scores, best_first = zip(*scored, strict=True)
                made = {"prompt": record["prompt"], "responses": best_first, "scores": scores}
                f.write(json.dumps(made | {"references": record["references"]}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
