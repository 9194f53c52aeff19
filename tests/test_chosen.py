"""A selection of options is composed once; what comes of it is what Hydra composes from everything at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict

from rlhf_cli import chosen

LINES = [
    [],
    ["steps=3", "algo=ppo", "++learners={critic: {lr: 0.1}}", "optim.lr=2e-5"],
    ["reward=[bleu,length]", "reward.bleu.weight=0.5", "run.name=${seed}_${steps}", "~reward.length"],
    ["algo=grpo", "reduce@updates.policy.kl.reduce=sequence_sum", "updates.policy.kl={coef: 0.3}", "debug=tiny"],
    ["+shaping@reward.bleu.shaping=par", "++debug.shuffled_reward=true", "hydra.run.dir=x"],
]


@pytest.mark.parametrize("lines", LINES, ids=lambda x: "-".join(x[:1]) or "defaults")
def test_it_equals_one_composition_of_everything(lines: list[str]) -> None:
    for _ in range(2):  # composed, and met again
        made, options = chosen.compose("train", lines, None)
        with initialize_config_module("rlhf_cli.conf", version_base=chosen.VERSION):
            whole = hydra_compose("train", lines, return_hydra_config=True)
        assert options == dict(whole.hydra.runtime.choices)
        with open_dict(whole):
            del whole["hydra"]
        assert OmegaConf.to_yaml(made) == OmegaConf.to_yaml(whole)
        assert OmegaConf.is_struct(made) and OmegaConf.is_struct(whole)


def test_a_selection_is_composed_once_and_a_change_of_the_result_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    first, options = chosen.compose("train", ["algo=rloo", "steps=3"], None)
    first.optim.lr = 7.0
    options["algo"] = "nothing"
    monkeypatch.setattr(chosen, "hydra_compose", None)
    again, options = chosen.compose("train", ["algo=rloo", "seed=4"], None)
    assert (again.steps, again.seed, again.optim.lr) == (36, 4, 1e-5)
    assert options["algo"] == "rloo"
    with pytest.raises(TypeError):  # another selection has to be composed
        chosen.compose("train", ["algo=rloo", "credit=group_mean"], None)


def test_faults_are_hydra_s() -> None:
    with pytest.raises(HydraException, match=r"Could not override 'stepz'"):
        chosen.compose("train", ["stepz=3"], None)
    with pytest.raises(HydraException, match=r"Error merging override steps=x"):
        chosen.compose("train", ["steps=x"], None)


def test_an_edited_file_of_the_user_is_read_again(tmp_path: Path) -> None:
    own = tmp_path / "algo" / "own.yaml"
    own.parent.mkdir()
    for number, steps in enumerate((5, 6)):
        own.write_text(f"# @package _global_\n# mine\ndefaults: [rloo, _self_]\nsteps: {steps}\n", encoding="utf-8")
        os.utime(own, (number, number))  # two edits within one tick of the clock
        assert chosen.compose("train", ["algo=own"], str(tmp_path))[0].steps == steps
