"""An independent oracle: TRL's losses and their gradients on random tensors equal ours. Skipped, loudly, without TRL."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.combine import normalise_then_sum
from rlhf_cli.engine.step import term_losses, weights_of
from rlhf_cli.objectives import (
    cispo,
    gspo_token,
    kl_k3,
    kl_k3_corrected,
    ppo_clip,
    reinforce,
    sequence_ratio_clip,
    two_sided_clip,
)
from rlhf_cli.reduce import constant_length, sequence_mean, sequence_sum, token_mean
from rlhf_cli.shaping import overlong
from rlhf_cli.types import Experience, Term

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="TRL IS NOT INSTALLED: type pip install -e '.[dev]'"
)
LONGEST = 9  # TRL's max_completion_length
CLIP: dict[str, Any] = {"eps_low": 0.2, "eps_high": 0.28}
clip = partial(ppo_clip, **CLIP, dual_clip=None)


def columns() -> Experience:
    """Ragged rows off the sampling policy by about 0.3 nats a token, one advantage per row, no row without tokens."""
    random = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 5, 6, 7])[:, None]

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(6, 7, generator=random, dtype=torch.float64)

    old = -1.5 + noise(0.5)
    advantage = torch.randn(6, 1, generator=random, dtype=torch.float64).expand(6, 7)
    return Experience(
        ids=torch.zeros(6, 7, dtype=torch.int64), mask=mask, old_logp=old, ref_logp=old + noise(0.4),
        advantage=advantage, behavior_logp=old + noise(0.3),
    )  # fmt: skip


EXP = columns()


def ours(terms: list[Term]) -> tuple[Tensor, Tensor]:
    """Loss and its gradient to the log-probs; the policy stands where `behavior_logp` says."""
    logp = EXP.behavior_logp.clone().requires_grad_()
    loss = torch.stack(
        list(term_losses(terms, EXP, {"logp": logp}, [weights_of(t, EXP) for t in terms]).values())
    ).sum()
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def theirs(trainer: type, **settings: Any) -> tuple[Tensor, Tensor]:
    """TRL's own loss function on the same tensors, in evaluation mode, where it divides by no accumulation."""
    logp = EXP.behavior_logp.clone().requires_grad_()
    same: Callable[..., Any] = lambda x, **_: x  # noqa: E731
    args = {
        "use_bias_correction_kl": settings.pop("use_bias_correction_kl", False),
        "delta": settings.pop("delta", None),
        "steps_per_generation": 1,
    }
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, tools=None,
        vllm_importance_sampling_correction=False, _entropy_bonus_enabled=False, epsilon_low=CLIP["eps_low"],
        epsilon_high=settings.pop("epsilon_high", CLIP["eps_high"]), max_completion_length=LONGEST, args=SimpleNamespace(**args),
        model=SimpleNamespace(training=False), current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(num_processes=1, reduce=same, gather=same, gather_for_metrics=same),
        _metrics=defaultdict(lambda: defaultdict(list)),
        **({"importance_sampling_level": "token", "beta": 0.0, "loss_type": "grpo"} | settings),
    )  # fmt: skip
    prompt = torch.zeros(6, 2, dtype=torch.int64)
    inputs = {
        "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": EXP.ids, "completion_mask": EXP.mask.long(),
        "advantages": EXP.advantage[:, 0], "old_per_token_logps": EXP.old_logp, "ref_per_token_logps": EXP.ref_logp,
        "old_logps": (EXP.old_logp * EXP.mask).sum(-1), "num_items_in_batch": EXP.mask.sum(),
    }  # fmt: skip
    loss = trainer._compute_loss(stub, stub.model, inputs)  # type: ignore[attr-defined]
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def row_ratio(level: Any) -> Callable[..., Tensor]:
    return partial(sequence_ratio_clip, level=level, **CLIP)


CASES: dict[str, tuple[list[Term], dict[str, Any]]] = {
    "grpo": (
        [Term("s", clip, sequence_mean), Term("kl", kl_k3, sequence_mean, 0.04)],
        {"loss_type": "grpo", "beta": 0.04},
    ),
    "dr_grpo": ([Term("s", clip, partial(constant_length, length=LONGEST))], {"loss_type": "dr_grpo"}),
    "dapo": ([Term("s", clip, token_mean)], {"loss_type": "dapo"}),
    "bnpo": ([Term("s", clip, token_mean), Term("kl", kl_k3, token_mean, 0.1)], {"loss_type": "bnpo", "beta": 0.1}),
    "corrected_kl": (
        [Term("s", clip, token_mean), Term("kl", kl_k3_corrected, token_mean, 0.1)],
        {"loss_type": "bnpo", "beta": 0.1, "use_bias_correction_kl": True},
    ),
    "gspo": ([Term("s", row_ratio("seq_mean"))], {"importance_sampling_level": "sequence"}),
    "gspo_token": ([Term("s", partial(gspo_token, **CLIP), sequence_mean)], {"importance_sampling_level": "sequence"}),
    "cispo": (
        [Term("s", partial(cispo, cap=1.1, floor=None), token_mean)],
        {"loss_type": "cispo", "epsilon_high": 1.1},
    ),
    "two_sided_clip": (
        [Term("s", partial(two_sided_clip, **CLIP, delta=1.4), token_mean)],
        {"loss_type": "bnpo", "delta": 1.4},
    ),
}


@pytest.mark.parametrize(("terms", "settings"), CASES.values(), ids=CASES.keys())
def test_trl_s_grpo_trainer(terms: list[Term], settings: dict[str, Any]) -> None:
    from trl import GRPOTrainer

    compare(ours(terms), theirs(GRPOTrainer, **settings))


def test_trl_s_rloo_trainer() -> None:
    from trl import RLOOTrainer

    compare(ours([Term("s", row_ratio("seq_sum"))]), theirs(RLOOTrainer))


def test_trl_s_overlong_penalty() -> None:
    from trl.rewards import get_soft_overlong_punishment

    length = torch.tensor([0, 10, 80, 81, 90, 99, 100])
    wanted = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)([[1] * n for n in length])
    mine = overlong(torch.zeros(7), torch.arange(100) < length[:, None], max_tokens=100, buffer=0.2, factor=1.0)
    assert mine.tolist() == pytest.approx(wanted, abs=1e-6) and wanted[4] == -0.5


def test_trl_s_normalised_sum_of_rewards() -> None:
    """The branch of TRL's trainer that combines rewards has no function of its own, so its lines are run alone."""
    from trl.trainer import grpo_trainer

    tree = ast.parse(textwrap.dedent(inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions)))
    branches = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "'normalize_then_sum'" in ast.unparse(n.test)]
    g = torch.Generator().manual_seed(0)
    sources, weights = (
        torch.randn(12, 3, generator=g, dtype=torch.float64),
        torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64),
    )
    sources[4:8, 1] = 0.25  # constant in a group
    names: dict[str, Any] = {
        "torch": torch, "nanstd": grpo_trainer.nanstd, "rewards_per_func": sources, "num_generations": 4, "device": "cpu",
        "unscorable_mask": torch.zeros(12, dtype=torch.bool), "self": SimpleNamespace(reward_funcs=[0] * 3, reward_weights=weights),
    }  # fmt: skip
    exec(compile(ast.Module(branches[-1].body, []), "trl", "exec"), names)
    mine = partial(normalise_then_sum, sources, weights, torch.arange(12) // 4, ddof=1, eps=1e-4)
    assert torch.allclose(mine(whiten=False), names["rewards"], atol=1e-12)
    # over the batch TRL adds 1e-4 to a deviation of about 1.6
    assert torch.allclose(mine(whiten=True), names["advantages"], rtol=2e-4) and mine(whiten=True).abs().max() > 1


def test_the_oracle_tells_losses_apart() -> None:
    from trl import GRPOTrainer

    other = ours([Term("s", reinforce, sequence_sum)])
    with pytest.raises(AssertionError):
        compare(other, theirs(GRPOTrainer))


def compare(mine: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    assert torch.allclose(mine[0], other[0], rtol=1e-6), (mine[0], other[0])
    assert torch.allclose(mine[1], other[1] * EXP.mask, atol=1e-7) and mine[1].abs().max() > 1e-3
