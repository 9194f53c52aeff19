"""Every gate: silent on a good step, tripped by the smallest broken one, with its text."""

from typing import Any

import pytest
import torch

from rlhf_cli import gates
from rlhf_cli.config import GatesSection
from rlhf_cli.diagnostics import DIAGNOSTICS
from rlhf_cli.engine.deepspeed import diagnose
from rlhf_cli.errors import GateError
from rlhf_cli.types import Experience

EOS = 9


def experience(**changes: Any) -> Experience:
    """Row 0 finished with EOS; row 1 was cut at the limit; row 2 finished, and padding follows."""
    columns: dict[str, Any] = {
        "ids": torch.tensor([[1, 2, 3, EOS], [1, 2, 4, 5], [1, 6, EOS, 0]]),
        "mask": torch.tensor([[False, False, True, True], [False, True, True, True], [False, True, True, False]]),
        "truncated": torch.tensor([False, True, False]),
        "score": torch.tensor([0.0, 1.0, 0.5]),
    }
    return Experience(**(columns | changes))


def stats(**first: float) -> dict[str, list[dict[str, float]]]:
    return {"policy": [first, {"ratio_gap": 9.0, "kl": 9.0}]}  # later updates of a step may differ


def test_first_ratio() -> None:
    gates.first_ratio(0, stats(ratio_gap=1e-5), 1e-4)
    gates.first_ratio(0, {}, 1e-4)
    with pytest.raises(GateError) as e:
        gates.first_ratio(0, stats(ratio_gap=0.5), 1e-4)
    assert str(e.value) == (
        "step 0: the importance ratios of the first update are off 1 by 0.5 on average (allowed 0.0001); "
        "the old log-probs are not this policy's. Set model.packing=false, or turn dropout off"
    )


@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_the_gap_of_ratios_sees_both_sides_of_one(shift: float) -> None:
    mask = torch.tensor([[False, True, True]])
    old = torch.full((1, 3), -2.0) * mask
    gap = float(DIAGNOSTICS["ratio_gap"](old + shift * mask, old, mask))
    assert gap == pytest.approx(abs(torch.e**shift - 1))


def test_first_kl() -> None:
    gates.first_kl(0, stats(kl=1e-5), 2e-4)
    gates.first_kl(0, {}, 2e-4)
    with pytest.raises(GateError) as e:
        gates.first_kl(0, stats(kl=0.3), 2e-4)
    assert str(e.value) == (
        "step 0: KL to the reference is 0.3 nats a token before any update (allowed 0.0002); "
        "the reference is not the initial policy. Check model.reference, or set gates.enabled=false if another one is meant"
    )


def test_sampler_gap() -> None:
    gates.sampler_gap(3, stats(sampler_gap=1e-4), 1e-3)
    gates.sampler_gap(3, {}, 1e-3)
    with pytest.raises(GateError) as e:
        gates.sampler_gap(3, stats(sampler_gap=0.02, sampler_gap_max=0.3), 1e-3)
    assert str(e.value) == (
        "step 3: sampler and learner differ by 0.02 nats a token on average, at most 0.3 (gates.logp_gap=0.001); "
        "the policy that samples is not the one that learns. Set hardware.precision=fp32 to compare, or raise gates.logp_gap"
    )


@pytest.mark.parametrize("name", ["first_ratio", "first_kl", "sampler_gap"])
def test_a_number_that_is_none_does_not_pass(name: str) -> None:
    nan = float("nan")
    with pytest.raises(GateError, match="nan"):
        getattr(gates, name)(0, stats(ratio_gap=nan, kl=nan, sampler_gap=nan), 1e-3)


def test_constant_reward_counts_steps_in_a_row() -> None:
    gate = gates.ConstantReward(3)
    flat, varied = torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.6])
    for score in (flat, flat, varied, flat, flat):
        gate(score)
    with pytest.raises(GateError) as e:
        gate(flat)
    assert str(e.value) == (
        "every reward was 0.5 for 3 steps (gates.constant_steps=3); try the reward on a file first: rlhf score"
    )


def test_constant_reward_goes_on_counting_after_a_resume() -> None:
    gate, other = gates.ConstantReward(2), gates.ConstantReward(2)
    gate(torch.ones(2))
    other.load_state_dict(gate.state_dict())
    with pytest.raises(GateError):
        other(torch.ones(2))


def test_end_of_turn() -> None:
    gates.end_of_turn(experience(), [EOS], stops=False)
    broken = experience(truncated=torch.tensor([False, False, False]))  # row 1 says that it finished, with token 5
    with pytest.raises(GateError) as e:
        gates.end_of_turn(broken, [EOS, 8], stops=False)
    assert str(e.value) == "row 1: a finished response ends with token 5, not an end-of-turn token [9, 8]"
    gates.end_of_turn(broken, [EOS], stops=True)  # a stop text may end it
    gates.end_of_turn(experience(truncated=None), [EOS], stops=False)  # recorded rows


def test_end_of_turn_wants_the_token_inside_the_mask() -> None:
    mask = experience().mask.clone()
    mask[0, 3] = False  # EOS is there and not trained
    with pytest.raises(GateError, match="row 0: a finished response ends with token 3"):
        gates.end_of_turn(experience(mask=mask), [EOS], stops=False)


def test_invariance() -> None:
    exp = experience()
    a = torch.tensor([-1.0, -2.0])
    assert gates.invariance(lambda e: a, lambda e: a + 1e-5, exp, 2e-4) == pytest.approx(1e-5, rel=0.02)
    for b in (a + torch.tensor([0.0, 1.0]), a - torch.tensor([0.5, 0.5]), a + torch.tensor([0.5, -0.5])):
        with pytest.raises(GateError) as e:
            gates.invariance(lambda e: a, lambda e, b=b: b, exp, 2e-4)
        assert str(e.value) == (
            "log-probs change by 0.5 nats a token when rows go through the model alone (gates.invariance=0.0002); "
            "this model's attention or output layer does not fit: set model.packing=false, or use another model"
        )
    tokens = torch.zeros(3, 4)  # 7 trained tokens of 12; only those count
    assert gates.invariance(lambda e: tokens, lambda e: tokens + e.mask * 0.1, exp, 1.0) == pytest.approx(0.1)
    with pytest.raises(GateError, match="nan"):
        gates.invariance(lambda e: a, lambda e: a * float("nan"), exp, 2e-4)


# -- all together ------------------------------------------------------------------------------------------------------


def all_gates(**changes: Any) -> gates.Gates:
    settings: dict[str, Any] = {
        "precision": "fp32",
        "eos": [EOS],
        "stops": False,
        "own_reference": True,
        "exact_sampler": True,
    }
    section = changes.pop("section", GatesSection(constant_steps=2))
    return gates.Gates(section, **(settings | changes))


GOOD = {"ratio_gap": 0.0, "kl": 0.0, "sampler_gap": 1e-5}


def test_a_good_step_passes() -> None:
    all_gates()(0, experience(), stats(**GOOD))


@pytest.mark.parametrize(
    ("changes", "exp", "step"),
    [
        ({"ratio_gap": 0.5}, {}, 0),
        ({"kl": 1.0}, {}, 0),
        ({"sampler_gap": 1.0}, {}, 0),
        ({"sampler_gap": 1.0}, {}, 5),
        ({}, {"truncated": torch.zeros(3, dtype=torch.bool)}, 0),
    ],
)
def test_each_gate_is_wired(changes: dict[str, float], exp: dict[str, Any], step: int) -> None:
    with pytest.raises(GateError):
        all_gates()(step, experience(**exp), stats(**(GOOD | changes)))
    all_gates(section=GatesSection(enabled=False))(step, experience(**exp), stats(**(GOOD | changes)))


def test_later_steps_may_leave_the_reference() -> None:
    all_gates()(1, experience(), stats(**(GOOD | {"ratio_gap": 0.5, "kl": 1.0})))


def test_log_probs_are_compared_every_n_steps() -> None:
    gate = all_gates(section=GatesSection(logp_every=3))
    far = stats(**(GOOD | {"sampler_gap": 1.0}))
    for step in (1, 2, 4):
        gate(step, experience(), far)
    with pytest.raises(GateError, match="step 3"):
        gate(3, experience(), far)


def test_another_reference_or_an_approximate_sampler_is_no_error() -> None:
    all_gates(own_reference=False)(0, experience(), stats(**(GOOD | {"kl": 1.0})))
    all_gates(exact_sampler=False)(0, experience(), stats(**(GOOD | {"sampler_gap": 1.0})))


def test_the_constant_reward_gate_is_wired() -> None:
    gate = all_gates()
    gate.reward(torch.ones(3))
    with pytest.raises(GateError, match=r"every reward was 1 for 2 steps"):
        gate.reward(torch.ones(3))
    off = all_gates(section=GatesSection(constant_steps=1, enabled=False))
    off.reward(torch.ones(3))


def test_limits_follow_precision_unless_given() -> None:
    assert all_gates().limit == 1e-3 and all_gates(precision="bf16").limit == 0.2
    assert all_gates(section=GatesSection(logp_gap=0.5)).limit == 0.5
    assert all_gates(precision="bf16").tolerance == 0.2


# -- the numbers that gates read ---------------------------------------------------------------------------------------


def test_diagnostics_by_hand() -> None:
    mask = torch.tensor([[True, True, False]])
    logp, old = torch.tensor([[-1.0, -2.0, -5.0]]), torch.tensor([[-1.0, -1.0, 0.0]])
    columns = {
        "logp": logp, "old_logp": old, "ref_logp": torch.tensor([[-2.0, -2.0, 0.0]]), "behavior_logp": old - 0.25, "mask": mask,
        "value_new": torch.tensor([[1.0, 1.0, 7.0]]), "returns": torch.tensor([[1.0, 3.0, 0.0]]),
        "score_new": torch.tensor([1.0, 2.0, 2.0]), "pairs": torch.tensor([[1, 0], [0, 2], [1, 2]]),
    }  # fmt: skip
    e = torch.e
    wanted = {
        "ratio_mean": (1 + 1 / e) / 2,  # log-ratios 0 and -1
        "ratio_gap": (1 - 1 / e) / 2,
        "ratio_max": 1.0,
        "kl_old": (0 + 1 / e - 1 + 1) / 2,  # k3(-1) = exp(-1) - 1 + 1
        "kl": (1 / e - 1 + 1 + 0) / 2,  # ref - logp: -1 and 0
        "sampler_gap": 0.25,
        "sampler_gap_max": 0.25,
        "surprise": 1.5,
        "reward_accuracy": (1 + 0 + 0.5) / 3,  # a tie counts half
        "explained_variance": 0.0,  # errors 0 and 2 vary as much as returns 1 and 3
    }
    for name, number in wanted.items():
        fn = DIAGNOSTICS[name]
        names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
        assert float(fn(**{k: columns[k] for k in names})) == pytest.approx(number, abs=1e-6), name


def test_the_kl_of_a_masked_policy_that_is_its_reference_is_0() -> None:
    # two tokens of which 0.7 and 0.9 of the mass was allowed: the masked log-probs are larger by -log of these
    ref, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    masked = ref - torch.tensor([[0.7, 0.9]]).log()
    exp = experience(ids=torch.ones(1, 2).long(), mask=mask, truncated=None, score=None, ref_logp=ref)
    assert diagnose(exp, {"logp": masked})["kl"] > 0.02, "0.7 - 1 - log 0.7 = 0.057 and 0.005"
    assert diagnose(exp.filled({"full_logp": ref}), {"logp": masked})["kl"] == 0.0


def test_policy_accuracy_by_hand() -> None:
    logp = torch.tensor([[-1.0, 9.0], [-3.0, 0.0]])
    mask = torch.tensor([[True, False], [True, True]])
    # log-ratios to a reference of zeros: -1 (the 9 is masked) and -3
    assert float(DIAGNOSTICS["accuracy"](logp, torch.zeros(2, 2), mask, torch.tensor([[0, 1]]))) == 1.0


def test_steps_without_rows_count_as_constant() -> None:
    gate = gates.ConstantReward(2)
    gate(torch.zeros(0))
    with pytest.raises(GateError) as e:
        gate(torch.zeros(0))
    assert str(e.value) == (
        "no reward was left for 2 steps (gates.constant_steps=2); try the reward on a file first: rlhf score"
    )
