"""RTO: token rewards of a DPO model, with the KL penalty and the clipped score, through the shaping stage and GAE."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from rlhf_cli.compose import compose
from rlhf_cli.credit import gae
from rlhf_cli.inject import call
from rlhf_cli.shaping import AdaptiveFullKL, AdaptiveKL, clip, implicit_dpo, token_kl, token_kl_full
from rlhf_cli.stages import shaping
from rlhf_cli.state import Builder
from rlhf_cli.types import Experience

RTO = (
    partial(clip, low=-10.0, high=10.0),
    partial(token_kl, beta=0.01, kind="k1"),
    partial(implicit_dpo, beta=0.05, limit=0.05),
)


def rows(dpo: list[float], kl: list[float], score: float) -> Experience:
    ref = torch.full((1, 3), -1.0)
    exp = Experience(
        ids=torch.zeros(1, 3, dtype=torch.int64), mask=torch.ones(1, 3, dtype=torch.bool), score=torch.tensor([score]),
        ref_logp=ref, behavior_logp=ref + torch.tensor([kl]), value=torch.zeros(1, 3),
    )  # fmt: skip
    return exp.filled({"dpo_logp": ref + torch.tensor([dpo])})


def close(x: Tensor, wanted: list[float]) -> bool:
    return torch.allclose(x, torch.tensor([wanted]), atol=1e-6)


def test_rto_by_hand() -> None:
    # 0.05 x (0.4, 2, -3) = (0.02, 0.1, -0.15), cut at 0.05: (0.02, 0.05, -0.05); minus 0.01 x (0.1, 0.2, 0); plus R at the end
    exp = shaping(RTO)(rows([0.4, 2.0, -3.0], [0.1, 0.2, 0.0], 0.7))
    assert close(exp.reward, [0.019, 0.048, 0.65])
    # A_3 = 0.65, A_2 = 0.048 + 0.95 A_3, A_1 = 0.019 + 0.95 A_2
    credit = call(partial(gae, gamma=1.0, lam=0.95, whiten=False), exp)
    assert close(credit.advantage, [0.651225, 0.6655, 0.65])


def test_without_dpo_rewards_it_is_ppo() -> None:
    off = (*RTO[:2], partial(implicit_dpo, beta=0.0, limit=0.05))
    one, other = (shaping(s)(rows([0.4, 2.0, -3.0], [0.1, 0.2, 0.0], 0.7)) for s in (off, RTO[:2]))
    assert torch.equal(one.reward, other.reward)


def test_where_all_models_agree_only_the_score_is_left() -> None:
    assert close(shaping(RTO)(rows([0.0] * 3, [0.0] * 3, 0.7)).reward, [0.0, 0.0, 0.7])


def test_not_limited_a_response_gets_its_whole_log_ratio() -> None:
    exp = rows([0.4, 2.0, -3.0], [0.0] * 3, 0.0)
    found = call(partial(implicit_dpo, beta=0.05, limit=0.0), exp)
    assert float(found.sum()) == pytest.approx(0.05 * (0.4 + 2.0 - 3.0), abs=1e-6)


def test_the_score_is_clipped() -> None:
    assert float(shaping(RTO)(rows([0.0] * 3, [0.0] * 3, 25.0)).score) == 10.0


def test_the_kl_of_a_masked_policy_is_that_of_the_whole_one() -> None:
    exp = rows([0.0] * 3, [0.5, 0.5, 0.5], 0.0).filled({"full_logp": torch.tensor([[-0.9, -0.8, -1.0]])})
    assert close(call(partial(token_kl_full, beta=0.1, kind="k1"), exp), [-0.01, -0.02, 0.0])
    settings = {
        "beta": 0.1,
        "kind": "k1",
        "target": 0.05,
        "per": "token",
        "bound": 0.2,
        "count": "steps",
        "horizon": 10,
    }
    full, plain = AdaptiveFullKL(**settings), AdaptiveKL(**settings)  # type: ignore[arg-type]
    assert close(call(full.__call__, exp), [-0.01, -0.02, 0.0])
    # KL is 0.1 a token, twice the target: 1 + 0.2 / 10
    assert full.state_dict() == {"beta": pytest.approx(0.102)} and full.stats["kl"] == pytest.approx(0.1, abs=1e-6)
    assert close(call(plain.__call__, exp), [-0.05, -0.05, -0.05])


def test_a_reward_model_s_scale_can_be_taken_off_before_the_clip() -> None:
    # scores 30 and 50: mean 40, std 10, so -1 and 1; not normalised both would be cut to 10
    two = rows([0.0] * 3, [0.0] * 3, 0.0).rows(torch.tensor([0, 0]))
    words = ["experiment=rto", "shaping=[meanstd,clip,kl_weak,implicit_dpo]"]
    shapers = [Builder([])(node, name) for name, node in compose("train", words, None).shaping.items()]
    assert shaping(shapers)(replace(two, score=torch.tensor([30.0, 50.0]))).score.tolist() == pytest.approx([-1.0, 1.0])
    assert shaping(RTO)(replace(two, score=torch.tensor([30.0, 50.0]))).score.tolist() == [10.0, 10.0]
