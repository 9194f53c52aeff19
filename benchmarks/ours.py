"""Our side: the real loop on a job, one step per request. Argument: a job as JSON."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from channel import Answers
from meter import Meter
from workloads import Job, overrides


class Paced:
    """The record of a run that measures phases, reports every step and waits for the request to make the next."""

    def __init__(self, meter: Meter, answers: Answers) -> None:
        self.meter, self.answers = meter, answers

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self.meter.phase(name)

    def count(self, *_: Any, **__: Any) -> None:
        """Numbers that stages count; not needed."""

    def note(self, text: str) -> None:
        """What a run would say aloud goes to the log."""
        print(text, file=sys.stderr)

    def step(self, step: int, exp: Any, stats: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
        found = self.meter.end()
        numbers = {k: v for k, v in stats["policy"][0].items() if k in ("loss", "grad_norm")}
        self.answers.send({"step": step, **found, **numbers, **shape_of(exp)})

    def go_on(self, done: int) -> bool:
        """Whether to stop, once asked; what follows is the next step."""
        stop = self.answers.wait() != "step"
        self.meter.begin()
        return stop


def shape_of(exp: Any) -> dict[str, Any]:
    """Prompts (lengths and digest), response lengths and the mean reward of a step's rows."""
    prompts, responses, ids = {}, {}, {}
    for i, group in enumerate(exp.group.tolist()):
        n, first = int(exp.attention[i].sum()), int(exp.mask[i].int().argmax())
        prompts[group], ids[group] = first, exp.ids[i, :first].tolist()
        responses.setdefault(group, []).append(n - first)
    return {
        "groups": [[prompts[g], responses[g]] for g in prompts],
        "tokens": int(exp.mask.sum()),
        "digest": digest(ids.values()),
        "reward": float(exp.score.mean()),
    }


def digest(prompts: Iterable[Sequence[int]]) -> str:
    """One text for a list of prompts' token ids."""
    return hashlib.sha256(json.dumps([list(p) for p in prompts]).encode()).hexdigest()[:16]


def make(job: Job, record: Any) -> tuple[Any, Any, Any]:
    """(Run, Parts, configuration) of a job, as `rlhf train` builds them."""
    from rlhf_cli.launch.local import calm

    calm(job.threads, alone=True)
    import torch
    from omegaconf import OmegaConf

    from rlhf_cli.compose import compose
    from rlhf_cli.engine import comm
    from rlhf_cli.engine.memory import keep_freed_memory
    from rlhf_cli.hardware import resolve_hardware
    from rlhf_cli.wiring import make_run

    cfg = compose("train", overrides(job), None)
    OmegaConf.update(cfg, "hardware", resolve_hardware(cfg), merge=True)
    keep_freed_memory()
    torch.set_num_threads(job.threads)
    torch.manual_seed(cfg.seed)
    device = torch.device(job.device, *([0] if job.device == "cuda" else []))
    return *make_run(cfg, comm.start(device), record), cfg


def main() -> None:
    job, answers = Job.loads(sys.argv[1]), Answers()
    meter = Meter("cpu")  # nothing of torch may be imported before `calm`
    began = time.perf_counter()
    record = Paced(meter, answers)
    run, _, _ = make(job, record)
    load = meter.end()
    meter.device = job.device
    answers.send({"load_seconds": time.perf_counter() - began, "load_peak_gb": load["step_peak_gb"]})
    run.after = record.go_on
    from rlhf_cli.loop import train

    if not record.go_on(0):
        train(run)


if __name__ == "__main__":
    main()
