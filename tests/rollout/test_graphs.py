"""Recorded decoding steps: what is replayed reads the numbers of the step, not those of the recording."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.plan import validate
from rlhf_cli.rollout.decoder import Decoder
from rlhf_cli.rollout.graphs import Graphed
from tests.rollout.test_sampler import PROMPTS, llama, sampler, seeds


class Tape:
    """Records as a graph does: the same operations on the same tensors, the result in the same place."""

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        out = step()

        def replay() -> None:
            self.replayed += 1
            out.copy_(step())

        return replay, out


def graphed(tape: Tape, hf: Any, rows: int) -> Graphed:
    return Graphed(Decoder(hf, rows), tape)


@pytest.mark.parametrize("tokens", [6, 60], ids=["one span", "several"])
def test_replays_draw_what_the_model_draws(tokens: int) -> None:
    tape, fast, slow = Tape(), sampler(llama(), max_tokens=tokens, rows=4), sampler(llama(), max_tokens=tokens, rows=4)
    fast.decoder_of, slow.decoder_of = partial(graphed, tape), None
    one, other = (s.sample(PROMPTS, 2, seeds(8)) for s in (fast, slow))
    assert fast.written_out and one.ids == other.ids
    torch.testing.assert_close(one.logp, other.logp, rtol=0, atol=1e-5)
    longest = max(map(len, PROMPTS)) + tokens
    assert 1 < tape.recorded <= -(-longest // 32) and tape.replayed > 2 * tape.recorded


def test_a_result_is_not_written_over_by_the_next() -> None:
    tape, kept = Tape(), []

    def keeping(hf: Any, rows: int) -> Callable[..., Tensor]:
        step = graphed(tape, hf, rows)

        def call(*args: Any) -> Tensor:
            kept.append(step(*args))
            return kept[-1].clone()

        return call

    s = sampler(llama(), max_tokens=6, rows=4)
    s.decoder_of = keeping
    s.sample(PROMPTS, 2, seeds(8))
    assert len({x.data_ptr() for x in kept}) == len(kept) and not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("word", ["hardware=cpu", "model.lora.r=4"])
def test_where_it_cannot_work_it_is_refused(word: str) -> None:
    with pytest.raises(ConfigError) as e:
        validate(compose("train", ["rollout.cuda_graphs=true", word], None))
    assert str(e.value) == (
        "rollout.cuda_graphs works on an NVIDIA GPU, with rollout=builtin and without model.lora; type rollout.cuda_graphs=false"
    )
