"""Whole runs whose rewards are computed in worker processes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import e2e_support as e2e
import psutil
import pytest
from e2e_support import TINY, Done

pytestmark = pytest.mark.slow
Rlhf = Callable[..., Done]
VALUES = "values = [sum(map(ord, r)) % 7 / 7 for r in responses]"
METRICS = ("reward=[python,bleu,rouge]", "algo=grpo", "steps=3", "optim.lr=0.001", "checkpoint.every=2")


def words(tmp_path: Path, body: str = VALUES) -> list[str]:
    return [*TINY, *METRICS, e2e.python_reward(tmp_path / "mine.py", body), f"run.dir={tmp_path}"]


def test_workers_change_no_number(rlhf: Rlhf, tmp_path: Path) -> None:
    """In place, in three workers, and in the workers of two ranks."""
    common = words(tmp_path)
    for name, more in (
        ("place", ("reward_workers.processes=-1",)),
        ("three", ("reward_workers.processes=3", "reward.python.sees=sample")),
    ):
        done = rlhf("train", *common, f"run.name={name}", *more)
        assert done.code == 0, done.err
    e2e.assert_same(tmp_path / "place", tmp_path / "three")
    for name, count in (("two", -1), ("two-pooled", 2)):
        done = e2e.shell(
            "train", *common, f"run.name={name}", "hardware.processes=2", f"reward_workers.processes={count}"
        )
        assert done.code == 0, done.out + done.err
    e2e.assert_same(tmp_path / "two", tmp_path / "two-pooled")


def test_a_response_that_hangs_is_left_out_and_told(rlhf: Rlhf, tmp_path: Path) -> None:
    # Four calls for the evaluation before the first step, so that the sixth is the second response of the first step.
    hang = "f = open(__file__ + '.calls', 'ab'); f.write(b'.'); f.flush(); time.sleep(60 * (f.tell() == 6)); "
    more = (
        "reward.python.sees=sample",
        "reward_workers.processes=1",
        "reward_workers.timeout=0.5",
        "gates.failures=0.5",
        "eval.prompts=4",
    )
    done = rlhf("train", *words(tmp_path, hang + VALUES), "run.name=r", *more)
    assert done.code == 0, done.err
    rows = e2e.jsonl(tmp_path / "r" / "metrics.jsonl")
    assert [r["component/python/missing"] for r in rows] == [1, 0, 0]
    assert [r["component/bleu/missing"] for r in rows] == [0, 0, 0]
    assert rows[0]["count/rows"] == rows[1]["count/rows"] - 1
    assert "python: it took over 0.5 s (reward_workers.timeout=0.5)" in e2e.notes(tmp_path / "r")


def test_a_function_that_always_raises_stops_the_run_and_names_its_line(rlhf: Rlhf, tmp_path: Path) -> None:
    done = rlhf("train", *words(tmp_path, "values = [r.missing for r in responses]"), "run.name=r")
    assert done.code != 0 and "mine.py:4: AttributeError" in done.err and "rewards failed" in done.err


def test_score_does_not_hang_on_one_response(rlhf: Rlhf, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "response": "stop" if i == 3 else "go", "references": ["go"]} for i in range(8)]
    file = e2e.write_rows(tmp_path / "in.jsonl", rows)
    body = "time.sleep(60 * responses.count('stop')); values = list(map(len, responses))"
    more = ("reward=[python,bleu]", e2e.python_reward(tmp_path / "mine.py", body), "reward_workers.timeout=0.5")
    done = rlhf("score", f"input={file}", *more, f"output={tmp_path / 'out.jsonl'}")
    assert done.code == 0, done.err
    assert "python: 1 of 8 samples could not be scored" in done.out and "it took over 0.5 s" in done.out
    assert [r["score"] is None for r in e2e.jsonl(tmp_path / "out.jsonl")] == [i == 3 for i in range(8)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_no_worker(number: int, tmp_path: Path) -> None:
    body = "open(f'{__file__}.{os.getpid()}', 'w').close(); time.sleep(0.3); " + VALUES
    run = e2e.begin("train", *words(tmp_path, body), "run.name=r", "reward_workers.processes=2", log=tmp_path / "log")
    e2e.until(lambda: len(list(tmp_path.glob("mine.py.*"))) == 2, process=run)
    workers = [psutil.Process(pid) for pid in e2e.descendants(run.pid)]
    assert sum("rlhf_cli.rewards.worker" in " ".join(p.cmdline()) for p in workers) == 2
    run.send_signal(number)
    assert run.wait(240) == (-9 if number == signal.SIGKILL else 75)
    assert not psutil.wait_procs(workers, timeout=60)[1]
