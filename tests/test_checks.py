"""Combinations of hardware settings that are refused, and what is said."""

from __future__ import annotations

import pytest

from rlhf_cli.checks import OWNED, check_deepspeed, check_numbers
from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as e:
        check_numbers(compose("train", ["debug=tiny", *words], None))
    return str(e.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("hardware.zero=4", "hardware.zero: 4 is not allowed; choose one of 0, 1, 2, 3"),
        ("hardware.nodes=0", "hardware.nodes=0: must be at least 1"),
        ("hardware.offload=cpu", "hardware.offload=cpu needs hardware.zero=2 or 3; it is 0"),
        ("hardware.offload=cpu hardware.zero=1", "hardware.offload=cpu needs hardware.zero=2 or 3; it is 1"),
        ("hardware.offload=nvme hardware.zero=2", "hardware.offload=nvme needs hardware.zero=3; it is 2"),
        ("hardware=zero3_offload_nvme", "hardware.offload=nvme: where to? type hardware.nvme_path=FOLDER on a local NVMe disk"),
        ("hardware.nvme_path=/x", "hardware.nvme_path is not used with hardware.offload=none; type hardware.offload=nvme"),
        ("hardware.deepspeed.zero_optimisation.x=1", "hardware.deepspeed.zero_optimisation: DeepSpeed has no such key; did you mean 'zero_optimization'?"),
        ("hardware.deepspeed.train_batch_size=4", "hardware.deepspeed.train_batch_size: batch decides it; set that instead"),
    ],
)  # fmt: skip
def test_refused_with_the_reason(words: str, said: str) -> None:
    assert refusal(*words.split()) == said


@pytest.mark.parametrize("key", OWNED)
def test_keys_that_other_settings_decide(key: str) -> None:
    first, _, rest = key.partition(".")
    middle, _, last = rest.partition(".")
    node: object = 1
    for part in (last, middle):
        node = {part: node} if part else node
    with pytest.raises(ConfigError, match=f"hardware.deepspeed.{key}: {OWNED[key]} decides it"):
        check_deepspeed({first: node})


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"wall_clock_breakdown": True},
        {"comms_logger": {"enabled": True}},
        {"flops_profiler": {"enabled": False}},
        {"aio": {"block_size": 1048576}},
        {"zero_optimization": {"reduce_bucket_size": 1000, "offload_optimizer": {"pin_memory": True}}},
        {"activation_checkpointing": {"cpu_checkpointing": False}},
        {"zero_allow_untested_optimizer": True},
        {"communication_data_type": "fp32"},
    ],
)
def test_keys_that_deepspeed_documents_pass(extra: dict[str, object]) -> None:
    check_deepspeed(extra)
