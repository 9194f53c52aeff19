"""On-policy rows from the tiny random model."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf_cli.data.record import Record
from rlhf_cli.engine.comm import Comm
from rlhf_cli.models.tiny import tiny_causal, tiny_tokenizer
from rlhf_cli.rollout.sampler import Decoding, Sampler
from rlhf_cli.sources.assemble import texts_of
from rlhf_cli.sources.sampled import Sampled, draw, row_seed
from rlhf_cli.types import Sample

PROMPTS = ["What is it?", "Why", "A longer prompt than the others", "hm"]
RECORDS = [Record(({"role": "user", "content": p},), p, uid=str(i)) for i, p in enumerate(PROMPTS)]
ENCODED = [[256, *p.encode()] for p in PROMPTS]
COMM = Comm(torch.device("cpu"))


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    model = tiny_causal(0, torch.float32)
    model.generation_config.eos_token_id = [257, *range(60, 90)]  # so that rows end early
    return Sampler(model, tiny_tokenizer(), Decoding(max_tokens=8, rows=4), device="cpu")


def source(sampler: Sampler, **changes: Any) -> Sampled:
    settings: dict[str, Any] = {"prompts": 3, "samples": 2, "seed": 0} | changes
    return Sampled(RECORDS, ENCODED, sampler, lambda: None, COMM, **settings)


def test_rows_of_a_step(sampler: Sampler) -> None:
    s = source(sampler)
    s.publish(4)
    exp = next(s)
    assert exp.group.tolist() == [0, 0, 1, 1, 2, 2] and exp.version.tolist() == [4] * 6
    assert len({exp.samples[i].uid for i in (0, 2, 4)}) == 3
    for i, sample in enumerate(exp.samples):
        prompt = ENCODED[int(sample.uid)]
        n = int(exp.attention[i].sum())
        assert exp.ids[i, : len(prompt)].tolist() == prompt
        assert exp.mask[i].nonzero().flatten().tolist() == list(range(len(prompt), n))
        answer = exp.ids[i, len(prompt) : n].tolist()
        assert bool(exp.truncated[i]) == (answer[-1] not in sampler.eos) and len(answer) <= 8
        assert sample.response == texts_of(sampler, [answer])[0]
    assert (exp.behavior_logp[exp.mask] < 0).all() and not exp.behavior_logp[~exp.mask].any()
    assert exp.ids[0].tolist() != exp.ids[1].tolist(), "responses to one prompt differ"


def test_every_rank_hears_of_the_longest_prompt_of_the_step(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """How a prompt's keys are read follows from it, and ranks have prompts of other lengths."""
    heard = []

    class Half(Comm):
        rank, world = 0, 2

        def __init__(self, rank: int) -> None:
            self.device, self.rank = torch.device("cpu"), rank

        def gather(self, x: Any) -> list[Any]:
            return [x, x]

    def sample(prompts: Any, k: int, seeds: Any, decoding: Decoding, done: Any) -> Any:
        heard.append((len(prompts), decoding.wave, decoding.longest))
        return Sampler.sample(sampler, prompts, k, seeds, decoding, done)

    monkeypatch.setattr(sampler, "sample", sample)
    for rank in (0, 1):
        next(Sampled(RECORDS, ENCODED, sampler, lambda: None, Half(rank), prompts=4, samples=2, seed=0))
    assert heard == [(2, 8, len(ENCODED[2]))] * 2


def test_it_goes_on_identically_from_its_state(sampler: Sampler) -> None:
    first = source(sampler)
    for step in range(2):
        next(first)
        first.publish(step + 1)
    other = source(sampler)
    other.load_state_dict(first.state_dict())
    a, b = next(first), next(other)
    assert torch.equal(a.ids, b.ids) and torch.equal(a.behavior_logp, b.behavior_logp) and a.samples == b.samples
    assert a.version.tolist() == [2] * 6


def test_versions_and_seeds_draw_other_tokens(sampler: Sampler) -> None:
    one, later, other = source(sampler, prompts=4), source(sampler, prompts=4), source(sampler, prompts=4, seed=1)
    later.version = 1
    a, b, c = next(one), next(later), next(other)
    assert a.ids.shape != b.ids.shape or not torch.equal(a.ids, b.ids)
    assert a.ids.shape != c.ids.shape or not torch.equal(a.ids, c.ids)


def test_publish_brings_the_weights(sampler: Sampler) -> None:
    called: list[int] = []
    s = Sampled(RECORDS, ENCODED, sampler, lambda: called.append(1), COMM, prompts=1, samples=1, seed=0)
    s.publish(3)
    assert called == [1] and s.version == 3


def test_ranks_draw_what_one_would(sampler: Sampler) -> None:
    """Three ranks in turn; the gather hands rank 0 what all of them drew."""
    seeds = [row_seed(0, 0, p, k) for p in range(4) for k in range(2)]
    alone = draw(sampler, ENCODED, 2, seeds, COMM)

    class Rank:
        def __init__(self, rank: int, parts: list[Any]) -> None:
            self.rank, self.world, self.parts = rank, 3, parts

        def gather(self, own: Any) -> list[Any]:
            self.parts.append(own)
            return self.parts if len(self.parts) == 3 else [[(own[0] if own else ([], [], False))] * 4] * 3

    parts: list[Any] = []
    for rank in range(3):
        comm: Any = Rank(rank, parts)
        together = draw(sampler, ENCODED, 2, seeds, comm)
    assert [len(p) for p in parts] == [4, 2, 2], "whole groups, in turn"
    assert together.ids == alone.ids and together.truncated == alone.truncated
    assert [x for row in together.logp for x in row] == pytest.approx([x for row in alone.logp for x in row], abs=1e-6)


def test_row_seeds_differ_and_fit() -> None:
    seeds = {row_seed(s, v, p, k) for s in range(3) for v in range(-1, 3) for p in range(5) for k in range(5)}
    assert len(seeds) == 300 and all(0 <= s < 2**63 for s in seeds)
    assert row_seed(1, 2) == row_seed(1, 2)


def test_groups_are_handed_on_as_they_are_drawn(sampler: Sampler) -> None:
    begun: list[list[Sample]] = []
    s = Sampled(RECORDS, ENCODED, sampler, lambda: None, COMM, prompts=3, samples=2, seed=0, begin=begun.append)
    exp, plain = next(s), next(source(sampler))
    groups = [list(exp.samples[i : i + 2]) for i in (0, 2, 4)]
    assert sorted(begun, key=groups.index) == groups
    assert exp.samples == plain.samples and torch.equal(exp.behavior_logp, plain.behavior_logp)


def test_a_further_rollout_of_a_step_has_its_own_numbers(sampler: Sampler) -> None:
    s, other = source(sampler, prompts=4), source(sampler, prompts=4)
    first, second = next(s), next(s)
    assert {x.uid for x in first.samples} == {x.uid for x in second.samples} == {"0", "1", "2", "3"}
    by_uid = {x.uid: x.response for x in second.samples[::2]}
    assert any(by_uid[x.uid] != x.response for x in first.samples[::2])
    s.publish(1)
    other.load_state_dict(s.state_dict())
    assert next(s).samples == next(other).samples, "what is drawn after publish does not depend on how much was before"


def test_a_greedy_response_joins_each_group(sampler: Sampler) -> None:
    begun: list[list[Sample]] = []
    s = source(sampler, greedy=True, begin=begun.append)
    exp, plain = next(s), next(source(sampler))
    assert exp.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert exp.greedy.tolist() == [False, False, True] * 3
    assert exp.rows((~exp.greedy).nonzero().flatten()).samples == plain.samples, "the others are drawn as without it"
    for i in (2, 5, 8):
        prompt = ENCODED[int(exp.samples[i].uid)]
        alone = sampler.sample([prompt], 1, [0], replace(sampler.decoding, temperature=0.0)).ids[0]
        assert exp.ids[i][exp.mask[i]].tolist() == alone
    groups = [list(exp.samples[i : i + 3]) for i in (0, 3, 6)]
    assert sorted(begun, key=groups.index) == groups, "rewards may start on whole groups"
