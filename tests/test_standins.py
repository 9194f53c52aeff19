import pytest
import torch

from rlhf_cli import standins
from rlhf_cli.compose import compose
from rlhf_cli.config import ModelSection
from rlhf_cli.errors import ConfigError
from rlhf_cli.models.loading import load_causal
from rlhf_cli.plan import validate
from rlhf_cli.rewards.model import Model
from rlhf_cli.types import Sample


def test_debug_tiny_names_a_random_model_where_none_is_given_and_says_so() -> None:
    cfg = compose("train", ["reward=model", "debug=tiny"], None)
    assert cfg.reward.model.path == "tiny:1"
    note = "reward.model: a random tiny model stands in (debug.stand_ins); its numbers mean nothing"
    assert note in validate(cfg).notes


def test_a_path_that_is_given_stays() -> None:
    cfg = compose("train", ["reward=model", "reward.model.path=tiny:7", "debug=tiny"], None)
    assert cfg.reward.model.path == "tiny:7"


def test_nothing_stands_in_without_the_switch() -> None:
    with pytest.raises(ConfigError, match=r"^reward\.model\.path is empty"):
        validate(compose("train", ["reward=model"], None))


def test_a_seed_is_a_number() -> None:
    with pytest.raises(ConfigError, match=r"^'tiny:x': a random model is named tiny:SEED, e\.g\. tiny:1$"):
        standins.seed_of("tiny:x")
    assert standins.seed_of("runs/tiny") is None


def test_the_seed_of_the_path_wins_over_that_of_the_run() -> None:
    def weights(path: str, seed: int) -> torch.Tensor:
        return load_causal(ModelSection(path=path), dtype=torch.float32, seed=seed).lm_head.weight

    assert torch.equal(weights("tiny:1", 5), weights("tiny:1", 6))
    assert not torch.equal(weights("tiny:1", 5), weights("tiny:2", 5))


def test_random_reward_models_score_and_differ_by_seed() -> None:
    def value(path: str) -> float:
        made = Model(path=path, render="turn", batch_size=4, max_tokens=256, device="cpu", dtype="fp32")
        return float(made([Sample("p", "some words")], torch.zeros(1, dtype=torch.int64)).value)

    assert value("tiny:1") == value("tiny:1") != value("tiny:2")
