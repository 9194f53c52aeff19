"""Models that are only read, as a plan sees them: columns by name, how they follow the policy, and each refusal by its text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.inject import call
from rlhf_cli.plan import validate
from rlhf_cli.types import Experience

RTO = ["algo=ppo", "shaping=[kl,implicit_dpo]"]
MASK = ["rollout.mask.model=lagged", "frozen.lagged.path=initial"]


def config(*words: str) -> Any:
    return compose("train", ["model=tiny_random", *words], None)


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as e:
        validate(config(*words))
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_model_of_a_name_fills_the_column_of_that_name() -> None:
    plan = validate(config(*RTO, "frozen.dpo.path=runs/dpo"))
    assert plan.models["dpo"] == "gives dpo_logp: runs/dpo" and "dpo_logp" in plan.annotate
    annotate = next(s for s in plan.stages if s.name == "annotate")
    assert "dpo_logp" in annotate.gives


def test_models_that_follow_are_said_aloud() -> None:
    plan = validate(config(*MASK, "frozen.lagged.refresh.every=20", "model.refresh.every=1", "model.refresh.decay=0.9"))
    assert plan.models["lagged"] == (
        "says which tokens may be drawn: a copy of the initial policy; takes the policy's weights every 20 steps"
    )
    assert plan.models["reference"] == (
        "gives ref_logp: a copy of the policy; takes the policy's weights every step, 0.9 of itself kept"
    )
    assert "lagged_logp" not in plan.annotate, "nothing reads it"


def test_a_soup_names_its_parts() -> None:
    plan = validate(config("model.reference=soup", "model.soup.path=runs/other", "model.soup.weight=0.25"))
    assert plan.models["reference"] == "gives ref_logp: 0.75 x the model + 0.25 x runs/other"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (RTO, "shaping.implicit_dpo: implicit_dpo needs dpo_logp; no model is called dpo: type frozen.dpo.path=RUN"),
        (
            [*RTO, "frozen.dpo.refresh.every=1"],
            "frozen.dpo.path is empty; type frozen.dpo.path=RUN, or frozen.dpo.path=initial for the initial policy",
        ),
        (["frozen.dpo.path=x"], "frozen.dpo: nothing reads dpo_logp; drop it with '~frozen.dpo'"),
        (["frozen.ref.path=x"], "frozen.ref: this name is taken; choose another"),
        (["frozen.policy.path=x"], "frozen.policy: this name is taken; choose another"),
        ([*RTO, "frozen.dpo.path=x", "frozen.dpo.refresh.every=-1"], "frozen.dpo.refresh.every=-1: must be at least 0"),
        (["model.refresh.every=1", "model.refresh.decay=1"], "model.refresh.decay=1: must be at least 0 and below 1"),
        (
            ["model.refresh.decay=0.5"],
            "model.refresh.decay=0.5 is not used while nothing refreshes; type model.refresh.every=1",
        ),
        (
            ["algo=reward_model", "model.refresh.every=1"],
            "model.refresh.every=1: no policy is trained, so there is nothing to follow; type model.refresh.every=0",
        ),
        (
            ["model.reference=soup"],
            "model.reference=soup averages the model with another one, and model.soup.path is empty; "
            "type model.soup.path=RUN, another fine-tune of the same base model",
        ),
        (["model.soup.path=x"], "model.soup.path is not used; type model.reference=soup"),
        (
            ["model.reference=soup", "model.soup.path=x", "model.soup.weight=2"],
            "model.soup.weight=2: must be from 0 to 1",
        ),
        (
            ["rollout.mask.model=lagged"],
            "rollout.mask.model=lagged: no such model in frozen (none yet); "
            "type frozen.lagged.path=initial frozen.lagged.refresh.every=20",
        ),
        ([*MASK, "rollout.mask.top_p=0"], "rollout.mask.top_p=0: must be above 0 and at most 1"),
        ([*MASK, "rollout.mask.min_tokens=0"], "rollout.mask.min_tokens=0: must be at least 1"),
        (
            [*MASK, "rollout.top_p=0.9"],
            "rollout.mask: the learner knows the mask's tokens only; set rollout.top_p=1 rollout.top_k=0 rollout.min_tokens=0",
        ),
        (
            [*MASK, "environment=calculator"],
            "rollout.mask: a dialogue of several turns keeps no record of what its tokens were chosen from; type environment=none",
        ),
        (["frozen.dpo.pth=x"], "frozen.dpo.pth: unknown key; did you mean 'path'?"),
    ],
)
def test_each_refusal_says_what_to_type(words: list[str], text: str) -> None:
    assert refusal(*words) == text


def test_a_rollout_engine_without_two_models_is_refused() -> None:
    pytest.importorskip("vllm")
    assert refusal(*MASK, "rollout=vllm").startswith("rollout.mask needs the log-probs of two models at every token")


def test_named_columns_travel_with_their_rows() -> None:
    def first(dpo_logp: torch.Tensor) -> torch.Tensor:
        return dpo_logp[:, 0]

    exp = Experience(ids=torch.zeros(3, 2, dtype=torch.int64)).filled({
        "dpo_logp": torch.arange(6.0).view(3, 2), "ref_logp": torch.ones(3, 2),
    })  # fmt: skip
    assert exp.ref_logp is not None and exp.named.keys() == {"dpo_logp"}
    assert call(first, exp.rows(torch.tensor([2, 0]))).tolist() == [4.0, 0.0]
    with pytest.raises(ValueError, match="dpo_logp: T is 3, other columns have 2"):
        exp.filled({"dpo_logp": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"first needs \['dpo_logp'\]"):
        call(first, Experience())
