"""reward=self and reward=http in training that follows them: two processes as one, resumed as uninterrupted, and the policy in vLLM."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import e2e_support as e2e
import pytest
from e2e_support import TINY, Done

sys.path.insert(0, str(Path(__file__).parents[1] / "judges"))
import grading_model
from judge_server import Body, Say, Server, serving

pytestmark = pytest.mark.slow
Rlhf = Callable[..., Done]
SELF = (
    "reward.self.max_tokens=24",
    "reward.self.votes=4",
    "dataset.max_prompt_tokens=512",
    "rollout.max_tokens=12",
    "gates.failures=0.9",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grading_model.save(tmp_path_factory.mktemp("grader"))


def lengths(body: Body, n: int) -> Say:
    """A function of each response alone: the share of its digits."""
    values = [sum(c.isdigit() for c in s["response"]) / (1 + len(s["response"])) for s in body["samples"]]
    return Say(
        raw=json.dumps({"values": values, "components": {"n": [len(s["response"]) for s in body["samples"]]}}).encode()
    )


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(lengths) as made:
        yield made


def words(model: Path, server: Server, place: Path) -> list[str]:
    return [
        *TINY, "algo=grpo", "model=path", f"model.path={model}", "reward=[self,http]", *SELF, f"reward.http.url={server.url}", "steps=3",
        "optim.lr=0.0003", "checkpoint.keep=3", f"run.dir={place}",
    ]  # fmt: skip


def test_two_processes_as_one_and_resumed_as_uninterrupted(
    model: Path, server: Server, tmp_path: Path, rlhf: Rlhf
) -> None:
    one = rlhf("train", *words(model, server, tmp_path), "run.name=one")
    assert one.code == 0, one.err
    rows = e2e.jsonl(tmp_path / "one" / "metrics.jsonl")
    assert len(rows) == 3 and all(0 < r["component/self/read"] <= 1 and 0 <= r["component/self"] <= 5 for r in rows)
    assert all(r["component/http/missing"] == 0 and r["policy/grad_norm"] > 0 for r in rows), "both rewards train"
    asked = len(server.bodies)

    two = e2e.shell("train", *words(model, server, tmp_path), "run.name=two", "hardware.processes=2")
    assert two.code == 0, two.out + two.err
    again = e2e.jsonl(tmp_path / "two" / "metrics.jsonl")
    names = ("component/self", "component/self/read", "component/http", "component/http/n", "score/mean")
    assert {k: rows[0][k] for k in names} == {k: again[0][k] for k in names}, (
        "the first step draws the same, to the bit"
    )
    for a, b in zip(rows, again, strict=True):
        assert all(a[k] == pytest.approx(b[k], abs=1e-4) for k in names), "later ones up to the order of sums"
    assert len(server.bodies) == 2 * asked, "each group was sent once, by one of the ranks"

    copy = tmp_path / "three"
    shutil.copytree(tmp_path / "one", copy)
    for late in (*(copy / "checkpoints").glob("step-*3"), copy / "export"):
        shutil.rmtree(late)
    (copy / ".lock").unlink(missing_ok=True)
    status = json.loads((copy / "status.json").read_text())
    (copy / "status.json").write_text(json.dumps(status | {"status": "failed"}))
    done = rlhf("resume", str(copy))
    assert done.code == 0 and "2 of 3 steps done" in done.out + done.err
    assert len(server.bodies) > 2 * asked, "nothing is kept: the server is asked again"
    e2e.assert_same(tmp_path / "one", copy)


@pytest.mark.xdist_group("served-judge")
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="VLLM IS NOT INSTALLED, reward=self IS NOT TESTED WITH IT: type make vllm",
)
def test_the_policy_in_vllm_grades_itself(model: Path, tmp_path: Path) -> None:
    """In the engine that drew the responses, with the weights of each step."""
    words = [
        *TINY,
        "algo=grpo",
        "model=path",
        f"model.path={model}",
        *SELF,
        "reward=self",
        "optim.lr=0.0003",
        "steps=2",
    ]
    engine = ("rollout=vllm", "rollout.rows=16", "rollout.vllm.max_model_len=1536")
    done = e2e.shell("train", *words, *engine, f"run.dir={tmp_path}", "run.name=r")
    assert done.code == 0, done.out + done.err
    rows = e2e.jsonl(tmp_path / "r" / "metrics.jsonl")
    assert len(rows) == 2 and all(r["component/self/read"] > 0 and 0 < r["component/self"] <= 5 for r in rows)
    assert all(r["policy/grad_norm"] > 0 and r["rollout/changed_tensors"] > 0 for r in rows)
