"""NLPO's mask: which tokens may be drawn, what is drawn, and the learner's log-probs on the same sets."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.models import packing
from rlhf_cli.models.heads import PolicyHead, unpacked_bits
from rlhf_cli.models.tiny import tiny_causal, tiny_tokenizer
from rlhf_cli.objectives import ppo_clip
from rlhf_cli.rollout import limits
from rlhf_cli.rollout import sampler as module
from rlhf_cli.rollout.cache import Board
from rlhf_cli.rollout.masking import Mask, Shadow, aligned, best, packed
from rlhf_cli.rollout.sampler import Decoding, Rollout, Sampler
from rlhf_cli.sources.assemble import align, rows
from rlhf_cli.types import Experience, Sample

P = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
PROMPTS = [[256, *b"What is it?"], [256, *b"A longer prompt than the other"]]


def allowed(top_p: float, least: int, p: Tensor = P) -> list[int]:
    return best(p, top_p, least)[0].nonzero().flatten().tolist()


def test_the_token_that_crosses_the_mass_belongs_to_the_set() -> None:
    assert allowed(0.9, 1) == [0, 1, 2]  # 0.5, 0.8, 0.95: the third crosses 0.9
    assert allowed(0.4, 1) == [0] and allowed(0.6, 1) == [0, 1] and allowed(0.97, 1) == [0, 1, 2, 3]
    assert allowed(0.4, 3) == [0, 1, 2] and allowed(1.0, 1) == [0, 1, 2, 3]
    assert allowed(0.9, 1, P.flip(-1)) == [1, 2, 3]


def test_log_probs_are_of_the_allowed_tokens_by_hand() -> None:
    # log(0.3 / 0.95) = -1.152680; without a mask log 0.3 = -1.203973
    logits = P.log().masked_fill(~best(P, 0.9, 1), float("-inf"))
    assert float(logits.log_softmax(-1)[0, 1]) == pytest.approx(-1.152680, abs=1e-6)
    assert math.log(0.3) == pytest.approx(-1.203973, abs=1e-6)


def test_a_large_vocabulary_is_sorted_where_its_best_tokens_do_not_suffice() -> None:
    flat = torch.full((2, 3000), 1 / 3000, dtype=torch.float64)
    flat[1, 7] += 1.0
    found = best(flat / flat.sum(-1, keepdim=True), 0.9, 1)
    assert abs(int(found[0].sum()) - 2701) <= 1 and found[1, 7]  # the 2,701st crosses; rounding may take one more


def test_special_tokens_may_always_be_drawn() -> None:
    mask = Mask(None, top_p=0.4, min_tokens=1, special=[3])
    assert mask.allowed(P.log())[0].tolist() == [True, False, False, True]


def test_a_set_survives_packing() -> None:
    some = torch.rand(3, 259, generator=torch.Generator().manual_seed(0)) < 0.3
    column = aligned([[packed(some)[0], packed(some)[1]], [packed(some)[2]]])
    assert column.shape == (2, 2, 33) and not column[1, 1].any()
    assert torch.equal(unpacked_bits(column[0], 259), some[:2]) and torch.equal(
        unpacked_bits(column[1, :1], 259), some[2:]
    )


# -- the sampler and the learner ---------------------------------------------------------------------------------------


def sampler(mask: Mask | None, **settings: Any) -> Sampler:
    made = Sampler(
        tiny_causal(0, torch.float32), tiny_tokenizer(), Decoding(max_tokens=12, rows=4, **settings), device="cpu"
    )
    made.mask = mask
    return made


def lagged(top_p: float = 0.9, least: int = 5) -> Mask:
    return Mask(tiny_causal(1, torch.float32), top_p=top_p, min_tokens=least, special=[257])


def draw(s: Sampler, decoding: Decoding | None = None) -> Rollout:
    return s.sample(PROMPTS, 3, list(range(6)), decoding)


def as_experience(drawn: Rollout) -> Experience:
    owner = [0, 0, 0, 1, 1, 1]
    exp = rows([PROMPTS[i] for i in owner], drawn.ids, [Sample("p", "r")] * 6, torch.tensor(owner))
    logp = align([x[: len(ids)].tolist() for x, ids in zip(drawn.logp, drawn.ids, strict=True)], exp)
    return replace(exp, behavior_logp=logp, allowed=None if drawn.allowed is None else aligned(drawn.allowed))


def learner(exp: Experience, want: set[str], model: Any = None) -> dict[str, Tensor]:
    packing.register()
    model = tiny_causal(0, torch.float32) if model is None else model
    model.set_attn_implementation(packing.ATTENTION)
    head = PolicyHead(model, temperature=0.7, packing=True)
    return head(exp.ids, exp.attention, exp.mask, exp.group, frozenset(want), exp.allowed)


def test_sampler_and_learner_agree_on_the_masked_distribution() -> None:
    exp = as_experience(draw(sampler(lagged(), temperature=0.7)))
    outs = learner(exp, {"logp", "full_logp", "entropy"})
    assert torch.allclose(outs["logp"][exp.mask], exp.behavior_logp[exp.mask], atol=1e-5), "rho is 1 at first"
    gap = (outs["logp"] - outs["full_logp"])[exp.mask]  # -log pi(S) >= 0
    assert (gap >= -1e-6).all() and gap.max() > 0.01
    plain = learner(replace(exp, allowed=None), {"logp"})
    assert torch.allclose(outs["full_logp"], plain["logp"], atol=1e-6)
    n = int(exp.attention[0].sum())
    logits = tiny_causal(0, torch.float32)(input_ids=exp.ids[:1, :n]).logits[0, exp.mask[0, :n].nonzero()[0] - 1] / 0.7
    banned = ~unpacked_bits(exp.allowed[0, :1], 259)
    p = logits.masked_fill(banned, float("-inf")).softmax(-1)
    assert torch.allclose(outs["entropy"][0, exp.mask[0]][0], torch.special.entr(p).sum(), atol=1e-4)


def test_every_drawn_token_was_allowed_by_the_lagged_model() -> None:
    mask, drawn = lagged(least=1), draw(sampler(lagged(least=1)))
    for i, (ids, sets) in enumerate(zip(drawn.ids, drawn.allowed or [], strict=True)):
        whole = torch.tensor([[*PROMPTS[i // 3], *ids]])
        with torch.no_grad():
            logits = mask.model(input_ids=whole).logits[0, len(PROMPTS[i // 3]) - 1 : -1]
        wanted, found = mask.allowed(logits), unpacked_bits(torch.stack([torch.from_numpy(x) for x in sets]), 259)
        assert found[torch.arange(len(ids)), torch.tensor(ids)].all()
        assert (wanted != found).sum() <= 1, "the set is the lagged model's own, up to a token at its edge"


def test_a_mask_of_everything_draws_what_no_mask_draws() -> None:
    whole, free = draw(sampler(lagged(top_p=1.0))), draw(sampler(None))
    assert whole.ids == free.ids and torch.equal(whole.logp, free.logp) and free.allowed is None
    exp = as_experience(whole)
    a, b = learner(exp, {"logp"}), learner(replace(exp, allowed=None), {"logp"})
    assert torch.allclose(a["logp"], b["logp"], atol=1e-6)


def test_under_a_mask_of_everything_loss_and_gradient_are_those_of_ppo() -> None:
    exp = as_experience(draw(sampler(lagged(top_p=1.0))))
    advantage = torch.randn(exp.mask.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for sets in (exp.allowed, None):
        model = tiny_causal(0, torch.float32)
        logp = learner(replace(exp, allowed=sets), {"logp"}, model)["logp"]
        loss = (
            ppo_clip(logp, exp.behavior_logp - 0.1, advantage, eps_low=0.2, eps_high=0.2, dual_clip=None) * exp.mask
        ).sum()
        loss.backward()
        found.append((float(loss.detach()), model.model.layers[0].mlp.up_proj.weight.grad))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    assert found[1][1].abs().max() > 1e-3 and torch.allclose(found[0][1], found[1][1], atol=1e-5)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    together = draw(sampler(lagged()))
    alone = sampler(lagged()).sample(PROMPTS[1:], 3, [3, 4, 5])
    assert alone.ids == together.ids[3:] and torch.equal(alone.logp[:, :4], together.logp[3:, :4])


def test_the_mask_s_model_never_decodes_with_the_weights_of_the_policy() -> None:
    # whatever the sampler's batch decodes with is of the policy: written-out weights, and a tree of its keys
    board, own = Board(4, 40), object()
    lead: Any = module._Batch(PROMPTS, Decoding(), [], board, None, [-1] * 4, [0] * 4, [0] * 4)
    lead.decoder, lead.tree, lead.shared = own, own, 2
    batch = Shadow(lagged(), sampler(None), lead).batch
    assert (batch.decoder, batch.tree, batch.shared) == (None, None, 0) and batch.slot_row is lead.slot_row


def test_the_best_token_of_all_needs_no_mask() -> None:
    greedy = Decoding(max_tokens=12, rows=4, temperature=0.0)
    assert draw(sampler(lagged()), greedy).ids == draw(sampler(None), greedy).ids


def test_the_cache_of_the_mask_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # memory of nine rows of this model; with the mask's model, of the same size, of four and a half
    asked: list[int] = []
    monkeypatch.setattr(
        limits, "_memory", lambda device: 5 * 9 * limits.bytes_per_row(tiny_causal(0, torch.float32), 40)
    )
    monkeypatch.setattr(module, "Board", lambda slots, longest: asked.append(slots) or Board(slots, longest))
    mask = Mask(tiny_causal(1, torch.float32), top_p=0.9, min_tokens=1, special=[])
    for one, temperature in ((None, 1.0), (mask, 1.0), (mask, 0.0)):
        s = sampler(one)
        s.sample(
            [[256, *b"What is it?", *b" Say it now, for once"][:28]],
            1,
            [0],
            replace(s.decoding, rows=0, temperature=temperature),
        )
    assert asked == [8, 4, 8]


def test_no_gradient_reaches_what_was_not_allowed() -> None:
    exp = as_experience(draw(sampler(lagged(least=1))))
    model = tiny_causal(0, torch.float32)
    found = learner(exp, {"logp"}, model)["logp"]
    model.lm_head.weight.grad = None
    row = copy.copy(exp.rows(torch.tensor([0])))
    first = row.mask[0].nonzero()[0]
    found[0, first].sum().backward()
    banned = ~unpacked_bits(exp.allowed[0, :1], 259)[0]
    grad = model.lm_head.weight.grad
    assert (grad[banned] == 0).all() and (grad[~banned] != 0).any() and banned.any()
