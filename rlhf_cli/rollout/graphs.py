"""Decoding through CUDA graphs: one launch for a whole step instead of one for each of its operations.

A step is recorded once for each span of the cache that is read, on tensors that stay where they are, and replayed with new numbers in
them. What a replay gives is compared with the model's own forward at the first step of a process, as every written-out step is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.rollout.cache import Board, SlotLayer
from rlhf_cli.rollout.decoder import Decoder

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records a function of no arguments: (what repeats it, the tensor that it writes its result to)."""


@dataclass(frozen=True)
class Recorded:
    """A step on tensors of its own."""

    tokens: Tensor
    places: Tensor
    mask: Tensor
    flat: Tensor
    logits: Tensor
    replay: Callable[[], None]


class Graphed:
    """A decoder whose steps are recorded and replayed; for one rollout, whose cache stays in place.

    Args:
        decoder: the step, as operations.
        capture: how a step is recorded; a CUDA graph where none is given.
    """

    def __init__(self, decoder: Decoder, capture: Capture | None = None) -> None:
        self.decoder = decoder
        self.capture = capture or on_gpu()
        self.steps: dict[int, Recorded] = {}  # span -> its step

    def __call__(self, tokens: Tensor, places: Tensor, mask: Tensor, board: Board, cache: list[SlotLayer]) -> Tensor:
        """Logits [slots, V], as `Decoder` gives them."""
        if board.span not in self.steps:
            self.steps[board.span] = self._record(tokens, places, mask, board, cache)
        step = self.steps[board.span]
        assert board.flat is not None
        for kept, new in ((step.tokens, tokens), (step.places, places), (step.mask, mask), (step.flat, board.flat)):
            kept.copy_(new)
        step.replay()
        return step.logits.clone()  # the next replay writes over them, and the sampler bans tokens in place

    def _record(self, tokens: Tensor, places: Tensor, mask: Tensor, board: Board, cache: list[SlotLayer]) -> Recorded:
        flat = board.flat
        assert flat is not None
        own = [x.clone() for x in (tokens, places, mask, flat)]
        board.flat = own[3]
        try:
            replay, logits = self.capture(lambda: self.decoder(*own[:3], board, cache))
        finally:
            board.flat = flat
        return Recorded(*own, logits, replay)


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


def decoder_of(hf: Any, rows: int) -> Graphed:
    """The step of a model with `rows` slots, recorded."""
    return Graphed(Decoder(hf, rows))
