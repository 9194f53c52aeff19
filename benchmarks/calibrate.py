"""A fixed piece of work in plain torch, timed on request: what this machine can do just now. Argument: a job as JSON."""

from __future__ import annotations

import sys
import time
from typing import Any

from channel import Answers
from workloads import Job

TOKENS, WIDTH, FFN, VOCABULARY, DECODED = 1024, 576, 1536, 49152, 32


def work(torch: Any, dtype: Any, device: str) -> Any:
    """A function that does a layer's forward and backward pass, an output layer over a chunk, and some decoding."""
    g = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Any:
        return (torch.randn(*shape, generator=g) * 0.02).to(device, dtype).requires_grad_()

    x, up, down, out = made(TOKENS, WIDTH), made(FFN, WIDTH), made(WIDTH, FFN), made(VOCABULARY, WIDTH)

    def once() -> None:
        y = x
        for _ in range(8):
            y = y + torch.nn.functional.silu(y @ up.T) @ down.T
        logits = (y[: TOKENS // 4] @ out.T).float()
        logits.logsumexp(-1).sum().backward()
        with torch.no_grad():
            for _ in range(16):
                step = x[:DECODED]
                for _ in range(8):
                    step = step + torch.nn.functional.silu(step @ up.T) @ down.T
                (step @ out.T).float().softmax(-1).cumsum(-1)
        for p in (x, up, down, out):
            p.grad = None

    return once


def main() -> None:
    job, answers = Job.loads(sys.argv[1]), Answers()
    from rlhf_cli.launch.local import calm

    calm(job.threads, alone=True)
    import torch

    torch.set_num_threads(job.threads)
    once = work(torch, torch.bfloat16 if job.precision == "bf16" else torch.float32, job.device)
    once()
    answers.send({"ready": True})
    while answers.wait() != "quit":
        times = []
        for _ in range(3):
            began = time.perf_counter()
            once()
            if job.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        answers.send({"seconds": min(times)})


if __name__ == "__main__":
    main()
