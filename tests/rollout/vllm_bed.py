"""Material for the tests of vLLM: a small model, a learner and its engine; as a program, two ranks that share one server.

python -m torch.distributed.run --standalone --nproc_per_node 2 tests/rollout/vllm_bed.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from rlhf_cli.compose import compose
from rlhf_cli.engine.comm import Comm, start
from rlhf_cli.models.tiny import tiny_config, tiny_tokenizer
from rlhf_cli.rollout import builtin
from rlhf_cli.rollout import vllm as backend
from rlhf_cli.rollout.sampler import Decoding, Rollout
from rlhf_cli.rollout.vllm_engine import Server

# The long prompt fills blocks of the key-value cache, which vLLM shares between prompts.
PROMPTS = [[256, *(b"A long prompt, " * 12)], [256, *b"hm"], [256, *b"What is it?"]]
CPU = Comm(torch.device("cpu"))
GREEDY, WARM = Decoding(max_tokens=24, temperature=0.0), Decoding(max_tokens=24, temperature=0.7)


def llama(seed: int = 0) -> Any:
    """A small random Llama with heads that vLLM's CPU attention takes, and tied embeddings; one token in eight ends a response."""
    from transformers import LlamaForCausalLM

    config = tiny_config()
    config.hidden_size, config.head_dim, config.tie_word_embeddings = 128, 32, True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        for p in model.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
    model.generation_config.eos_token_id = [257, *range(60, 90)]
    return model


def config(*words: str) -> Any:
    plain = [
        "rollout=vllm",
        "hardware.device=cpu",
        "hardware.precision=fp32",
        "hardware.threads=1",
        "dataset.max_prompt_tokens=232",
    ]
    return compose("train", [*plain, "rollout.max_tokens=24", "rollout.rows=16", *words], None)


class Bed:
    """A learner, the built-in sampler on it, and a vLLM engine that gets its weights."""

    def __init__(self, *words: str, comm: Comm = CPU) -> None:
        self.cfg, self.comm = config(*words), comm
        self.model = llama()
        self.sampler = backend.make_sampler(self.cfg, self.model, tiny_tokenizer(), self.comm)
        self.counted: dict[str, float] = {}
        self.learn(self.model)

    def learn(self, model: Any) -> None:
        """Make `model` the learner, and publish it."""
        state = lambda: ((f"model.{k}", v) for k, v in (*model.named_parameters(), *model.named_buffers()))  # noqa: E731
        self.learner: Any = SimpleNamespace(module=SimpleNamespace(model=model), full_state=state, moved=False)
        self.own = builtin.make_sampler(self.cfg, model, tiny_tokenizer(), CPU)
        self.own.eos = self.sampler.eos
        self.publish = backend.make_publish(
            self.cfg, self.sampler, model, self.learner, self.comm, lambda numbers, stage: self.counted.update(numbers)
        )
        self.publish()

    def step(self, size: float = 0.05) -> None:
        """Move every weight of the learner a little."""
        with torch.no_grad():
            for p in self.learner.module.model.parameters():
                p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        self.learner.moved = True

    def both(self, decoding: Decoding = GREEDY) -> tuple[Rollout, Rollout]:
        seeds = list(range(len(PROMPTS)))
        return self.own.sample(PROMPTS, 1, seeds, decoding), self.sampler.sample(PROMPTS, 1, seeds, decoding)

    def agree(self) -> Rollout:
        """Both draw the same best tokens with the same log-probs."""
        ours, theirs = self.both()
        assert theirs.ids == ours.ids and torch.equal(theirs.truncated, ours.truncated)
        assert torch.allclose(theirs.logp, ours.logp, atol=1e-3)
        return theirs


def main(out: Path) -> None:
    """One server for two ranks: weights twice, each rank draws its prompts at the same time, and rank 0 then draws all alone."""
    asked: Counter[str] = Counter()
    post = Server._post

    def counted(self: Server, path: str, body: Any = None) -> Any:
        asked[path] += 1
        return post(self, path, body)

    Server._post = counted  # type: ignore[method-assign]
    comm = start(torch.device("cpu"))
    bed = Bed("rollout.vllm.mode=server", comm=comm)
    before = bed.sampler.engine.call("rlhf_fingerprints", 1)
    comm.barrier()
    bed.step()
    bed.publish()
    held = bed.sampler.engine.call("rlhf_fingerprints", 1)
    mine = range(comm.rank, len(PROMPTS), comm.world)
    seeds = [2 * i + j for i in mine for j in (0, 1)]
    drawn = bed.sampler.sample([PROMPTS[i] for i in mine], 2, seeds, WARM)
    found: dict[str, Any] = {
        "before": before,
        "held": held,
        "counted": bed.counted,
        "asked": dict(asked),
        "server": bed.sampler.engine.url,
    }
    found["drawn"] = dict(zip(map(str, seeds), drawn.ids, strict=True))
    comm.barrier()
    if comm.rank == 0:
        ours, theirs = bed.both()
        alone = bed.sampler.sample(PROMPTS, 2, range(2 * len(PROMPTS)), WARM)
        found |= {"alone": alone.ids, "greedy": theirs.ids, "own greedy": ours.ids}
    (out / f"rank-{comm.rank}.json").write_text(json.dumps(found))
    comm.barrier()
    bed.sampler.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
