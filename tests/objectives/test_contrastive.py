"""Pairwise PPO, trust region preference approximation and contrastive policy gradient: gradients, limits, fixed points."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_cli.credit import leave_one_out
from rlhf_cli.inject import call
from rlhf_cli.objectives import (
    copg,
    copg_labels,
    dpo,
    ipo,
    kl_old,
    p3o,
    p3o_joint,
    ppo_clip,
    ppo_clip_whitened,
    sequence_ratio_clip,
    trpa,
)
from rlhf_cli.select import group_pairs
from rlhf_cli.shaping import sequence_kl
from rlhf_cli.types import Experience

PI = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
REWARD = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
OPEN = {"level": "seq_sum", "eps_low": 1.0, "eps_high": 1e6}  # nothing is clipped
every_form = pytest.mark.parametrize("fn", [partial(p3o, **OPEN), partial(p3o_joint, level="seq_sum", eps=1e6)])


def columns(seed: int = 0, rows: int = 4, tokens: int = 5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = {k: -torch.rand(rows, tokens, generator=g, dtype=torch.float64) for k in ("logp", "old_logp", "ref_logp")}
    mask = torch.arange(tokens) < torch.tensor([5, 2, 3, 4])[:rows, None]
    return made | {"mask": mask, "group": torch.arange(rows) // 2, "score": torch.tensor([0.5, 2.0, -1.0, 0.25])[:rows]}


# -- P3O ---------------------------------------------------------------------------------------------------------------


def expected_gradient(fn: partial[Tensor], behaviour: Tensor, reward: Tensor) -> Tensor:
    """Minus the gradient to the logits of a three-armed policy, over all pairs that the behaviour draws, by probability."""
    z = PI.log().requires_grad_()
    action = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # [9, 2]
    flat = action.flatten()
    pairs = torch.arange(18).view(9, 2)
    weight = behaviour[action].prod(-1)
    mask = torch.ones(18, 1, dtype=torch.bool)
    loss = fn(z.log_softmax(-1)[flat, None], behaviour.log()[flat, None], reward[flat], mask, pairs)
    (grad,) = torch.autograd.grad((weight * loss).sum(), z)
    return -grad


@every_form
@pytest.mark.parametrize("behaviour", [PI, torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)], ids=["on", "off"])
def test_p3o_is_the_policy_gradient_from_any_behaviour(fn: partial[Tensor], behaviour: Tensor) -> None:
    # J = sum pi r = 0.8, and dJ/dz_a = pi_a (r_a - J): 0.2 x 0.2, 0.5 x -0.8, 0.3 x 1.2
    expected = torch.tensor([0.04, -0.40, 0.36], dtype=torch.float64)
    assert torch.allclose(expected_gradient(fn, behaviour, REWARD), expected, atol=1e-12)


def test_the_product_of_both_probabilities_would_teach_nothing() -> None:
    # (r1 - r2) grad log(pi1 pi2), as some print it: antisymmetric times symmetric
    z = PI.log().requires_grad_()
    logp = z.log_softmax(-1)
    both = PI[:, None] * PI * (REWARD[:, None] - REWARD) * (logp[:, None] + logp)
    (grad,) = torch.autograd.grad(both.sum(), z)
    assert torch.allclose(grad, torch.zeros(3, dtype=torch.float64), atol=1e-15)


@every_form
def test_a_constant_per_prompt_changes_nothing(fn: partial[Tensor]) -> None:
    shifted = expected_gradient(fn, PI, REWARD + 4)  # these numbers are exact in binary
    assert torch.equal(shifted, expected_gradient(fn, PI, REWARD))


def test_p3o_with_two_rows_a_group_is_rloo_with_one_ratio_per_response() -> None:
    c = columns()
    exp = Experience(behavior_logp=c["old_logp"], **{k: v for k, v in c.items() if k != "logp"})
    shaped = call(partial(sequence_kl, beta=0.3), exp)
    advantage = leave_one_out(shaped, c["mask"], c["group"]).advantage
    clip = {"eps_low": 0.2, "eps_high": 0.2, "level": "seq_sum"}
    pairs = group_pairs(c["score"], c["group"]).pairs
    assert pairs is not None and pairs.tolist() == [[1, 0], [3, 2]]
    outs = [c["logp"].clone().requires_grad_() for _ in range(2)]
    one = p3o(outs[0], c["old_logp"], shaped, c["mask"], pairs, **clip).mean()
    other = sequence_ratio_clip(outs[1], c["old_logp"], advantage, c["mask"], **clip).mean()
    grads = [torch.autograd.grad(loss, x)[0] for loss, x in zip((one, other), outs, strict=True)]
    assert torch.allclose(one, other, atol=1e-12) and torch.allclose(*grads, atol=1e-12)
    assert (grads[0] == 0).all(-1).any() and (grads[0] != 0).any(), "some rows are clipped, others are not"


def test_p3o_joint_clips_the_log_ratio_of_the_pair() -> None:
    # old: l_old = 0. D = 1. Row 1 moved by +0.3, row 2 by -0.2: l = 0.5 is cut to 0.2; w = exp(0.3 - 0.2).
    # loss = -(w / 2) min(0.5, 0.2), no gradient; with D = -1 the unclipped one is the smaller gain: (w / 2) 0.5, d/dl = w / 2.
    old, mask, pairs = torch.full((2, 1), -1.0), torch.ones(2, 1, dtype=torch.bool), torch.tensor([[0, 1]])
    w = torch.tensor(0.1).exp()
    for sign, value, slope in ((1.0, -0.2 * w / 2, 0.0), (-1.0, 0.5 * w / 2, w / 2)):
        logp = torch.tensor([[-0.7], [-1.2]], requires_grad=True)
        loss = p3o_joint(logp, old, torch.tensor([sign, 0.0]), mask, pairs, level="seq_sum", eps=0.2)
        (grad,) = torch.autograd.grad(loss.sum(), logp)
        assert torch.allclose(loss, torch.as_tensor(value)[None]) and torch.allclose(
            grad.flatten(), torch.tensor([slope, -slope])
        )


def test_ratios_per_token_leave_the_clip_range_later() -> None:
    c = columns(rows=2)
    c["logp"] = c["old_logp"] + 0.1  # 5 tokens: e^0.5 = 1.65 is cut, e^0.1 = 1.105 is not
    args = (c["old_logp"], torch.tensor([1.0, 0.0]), c["mask"], torch.tensor([[0, 1]]))
    found = {
        level: float(p3o(c["logp"], *args, level=level, eps_low=0.2, eps_high=0.2))  # type: ignore[arg-type]
        for level in ("seq_sum", "seq_mean")
    }
    # winner: min(r, clip(r)); loser: -max(r, clip(r)): -(1.2 - e^0.2) / 2 and -(e^0.1 - e^0.1) / 2
    assert found == {"seq_sum": pytest.approx((math.exp(0.2) - 1.2) / 2), "seq_mean": pytest.approx(0.0)}


# -- TRPA --------------------------------------------------------------------------------------------------------------

TRPA = {"beta": 0.1, "boost": 2.5, "level": "seq_mean", "per_response": False}


def graded(u: list[float], levels: list[int], tokens: int = 4) -> dict[str, Tensor]:
    """Rows of one group whose mean log-ratio is u."""
    ref = torch.full((len(u), tokens), -1.0, dtype=torch.float64)
    return {
        "logp": ref + torch.tensor(u, dtype=torch.float64)[:, None], "ref_logp": ref, "score": -torch.tensor(levels).double(),
        "best": (torch.tensor(levels) == 1).double(), "mask": torch.ones(len(u), tokens, dtype=torch.bool),
        "group": torch.zeros(len(u), dtype=torch.int64),
    }  # fmt: skip


def test_trpa_by_hand() -> None:
    # h = 2.5 x 0.1 x (0.2 - 0), 2.5 x 0.1 x (0.2 + 0.1), 0.1 x (0 + 0.1) = 0.05, 0.075, 0.01
    wanted = -logsigmoid(torch.tensor([0.05, 0.075, 0.01], dtype=torch.float64)).mean()
    found = trpa(**graded([0.2, 0.0, -0.1], [1, 2, 4]), **TRPA).mean()
    assert float(found) == pytest.approx(0.670990, abs=1e-6) and torch.allclose(found, wanted)


def test_trpa_takes_the_best_level_from_the_rules_and_not_from_the_size_of_a_score() -> None:
    # half the weight, and another reward's 3 on top: the order of scores is the same, and so is everything
    c = graded([0.2, 0.0, -0.1], [1, 2, 4])
    other = trpa(**c | {"score": 0.5 * c["score"] + 3}, **TRPA)
    assert torch.equal(other, trpa(**c, **TRPA))
    # levels 2 and 4 alone: no row is boosted though -1 is the weighted score of level 2
    c = graded([0.2, -0.1], [2, 4])
    found = trpa(**c | {"score": 0.5 * c["score"]}, **TRPA).mean()
    assert torch.allclose(found, -logsigmoid(torch.tensor(0.03, dtype=torch.float64)))


def test_trpa_counts_pairs_not_groups() -> None:
    both = graded([0.2, 0.0, -0.1, 0.3, 0.1], [1, 2, 4, 1, 2])
    both["group"] = torch.tensor([0, 0, 0, 1, 1])
    h = torch.tensor([0.05, 0.075, 0.01, 0.05], dtype=torch.float64)
    assert torch.allclose(trpa(**both, **TRPA).mean(), -logsigmoid(h).mean())


def test_trpa_at_the_reference_is_ln_2_and_its_trust_region_is_flat() -> None:
    c = graded([0.0, 0.0], [1, 2])
    assert float(trpa(**c, **TRPA).mean()) == pytest.approx(0.693147, abs=1e-6)
    logp = c["logp"].clone().requires_grad_()
    kl = kl_old(logp, c["logp"])
    assert (kl == 0).all() and (torch.autograd.grad(kl.sum(), logp)[0] == 0).all()
    # d = lp - lo = 0.5: e^-0.5 - 1 + 0.5
    assert float(kl_old(torch.tensor([[-0.5]]), torch.tensor([[-1.0]]))) == pytest.approx(0.106531, abs=1e-6)


def test_trpa_of_two_levels_with_sums_and_no_boost_is_dpo() -> None:
    c = graded([0.3, -0.2], [1, 2])
    one = trpa(**c, **TRPA | {"boost": 1.0, "level": "seq_sum"}).mean()
    other = dpo(c["logp"], c["ref_logp"], c["mask"], torch.tensor([[0, 1]]), beta=0.1, label_smoothing=0.0)
    assert torch.allclose(one, other.squeeze())


def test_trpa_raises_the_best_and_lowers_the_worst() -> None:
    c = graded([0.2, 0.0, -0.1], [1, 2, 4])
    c["logp"].requires_grad_()
    (grad,) = torch.autograd.grad(trpa(**c, **TRPA).mean(), c["logp"])
    assert (grad[0] < 0).all() and (grad[2] > 0).all()


def test_trpa_without_a_pair_takes_rows_by_their_own_level() -> None:
    # no beta: -log sigmoid(0.2) and -log sigmoid(-0.2)
    for level, sign in ((1, 1.0), (3, -1.0)):
        found = trpa(**graded([0.2, 0.2], [level, level]), **TRPA).mean()
        assert torch.allclose(found, -logsigmoid(torch.tensor(sign * 0.2, dtype=torch.float64)))


def test_the_papers_form_scales_each_response() -> None:
    # sums of four tokens: u = 0.8, 0; h = 0.25 x 0.8 - 0.1 x 0; and with u_l = 0.4: 0.25 x 0.8 - 0.1 x 0.4
    for loser, h in ((0.0, 0.2), (0.1, 0.16)):
        found = trpa(**graded([0.2, loser], [1, 2]), **TRPA | {"level": "seq_sum", "per_response": True}).mean()
        assert torch.allclose(found, -logsigmoid(torch.tensor(h, dtype=torch.float64)))


# -- CoPG --------------------------------------------------------------------------------------------------------------

OPTIMUM = torch.tensor([0.090031, 0.244728, 0.665241], dtype=torch.float64)  # softmax(0, 1, 2)


@pytest.mark.parametrize("data", [[1 / 3, 1 / 3, 1 / 3], [0.7, 0.2, 0.1], [0.05, 0.05, 0.9]])
def test_copg_reaches_the_optimum_from_any_data(data: list[float]) -> None:
    action = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    weight = torch.tensor(data, dtype=torch.float64)[action].prod(-1).repeat_interleave(2)  # of each row
    reward = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    ref = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    fixed = {"mask": torch.ones(18, 1, dtype=torch.bool), "group": torch.arange(9).repeat_interleave(2)}
    z = torch.tensor([0.3, 1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [z], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        flat = action.flatten()
        rows = copg(z.log_softmax(-1)[flat, None], ref[flat, None], reward[flat], beta=0.5, per_beta=False, **fixed)
        return (weight * rows).sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    assert torch.allclose(z.softmax(-1), OPTIMUM, atol=1e-6) and loss() < 1e-15


def test_the_gradient_of_copg_is_rloo_on_the_regularised_score() -> None:
    c = columns()
    c["group"] = torch.zeros(4, dtype=torch.int64)
    beta, logp = 0.3, c["logp"].clone().requires_grad_()
    given = (c["ref_logp"], c["score"], c["mask"], c["group"])
    (grad,) = torch.autograd.grad(copg(logp, *given, beta=beta, per_beta=False).mean(), logp)
    s = c["score"] - beta * torch.where(c["mask"], c["logp"] - c["ref_logp"], 0.0).sum(-1)
    advantage = leave_one_out(s, c["mask"], c["group"]).advantage  # S_i - mean of the others
    assert torch.allclose(grad, -2 * beta * advantage, atol=1e-12)
    (scaled,) = torch.autograd.grad(copg(logp, *given, beta=beta, per_beta=True).mean(), logp)
    assert torch.allclose(scaled, -advantage, atol=1e-12)


def test_copg_of_a_preference_is_ipo() -> None:
    c = columns(rows=2)
    c["score"] = torch.tensor([0.5, 0.0], dtype=torch.float64)
    one = copg(c["logp"], c["ref_logp"], c["score"], c["mask"], c["group"] * 0, beta=0.2, per_beta=False).mean()
    other = ipo(c["logp"], c["ref_logp"], c["mask"], torch.tensor([[0, 1]]), tau=0.2, level="seq_sum")
    assert torch.allclose(one, 0.2**2 * other.squeeze())


def test_copg_sees_no_constant_per_prompt_and_no_difference_between_equals() -> None:
    c = columns()
    given = {"beta": 0.2, "per_beta": False}
    one = copg(c["logp"], c["ref_logp"], c["score"], c["mask"], c["group"], **given)
    shift = torch.tensor([4.0, 4.0, -2.0, -2.0])
    assert torch.allclose(copg(c["logp"], c["ref_logp"], c["score"] + shift, c["mask"], c["group"], **given), one)
    assert torch.equal(copg_labels(c["logp"], c["ref_logp"], c["score"], c["mask"], c["group"], **given), one)
    twice = {k: v[[0, 0]] for k, v in c.items()}
    assert (copg(twice["logp"], twice["ref_logp"], twice["score"], twice["mask"], twice["group"], **given) == 0).all()


def test_copg_is_a_mean_over_prompts_whatever_their_size() -> None:
    # u = 0: a group of two with scores 1, 0: 1; one of three with 0, 1, 3: (1 + 9 + 4) / 2 = 7; one of one: 0
    mask = torch.ones(6, 1, dtype=torch.bool)
    zero = torch.zeros(6, 1)
    rows = copg(
        zero, zero, torch.tensor([1.0, 0, 0, 1, 3, 5]), mask, torch.tensor([0, 0, 1, 1, 1, 2]), beta=0.1, per_beta=False
    )
    assert float(rows.mean()) == pytest.approx((1 + 7 + 0) / 3)


# -- NLPO's surrogate --------------------------------------------------------------------------------------------------


def test_advantages_are_whitened_per_minibatch() -> None:
    # tokens 1, 2, 3, 6 of a mini-batch: mean 3, sample variance (4 + 1 + 0 + 9) / 3
    advantage = torch.tensor([[1.0, 2.0, 50.0], [3.0, 6.0, 50.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]] * 2)
    logp = torch.zeros(2, 3, dtype=torch.float64)
    scaled = (advantage - 3) / (14 / 3 + 1e-8) ** 0.5
    found = ppo_clip_whitened(logp, logp, advantage, mask, eps_low=0.2, eps_high=0.2)
    wanted = ppo_clip(logp, logp, scaled, eps_low=0.2, eps_high=0.2, dual_clip=None)
    assert torch.allclose(found[mask], wanted[mask])
