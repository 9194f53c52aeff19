"""Decoding through CUDA graphs: one launch for a whole step instead of one for each of its operations.

A step is recorded once for each span of the cache that is read, on tensors that stay where they are, and replayed with new numbers in
them. What a replay gives is compared with the model's own forward at the first step of a process, as every written-out step is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.rollout.decoder import Decoder
from rlhf_cli.rollout.sampler import Sampler
from rlhf_cli.rollout.tree import Memory, Slots

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records a function of no arguments: (what repeats it, the tensor that it writes its result to)."""


@dataclass(frozen=True)
class Recorded:
    """A step on tensors of its own."""

    inputs: list[Tensor]  # tokens, places, mask, flat places of the cache
    logits: Tensor
    replay: Callable[[], None]


class Graphed:
    """A decoder whose steps are recorded and replayed; for one rollout, whose cache stays in place.

    Args:
        decoder: the step, as operations.
        capture: how a step is recorded.
        failed: hears why a step cannot be recorded; the operations themselves go on.
    """

    def __init__(self, decoder: Decoder, capture: Capture, failed: Callable[[str], None]) -> None:
        self.decoder, self.failed = decoder, failed
        self.capture: Capture | None = capture
        self.steps: dict[int, Recorded] = {}  # span -> its step

    def __call__(self, tokens: Tensor, places: Tensor, memory: Memory) -> Tensor:
        """Logits [slots, V], as `Decoder` gives them; `memory` holds whole rows."""
        assert isinstance(memory, Slots) and memory.board.flat is not None
        span, new = memory.board.span, (tokens, places, memory.mask, memory.board.flat)
        if self.capture is not None and span not in self.steps:
            try:
                self.steps[span] = self._record(self.capture, memory, [x.clone() for x in new])
            except RuntimeError as e:
                self.capture = None
                self.failed(" ".join(str(e).split())[:200])
        if self.capture is None:
            return self.decoder(tokens, places, memory)
        step = self.steps[span]
        for kept, x in zip(step.inputs, new, strict=True):
            kept.copy_(x)
        step.replay()
        return step.logits.clone()  # the next replay writes over them, and the sampler bans tokens in place

    def _record(self, capture: Capture, memory: Slots, own: list[Tensor]) -> Recorded:
        board = copy.copy(memory.board)
        tokens, places, mask, board.flat = own
        replay, logits = capture(lambda: self.decoder(tokens, places, Slots(board, memory.layers, mask)))
        return Recorded(own, logits, replay)


def on_gpu() -> Capture:
    """CUDA graphs that share one pool of memory: they never run at the same time."""
    pool: Any = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate at the first call, which a graph must not hold
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = step()
        return graph.replay, logits

    return capture


def use(sampler: Sampler, capture: Callable[[], Capture] = on_gpu) -> None:
    """Let a sampler record its steps; where one cannot be, this rollout goes on by operations and later ones by the model's forward."""

    def failed(why: str) -> None:
        sampler.decoder_of = None
        sampler.note(f"rollout.cuda_graphs: a step cannot be recorded ({why}); the model's own forward is used")

    sampler.decoder_of = lambda hf, rows: Graphed(Decoder(hf, rows), capture(), failed)
