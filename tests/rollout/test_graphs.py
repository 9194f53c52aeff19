"""Recorded decoding steps: what is replayed reads the numbers of the step, not those of the recording."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.plan import validate
from rlhf_cli.rollout.decoder import Decoder
from rlhf_cli.rollout.graphs import Graphed, use
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


@pytest.mark.parametrize("tokens", [6, 60], ids=["one span", "several"])
def test_replays_draw_what_the_model_draws(tokens: int) -> None:
    tape, fast, slow = Tape(), sampler(llama(), max_tokens=tokens, rows=4), sampler(llama(), max_tokens=tokens, rows=4)
    use(fast, lambda: tape)
    slow.decoder_of = None
    one, other = (s.sample(PROMPTS, 2, seeds(8)) for s in (fast, slow))
    assert fast.written_out and one.ids == other.ids
    torch.testing.assert_close(one.logp, other.logp, rtol=0, atol=1e-5)
    longest = max(map(len, PROMPTS)) + tokens
    assert 1 < tape.recorded <= -(-longest // 32) and tape.replayed > 2 * tape.recorded


def test_a_result_is_not_written_over_by_the_next() -> None:
    kept: list[Tensor] = []
    s = sampler(llama(), max_tokens=6, rows=4)

    def keeping(hf: Any, rows: int) -> Callable[..., Tensor]:
        step = Graphed(Decoder(hf, rows), Tape(), pytest.fail)

        def call(*args: Any) -> Tensor:
            kept.append(step(*args))
            return kept[-1].clone()

        return call

    s.decoder_of = keeping
    s.sample(PROMPTS, 2, seeds(8))
    assert len({x.data_ptr() for x in kept}) == len(kept) and not torch.equal(kept[0], kept[1])


def test_a_step_that_cannot_be_recorded_is_said_and_nothing_is_lost() -> None:
    def refuse(step: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    s, slow, said = sampler(llama()), sampler(llama()), []
    s.note = said.append
    slow.decoder_of = None
    use(s, lambda: refuse)
    assert s.sample(PROMPTS, 2, seeds(8)).ids == slow.sample(PROMPTS, 2, seeds(8)).ids
    why = "operation not permitted when stream is capturing"
    assert said == [f"rollout.cuda_graphs: a step cannot be recorded ({why}); the model's own forward is used"]
    assert s.decoder_of is None


@pytest.mark.parametrize("word", ["hardware=cpu", "model.lora.r=4"])
def test_where_it_cannot_work_it_is_refused(word: str) -> None:
    with pytest.raises(ConfigError) as e:
        validate(compose("train", ["rollout.cuda_graphs=true", word], None))
    assert str(e.value) == (
        "rollout.cuda_graphs works on an NVIDIA GPU, with rollout=builtin and without model.lora; type rollout.cuda_graphs=false"
    )
