"""TRL's side: its GRPOTrainer on a job, one step per request. Argument: a job as JSON.

Weights in the precision of the job, which is TRL's fastest and smallest choice; the same prompts, reward and number of tokens as ours.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from channel import Answers
from datasets import Dataset
from meter import Meter
from ours import digest
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from workloads import BETA, Job

LR = 1e-6


class Paced(TrainerCallback):
    """Waits for a request before every step and answers after it."""

    def __init__(self, meter: Meter, answers: Answers, facts: dict[str, Any], start: int) -> None:
        self.meter, self.answers, self.facts, self.start = meter, answers, facts, start
        self.taken = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if (self.taken or self.answers.wait()) != "step":
            raise SystemExit(0)
        self.taken = ""
        self.meter.begin("update")  # whatever is no rollout, reward or reference pass

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.answers.send({"step": self.start + state.global_step - 1, **self.meter.end(), **self.facts})


class Timed(GRPOTrainer):
    """The trainer with its phases measured; it computes what it always computes."""

    meter: Meter
    facts: dict[str, Any]

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        with self.meter.phase("rollout"):
            out = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        k = self.num_generations
        lengths = [len(x) for x in out[0]]
        groups = [[len(prompt_ids[i]), lengths[i : i + k]] for i in range(0, len(prompt_ids), k)]
        self.facts |= {"groups": groups, "tokens": sum(lengths), "digest": digest(prompt_ids[::k])}
        return out

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.phase("score"):
            out = super()._calculate_rewards(*args, **kwargs)
        self.facts["reward"] = float(out.mean())
        return out

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.phase("update" if torch.is_grad_enabled() else "annotate"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)


def make(job: Job, out: str, facts: dict[str, Any], meter: Meter, answers: Answers) -> Timed:
    """The trainer of a job."""
    w, low = job.workload, job.precision == "bf16"
    lines = (Path(job.records) / "order.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(x) for x in lines[job.start * w.prompts :]]
    data = [{"prompt": [{"role": "user", "content": r["prompt"]}], "reference": r["references"]} for r in rows]
    bleu = sacrebleu.metrics.BLEU(effective_order=True)

    def reward(completions: Any, reference: Any, **_: Any) -> list[float]:
        pairs = zip(completions, reference, strict=True)
        return [bleu.sentence_score(c[0]["content"], [r]).score / 100 for c, r in pairs]

    config = GRPOConfig(
        output_dir=out, per_device_train_batch_size=job.rows, gradient_accumulation_steps=w.rows // job.rows,
        num_generations=w.samples, max_completion_length=w.new_tokens, generation_kwargs={"min_new_tokens": w.new_tokens},
        temperature=1.0, beta=BETA, loss_type="grpo", learning_rate=LR, lr_scheduler_type="constant", max_steps=100000,
        bf16=low, use_cpu=job.device == "cpu", gradient_checkpointing=False, shuffle_dataset=False, report_to=[],
        logging_strategy="no", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    adapters = None
    if w.lora:
        from peft import LoraConfig

        adapters = LoraConfig(r=w.lora, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0)
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16 if low else torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=adapters,
    )
    trainer.meter, trainer.facts = meter, facts
    return trainer


def main() -> None:
    job, answers, facts = Job.loads(sys.argv[1]), Answers(), {}
    meter = Meter(job.device)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        trainer = make(job, out, facts, meter, answers)
        paced = Paced(meter, answers, facts, job.start)
        trainer.add_callback(paced)
        load = meter.end()
        answers.send({"load_seconds": time.perf_counter() - began, "load_peak_gb": load["step_peak_gb"]})
        paced.taken = answers.wait()
        if paced.taken == "step":
            trainer.train()


if __name__ == "__main__":
    main()
