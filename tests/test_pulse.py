"""Whatever makes progress says so, so that a long phase is not taken for a hang."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf_cli import pulse
from rlhf_cli.judges.network import Again, Limits, Network
from rlhf_cli.models.tiny import tiny_causal, tiny_tokenizer
from rlhf_cli.rollout.sampler import Decoding, Sampler

# A phase of 2 s under a limit of 1 s, that gets on; then one that does not.
LONG = """
import sys, time
from pathlib import Path
from rlhf_cli import pulse
from rlhf_cli.record.heartbeat import Heartbeat
beat = Heartbeat(Path(sys.argv[1]), 0, 1.0).start()
beat.beat("prepass")
for _ in range(10):
    time.sleep(0.2); pulse.alive()
print("got on", flush=True)
beat.beat("update")
time.sleep(60)
"""


@pytest.fixture
def beats() -> Iterator[list[int]]:
    heard: list[int] = []
    pulse.listen(lambda: heard.append(1))
    yield heard
    pulse.listen(None)


def test_a_long_phase_that_gets_on_is_not_silent(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LONG, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (75, "got on\n")
    assert "s in phase update" in done.stderr


def test_every_decoding_step_is_a_sign_of_life(beats: list[int]) -> None:
    made = Sampler(
        tiny_causal(0, torch.float32), tiny_tokenizer(), Decoding(max_tokens=5, min_tokens=5, rows=2), device="cpu"
    )
    made.sample([[5, 6]], 2, [1, 2])
    assert len(beats) == 5


def test_every_answer_over_the_network_is_a_sign_of_life_and_so_is_a_failure(beats: list[int]) -> None:
    network = Network(Limits(1, 1.0, 0))

    async def good() -> int:
        return 7

    async def bad() -> int:
        raise Again("busy")

    async def ask(call: object) -> object:
        return await network.attempt(call)  # type: ignore[arg-type]

    assert network.submit(ask(good)).result()[0] == 7 and len(beats) == 1  # type: ignore[index]
    with pytest.raises(Again):
        network.submit(ask(bad)).result()
    assert len(beats) == 2


def test_a_heartbeat_listens_until_it_stops(tmp_path: Path) -> None:
    from rlhf_cli.record.heartbeat import Heartbeat

    beat = Heartbeat(tmp_path, 0, 100).start()
    beat._alive = 0.0
    pulse.alive()
    assert beat._alive > 0
    beat.stop()
    beat._alive = 0.0
    pulse.alive()
    assert beat._alive == 0
