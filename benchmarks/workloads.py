"""What is measured: batches of prompts, and the same records for every side."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

STEPS = 64  # steps that the records of a workload last for
BETA = 0.04
QUICKSTART = Path(__file__).parent.parent / "rlhf_cli" / "data" / "quickstart" / "train.jsonl"


@dataclass(frozen=True)
class Workload:
    """One GRPO step: `prompts` x `samples` responses of exactly `new_tokens` tokens, one update."""

    name: str
    prompts: int
    samples: int
    new_tokens: int
    min_prompt_tokens: int = 0  # a prompt is repeated until it has so many tokens, chat template not counted
    lora: int = 0  # rank; 0 trains every weight

    @property
    def max_prompt_tokens(self) -> int:
        """What a user would type: `min_prompt_tokens` twice, since a prompt is doubled, or the default."""
        return max(512, 2 * self.min_prompt_tokens)

    @property
    def rows(self) -> int:
        return self.prompts * self.samples


WORKLOADS = {
    w.name: w
    for w in (
        Workload("W0", 2, 4, 8),  # a trial of the scripts
        Workload("W1", 8, 4, 64),
        Workload("W2", 4, 8, 128, min_prompt_tokens=256),
        Workload("W3", 4, 8, 128, min_prompt_tokens=256, lora=16),
        Workload("W4", 8, 8, 512),  # for a GPU, with --model random-1b
    )
}


@dataclass(frozen=True)
class Job:
    """What a measuring process needs to know. Travels as JSON."""

    workload: Workload
    precision: str  # fp32 | bf16
    device: str  # cpu | cuda
    threads: int
    model: str  # folder of weights and tokenizer
    records: str  # folder that `write` filled
    rows: int = 0  # rows per forward, where the side cannot choose itself
    start: int = 0  # the step of the workload's order that the process begins with, where it can choose
    extra: tuple[str, ...] = ()  # more settings of ours

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str) -> Job:
        raw = json.loads(text)
        return replace(Job(**raw), workload=Workload(**raw["workload"]), extra=tuple(raw["extra"]))


def read(data: str) -> list[dict[str, str]]:
    """Prompts with one reference each, from `question`/`answer` or `prompt`/`references` lines; empty: the packaged ones."""
    found = []
    for line in Path(data or QUICKSTART).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        reference = row["answer"] if "answer" in row else row["references"]
        text = reference if isinstance(reference, str) else reference[0]
        found.append({"prompt": row["question"] if "question" in row else row["prompt"], "references": text})
    return found


def write(folder: Path, data: str, tokenizer: Any, workload: Workload) -> None:
    """Write the records of a workload into `folder`: train.jsonl, heldout.jsonl and order.jsonl.

    Ours visits records in a permutation of its own, so `order.jsonl` holds them as it will come to them, which is the
    order in which the other side gets them.
    """
    from rlhf_cli.sources.assemble import Order

    rows = read(data)
    want = min(workload.prompts * STEPS, 256, len(rows) - 4)
    if want < workload.prompts:
        raise SystemExit(f"{data or QUICKSTART}: {len(rows)} records are too few for {workload.prompts} prompts a step")
    padded = [{**r, "prompt": lengthen(r["prompt"], tokenizer, workload.min_prompt_tokens)} for r in rows[: want + 4]]
    train, heldout = padded[:want], padded[want:]
    order = Order(len(train), seed=0).take(workload.prompts * STEPS)
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in {"train": train, "heldout": heldout, "order": [train[i] for i in order]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some), encoding="utf-8")


def lengthen(text: str, tokenizer: Any, least: int) -> str:
    """The text, doubled until it has `least` tokens."""
    while len(tokenizer(text, add_special_tokens=False)["input_ids"]) < least:
        text = f"{text} {text}"
    return text


def overrides(job: Job, *more: str) -> list[str]:
    """Our settings for a job: temperature 1, no EOS before the last token, one update per rollout. Later ones win."""
    w, folder = job.workload, Path(job.records)
    settings = [
        "algo=grpo", f"updates.policy.kl.coef={BETA}", "reward=bleu", "model=path", f"model.path={job.model}",
        f"model.lora.r={w.lora}", "dataset=jsonl", f"dataset.path={folder / 'train.jsonl'}",
        f"dataset.heldout={folder / 'heldout.jsonl'}", f"dataset.max_prompt_tokens={w.max_prompt_tokens}", f"batch.prompts={w.prompts}",
        f"batch.samples={w.samples}", "batch.epochs=1", "batch.minibatches=1", f"rollout.max_tokens={w.new_tokens}",
        f"rollout.min_tokens={w.new_tokens}", "rollout.temperature=1.0", f"rollout.rows={w.rows}", "optim.lr=1e-6",
        "gates.constant_steps=1000", "tracker=none", "steps=100000", f"hardware.device={job.device}", "hardware.processes=1",
        f"hardware.threads={job.threads}", f"hardware.precision={job.precision}", *job.extra, *more,
    ]  # fmt: skip
    return list({s.partition("=")[0]: s for s in settings}.values())
