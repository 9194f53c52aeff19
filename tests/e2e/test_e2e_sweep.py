"""Whole sweeps of real runs: interrupted and gone on with, compared, and searched by Optuna."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import e2e_support as e2e
import pytest
from e2e_support import TINY

pytestmark = pytest.mark.slow
POINTS = ("seed=1", "seed=2")


def points(sweep: Path) -> list[dict[str, Any]]:
    return json.loads((sweep / "sweep.json").read_text(encoding="utf-8"))["points"]


def test_an_interrupted_sweep_ends_like_one_that_was_not(tmp_path: Path) -> None:
    cut, hold, log = tmp_path / "sweeps" / "cut", tmp_path / "hold", tmp_path / "log"
    reward = ("reward=python", e2e.python_reward(tmp_path / "mine.py", e2e.held(cut / "seed=2", hold)))
    words = ("train", "-m", "seed=1,2", *TINY, *reward, "steps=3", f"run.dir={tmp_path}")
    whole = e2e.shell(*words, "sweep.name=whole", "sweep.parallel=2")
    assert whole.code == 0, whole.err
    assert "2 points; 2 at a time" in whole.out and "2 points: 2 finished" in whole.out and "eval/reward" in whole.out

    hold.touch()
    process = e2e.begin(*words, "sweep.name=cut", log=log)
    assert e2e.until(lambda: len(e2e.jsonl(cut / "seed=2" / "metrics.jsonl")) >= 1, process=process), log.read_text()
    process.send_signal(signal.SIGINT)
    assert e2e.until(lambda: "stopping after this step" in e2e.notes(cut / "seed=2"), process=process), log.read_text()
    hold.unlink()
    assert process.wait(240) == 75, log.read_text()
    assert [p["status"] for p in points(cut)] == ["finished", "interrupted"], log.read_text()
    done = (cut / "seed=1" / "status.json").read_text()

    again = e2e.shell(*words, "sweep.name=cut")
    assert again.code == 0, again.err
    assert "seed=1 is finished, skipped" in again.out and "seed=2 goes on" in again.out
    assert (cut / "seed=1" / "status.json").read_text() == done, "a finished point is not touched"
    assert "resumed from" in e2e.notes(cut / "seed=2")
    for name in POINTS:
        e2e.assert_same(tmp_path / "sweeps" / "whole" / name, cut / name)


def test_a_search_with_a_pruned_and_a_failing_trial(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs pip install 'rlhf-cli[sweep]'")
    # One token a response is the worst length. No prompt is one token short, so a limit of 1 ends a run at its start. With this seed the
    # random sampler proposes long, long, short, short with that limit.
    space = (
        "rollout.max_tokens=choice(8,1)",
        "dataset.max_prompt_tokens=choice(4096,1)",
        "sweep.seed=4",
        "sweep.sampler=random",
    )
    how = ("sweep.metric=response/length", "sweep.trials=4", "sweep.startup=1", "steps=80", "checkpoint.every=0")
    words = ("train", "-m", "hydra/sweeper=optuna", *space, *how, *TINY, "reward=length", f"run.dir={tmp_path}")
    done = e2e.shell(*words, "sweep.name=s")
    assert done.code == 1, done.out + done.err
    found = points(tmp_path / "sweeps" / "s")
    assert [p["status"] for p in found] == ["finished", "finished", "pruned", "failed"], done.out
    assert "max_prompt_tokens" in found[3]["error"]
    assert found[0]["value"] > 1.0 and found[2]["value"] <= 1.0
    assert "best of 2 finished trials" in done.out and "rollout.max_tokens=8" in done.out.split("best of")[1]
