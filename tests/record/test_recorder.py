"""The recorder: numbers of a step by hand, one axis, and a resumed record equal to an uninterrupted one."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.record.describe import describe, rows_of
from rlhf_cli.record.heartbeat import Heartbeat
from rlhf_cli.record.metrics import read
from rlhf_cli.record.progress import Progress
from rlhf_cli.record.recorder import PhaseClock, Quiet, Recorder, make_recorder
from rlhf_cli.record.rundir import RunDir
from rlhf_cli.types import Experience, Sample

NAN = float("nan")


def experience(shift: float = 0.0) -> Experience:
    """Five rows in three groups: one of equal scores, one with a missing score, one of a single row."""
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1]]).bool()
    return Experience(
        samples=tuple(Sample(f"p{i // 2}", f"r{i}", uid=f"u{i // 2}") for i in range(5)),
        components={"bleu": torch.tensor([1.0, 1.0, NAN, 3.0, 5.0]) + shift},
        ids=torch.zeros(5, 4, dtype=torch.int64),
        attention=mask | torch.tensor([1, 0, 0, 0]).bool(),
        mask=mask,
        group=torch.tensor([0, 0, 1, 1, 2]),
        truncated=torch.tensor([False, True, False, False, False]),
        score=torch.tensor([2.0, 2.0, NAN, 4.0, 8.0]) + shift,
        advantage=torch.full((5, 4), -1.5) * mask,
    )


def test_numbers_by_hand() -> None:
    # scores there: 2 2 4 8, mean 4, squared deviations 4 4 0 16, variance 6. Groups of two scores: only {2, 2}, equal.
    # lengths 2 1 3 2 3: mean 2.2. Tokens: 11 of responses and 5 of prompts.
    assert describe(experience()) == {
        "score/missing": 1, "score/mean": 4.0, "score/std": 6**0.5, "score/zero_variance": 1.0, "component/bleu": 2.5,
        "advantage/abs_max": 1.5, "response/length": 2.2, "response/length_max": 3, "response/truncated": 0.2,
        "count/rows": 5, "count/groups": 3, "count/response_tokens": 11, "count/tokens": 16,
    }  # fmt: skip


def test_a_batch_without_scores_or_rows_has_no_such_numbers() -> None:
    assert describe(Experience()) == {"count/rows": 0, "count/response_tokens": 0, "count/tokens": 0}
    assert rows_of(Experience(), 3) == []


def test_samples_hold_texts_and_every_component() -> None:
    first, second = rows_of(experience(), 2)
    assert first == {
        "row": 0, "uid": "u0", "group": 0, "score": 2.0, "truncated": False, "length": 2, "components": {"bleu": 1.0},
        "prompt": "p0", "response": "r0",
    }  # fmt: skip
    assert (second["truncated"], second["response"]) == (True, "r1")


def test_inner_phases_stop_the_outer_one_and_evaluation_is_not_step_time() -> None:
    clock = PhaseClock()
    clock.enter("load")
    time.sleep(0.05)
    clock.enter("rollout")
    time.sleep(0.04)
    clock.enter("evaluate")
    time.sleep(0.06)
    clock.enter("")
    row = clock.row(rows=4, tokens=40)
    assert 0.04 <= row["time/rollout"] < 0.055 and 0.04 <= row["time/step"] < 0.055
    assert row["time/between"] == pytest.approx(row["time/load"] + row["time/evaluate"])
    assert row["time/tokens_per_s"] == pytest.approx(10 * row["time/rows_per_s"])
    assert clock.row(rows=1, tokens=1)["time/step"] < 0.01


def recorder(path: Path, out: io.StringIO | None = None) -> Recorder:
    run = RunDir(path).create()
    run.claim()
    made = make_recorder(run, {}, Progress("r", 6, out or io.StringIO()), Heartbeat(path, 0, 0), 0, 2)
    assert isinstance(made, Recorder)
    return made


def steps(r: Recorder, first: int, last: int) -> dict[str, Any]:
    """Run the steps with these indices, evaluating every second; returns the state as of a checkpoint at the end."""
    for i in range(first, last):
        with r.phase("rollout"):
            exp = experience(shift=i / 7)
        r.count({"dropped_rows": i})
        r.step(i, exp, {"policy": [{"loss": i / 3}, {"loss": i / 9}]})
        if (i + 1) % 2 == 0:
            with r.phase("evaluate"):
                r.evaluation(i + 1, {"reward": i / 11})
    return r.state()


def record_of(path: Path) -> dict[str, Any]:
    rows = {n: read(path / f"{n}.jsonl") for n in ("metrics", "samples", "evaluations")}
    return {n: [{k: v for k, v in r.items() if not k.startswith("time/")} for r in rs] for n, rs in rows.items()}


def test_a_resumed_record_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = recorder(tmp_path / "a")
    whole.start({}, None)
    whole.evaluation(0, {"reward": 0.0})
    steps(whole, 0, 6)
    whole.finish("finished")

    killed = recorder(tmp_path / "b")
    killed.start({}, None)
    killed.evaluation(0, {"reward": 0.0})
    saved = json.loads(json.dumps(steps(killed, 0, 3)))
    steps(killed, 3, 5)  # lost with the process
    with (tmp_path / "b" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "score/me')
    killed.rundir.release()

    out = io.StringIO()
    resumed = recorder(tmp_path / "b", out)
    resumed.start({}, saved)
    assert out.getvalue() == "2 rows after step 3 moved to metrics.discarded.jsonl; these steps run again\n"
    steps(resumed, 3, 6)
    resumed.finish("finished")

    assert record_of(tmp_path / "a") == record_of(tmp_path / "b")
    assert [r["step"] for r in record_of(tmp_path / "a")["metrics"]] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in record_of(tmp_path / "a")["evaluations"]] == [0, 2, 4, 6]
    last = record_of(tmp_path / "b")["metrics"][-1]
    assert last["policy/loss"] == (5 / 3 + 5 / 9) / 2 and last["select/dropped_rows"] == 5
    assert last["count/tokens_seen"] == 6 * 16
    assert [r["step"] for r in read(tmp_path / "b" / "metrics.discarded.jsonl")] == [4, 5]
    status = RunDir(tmp_path / "b").status()
    assert (status["status"], status["step"]) == ("finished", 6)


def test_a_start_without_checkpoint_moves_everything_aside(tmp_path: Path) -> None:
    first = recorder(tmp_path)
    first.start({}, None)
    first.evaluation(0, {"reward": 0.0})
    steps(first, 0, 2)
    first.rundir.release()
    again = recorder(tmp_path)
    again.start({}, None)
    assert record_of(tmp_path) == {"metrics": [], "samples": [], "evaluations": []}


def test_notes_are_kept_without_secrets(tmp_path: Path) -> None:
    out = io.StringIO()
    r = recorder(tmp_path, out)
    r.note("judge failed: api_key=abc123")
    assert out.getvalue() == "judge failed: api_key=<redacted>\n"
    assert (tmp_path / "logs" / "notes.log").read_text().endswith("step 0: judge failed: api_key=<redacted>\n")
    r.finish("failed", "ConfigError: token=abc")
    assert RunDir(tmp_path).status()["reason"] == "ConfigError: token=<redacted>"


def test_other_ranks_write_nothing_but_beat(tmp_path: Path) -> None:
    beat = Heartbeat(tmp_path, 1, 0)
    quiet = make_recorder(RunDir(tmp_path), {}, None, beat, 1, 2)
    assert isinstance(quiet, Quiet)
    quiet.start({}, None)
    with quiet.phase("update"):
        assert beat._phase == "update"
    quiet.step(0, experience(), {})
    quiet.note("x")
    quiet.evaluation(0, {})
    quiet.finish("finished")
    assert quiet.state() == {} and list(tmp_path.iterdir()) == []


def test_learner_names_must_not_hide_our_numbers(tmp_path: Path) -> None:
    r = recorder(tmp_path)
    r.start({}, None)
    with pytest.raises(AssertionError, match="a learner may not be named score"):
        r.step(0, experience(), {"score": [{"mean": 1.0}]})


def test_importing_the_record_is_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, rlhf_cli.record.recorder, rlhf_cli.record.checkpoint, rlhf_cli.record.provenance;"
        "print(sorted({'torch', 'wandb', 'tensorboard', 'rich', 'numpy', 'omegaconf'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
