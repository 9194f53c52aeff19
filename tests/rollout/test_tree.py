"""Attention over a shared prompt and a row's own tokens, against attention over whole rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rlhf_cli.rollout import sampler as module
from rlhf_cli.rollout.tree import Tree
from tests.rollout.test_sampler import PROMPTS, llama, sampler, seeds


def test_two_parts_make_attention_over_the_whole() -> None:
    g = torch.Generator().manual_seed(0)
    lengths, each, heads, queries, width, slots = [3, 40, 0], 2, 2, 3, 8, 8

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    prompts = [[(draw(heads, n, width), draw(heads, n, width))] for n in lengths]
    tree, own = Tree([*prompts[:2], None], slots, each, 5), []
    for step in range(5):
        q, k, v = draw(slots, heads, queries, width), draw(slots, heads, width), draw(slots, heads, width)
        own.append((k, v))
        tree.aim(step)
        out = tree.attend(0, q, k, v, 0.3)
        assert out.shape == q.shape and bool(out.isfinite().all())
        for row in range(6):  # the last two slots are idle
            both = [
                torch.cat([prompts[row // each][0][i], torch.stack([x[i][row] for x in own], 1)], 1) for i in (0, 1)
            ]
            torch.testing.assert_close(
                out[row], F.scaled_dot_product_attention(q[row], *both, scale=0.3), rtol=0, atol=1e-12
            )


@pytest.mark.parametrize("early", [False, True])
def test_a_step_that_fits_shares_prompts_and_draws_the_same(monkeypatch: pytest.MonkeyPatch, early: bool) -> None:
    made = []
    monkeypatch.setattr(module, "Tree", lambda *args: made.append(args[1:]) or Tree(*args))
    apart, shared = sampler(llama()), sampler(llama())
    if early:  # some rows end before others
        apart.eos = shared.eos = list(range(0, 50, 5))
    one = apart.sample(PROMPTS, 2, seeds(8), replace(apart.decoding, rows=8))
    assert not made and apart.written_out
    decoding = replace(shared.decoding, rows=8, wave=8)
    other = shared.sample(PROMPTS, 2, seeds(8), decoding)
    again = shared.sample(PROMPTS, 2, seeds(8), decoding)  # without the model's own first step
    half = shared.sample(PROMPTS[2:], 2, seeds(8)[4:], decoding)  # as one of two processes
    assert shared.written_out and made == [(8, 2, decoding.max_tokens)] * 3
    assert one.ids == other.ids == again.ids and torch.equal(other.logp, again.logp)
    assert half.ids == other.ids[4:] and torch.equal(half.logp, other.logp[4:, : half.logp.shape[1]])
    torch.testing.assert_close(one.logp, other.logp, rtol=0, atol=1e-5)
    assert not early or len({len(x) for x in one.ids}) > 1


def test_more_rows_than_slots_and_single_responses_do_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Tree", None)
    s = sampler(llama())
    s.sample(
        PROMPTS, 2, seeds(8), replace(s.decoding, rows=8, wave=8, longest=module.SHORT)
    )  # nor a step of short prompts
    for k, rows, wave in ((2, 4, 8), (1, 8, 4), (2, 8, 0), (2, 8, 16)):
        s.sample(PROMPTS, k, seeds(4 * k), replace(s.decoding, rows=rows, wave=wave))
