"""The engine: what runs, what is skipped, what goes on, with a stand-in for `rlhf train`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import ConfigError
from rlhf_cli.launch import queue
from rlhf_cli.launch.queue import Job
from rlhf_cli.record.rundir import RunDir
from rlhf_cli.sweep import run

STUB = Path(__file__).parent / "sweep_stub.py"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "start_command", lambda argv: [sys.executable, str(STUB), *argv])


def sweep(*words: str) -> int:
    return run.sweep(["sweep.name=s", *words], None)


def record() -> dict[str, Any]:
    return json.loads(Path("runs/sweeps/s/sweep.json").read_text())


def states() -> list[str]:
    return [p["status"] for p in record()["points"]]


def rows(name: str) -> list[dict[str, Any]]:
    path = Path("runs/sweeps/s") / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def starts() -> list[str]:
    return [r["point"] for r in rows("starts.jsonl")]


def test_a_sweep_runs_every_point_and_writes_it_down(capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep("algo=grpo,rloo", "seed=1,2") == 0
    made = record()
    expected = ["algo=grpo,seed=1", "algo=grpo,seed=2", "algo=rloo,seed=1", "algo=rloo,seed=2"]
    assert [p["name"] for p in made["points"]] == expected == starts()
    assert states() == ["finished"] * 4
    first = made["points"][0]
    assert first["overrides"] == ["algo=grpo", "seed=1"] and first["tries"] == 1 and first["seconds"] > 0
    assert first["command"] == ("rlhf train algo=grpo seed=1 run.dir='runs/sweeps/s' run.name='algo=grpo,seed=1'")
    assert made["command"] == "rlhf train -m sweep.name=s algo=grpo,rloo seed=1,2"
    out = capfd.readouterr().out
    assert "4 points: 4 finished" in out
    assert "algo=rloo,seed=2 finished" in out and "eval/reward 1.02 -> 2.02" in out
    assert "algo=grpo" in out.split("eval/reward\n")[1], "the table comes last"


def test_finished_points_are_skipped(capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep("seed=1,2") == 0
    assert sweep("seed=1,2") == 0
    assert starts() == ["seed=1", "seed=2"]
    assert "seed=1 is finished, skipped" in capfd.readouterr().out
    assert sweep("algo=grpo", "seed=1,2", "sweep.name=t") == sweep("seed=1,2", "algo=grpo", "sweep.name=t") == 0
    assert len(Path("runs/sweeps/t/starts.jsonl").read_text().splitlines()) == 2, "the order of words is no matter"


def test_one_failure_does_not_stop_the_rest_and_is_retried_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep("seed=13,1") == 1
    assert states() == ["failed", "finished"]
    assert record()["points"][0]["error"] == "seed 13 is unlucky"
    out = capfd.readouterr().out
    assert "failed: seed=13: seed 13 is unlucky (runs/sweeps/s/seed=13/logs/output.log)" in out
    assert "run the failed ones again with: rlhf train -m sweep.name=s seed=13,1 sweep.retry=true" in out
    assert sweep("seed=13,1") == 1, "not again without being asked"
    assert starts() == ["seed=13", "seed=1"]
    assert "seed=13 is failed, skipped; sweep.retry=true runs it again" in capfd.readouterr().out
    Path("runs/sweeps/s/mended").touch()
    assert sweep("seed=13,1", "sweep.retry=true") == 0
    assert states() == ["finished", "finished"] and record()["points"][0]["tries"] == 2
    assert starts() == ["seed=13", "seed=1", "seed=13"]


def test_a_point_that_hung_failed_and_one_that_was_cancelled_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep("seed=75,1") == 1
    assert states() == ["failed", "finished"]
    assert record()["points"][0]["error"] == "rank 0 silent for 9 s in phase update"
    assert sweep("seed=75,1") == 1 and starts() == ["seed=75", "seed=1"], "it would hang again, so not unasked"
    capfd.readouterr()
    assert sweep("seed=76,1", "sweep.name=t") == 75
    out = capfd.readouterr().out
    assert "2 points: 1 finished, 1 interrupted" in out
    assert "stopped on the way: seed=76; go on with: rlhf train -m sweep.name=s seed=76,1 sweep.name=t" in out


def test_a_failure_of_an_earlier_try_is_not_this_ones(tmp_path: Path) -> None:
    point = RunDir(tmp_path / "a").create()
    point.write_json("status.json", {"status": "failed", "reason": "x"})
    assert run.ended(75, point, point.status(), asked=False) == "interrupted"
    assert run.ended(75, point, {}, asked=True) == "failed"


def test_a_wrong_point_starts_none(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"seed=x: wanted int"):
        sweep("seed=1,x")
    with pytest.raises(ConfigError, match=r"sweep.paralel: unknown key; did you mean 'parallel'"):
        sweep("seed=1,2", "sweep.paralel=2")
    assert not Path("runs").exists()


def test_parallel_points_run_side_by_side() -> None:
    hold = held("seed=1")
    thread = when("seed=2/metrics.jsonl", hold.unlink)
    assert sweep("seed=1,2,3", "sweep.parallel=2") == 0
    thread.join()
    began, ended = ({r["point"]: r["at"] for r in rows(n)} for n in ("starts.jsonl", "ends.jsonl"))
    assert began["seed=2"] < ended["seed=1"], "the second does not wait for the first"
    assert began["seed=3"] > min(ended["seed=1"], ended["seed=2"]), "the third waits for a free place"
    cores = sorted(os.sched_getaffinity(0))
    used = [tuple(r["cores"]) for r in rows("starts.jsonl")[:2]]
    assert len(cores) == 1 or (not set(used[0]) & set(used[1]) and sorted(used[0] + used[1]) == cores)


def held(point: str = "") -> Path:
    """A file; while it is there, a point (any point) stands still after a step until it is asked to stop."""
    hold = Path(f"runs/sweeps/s/hold{point and '-'}{point}")
    hold.parent.mkdir(parents=True)
    hold.touch()
    return hold


def when(path: str, do: Callable[[], object]) -> threading.Thread:
    """Do something once a file has content."""

    def wait() -> None:
        file, end = Path("runs/sweeps/s") / path, time.monotonic() + 120
        while not (file.exists() and file.stat().st_size) and time.monotonic() < end:
            time.sleep(0.01)
        do()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def stop_when(path: str, number: int = signal.SIGINT) -> threading.Thread:
    """Send this process a signal once a file has content."""
    return when(path, lambda: os.kill(os.getpid(), number))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_goes_on_where_it_was(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    hold = held("seed=2")
    thread = stop_when("seed=2/metrics.jsonl", number)
    assert sweep("seed=1,2,3", "steps=8") == 75
    thread.join()
    hold.unlink()
    assert states() == ["finished", "interrupted", "waiting"]
    assert len(rows("seed=2/metrics.jsonl")) == 1
    out = capfd.readouterr().out
    assert "go on with: rlhf train -m sweep.name=s seed=1,2,3 steps=8" in out
    assert "seed=2 write their checkpoints and end" in out
    assert signal.getsignal(signal.SIGINT) == before
    assert sweep("seed=1,2,3", "steps=8") == 0
    assert starts() == ["seed=1", "seed=2", "seed=2", "seed=3"]
    assert [r["step"] for r in rows("seed=2/metrics.jsonl")] == list(range(1, 9)), "it resumed and did not begin again"
    assert record()["points"][1]["tries"] == 2
    assert "seed=2 goes on" in capfd.readouterr().out


def test_points_end_when_the_sweep_is_killed() -> None:
    hold = held("seed=1")
    code = (
        f"import sys; from rlhf_cli.sweep import run; run.start_command = lambda a: [sys.executable, {str(STUB)!r}, *a]; "
        "run.sweep(['sweep.name=s', 'seed=1,2', 'steps=9'], None)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    while not rows("seed=1/metrics.jsonl"):
        time.sleep(0.02)
    process.kill()
    process.wait()
    status = Path("runs/sweeps/s/seed=1/status.json")
    end = time.monotonic() + 120
    while not status.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert json.loads(status.read_text())["status"] == "preempted"
    assert states() == ["running", "waiting"], "nobody was left to write it down"
    hold.unlink()
    assert sweep("seed=1,2", "steps=9") == 0
    assert states() == ["finished", "finished"] and [p["tries"] for p in record()["points"]] == [2, 1]
    assert [r["step"] for r in rows("seed=1/metrics.jsonl")] == list(range(1, 10))


def test_another_definition_under_the_same_name_is_refused() -> None:
    assert sweep("seed=1") == 0
    with pytest.raises(ConfigError) as e:
        sweep("seed=1,2")
    assert str(e.value) == (
        "sweep runs/sweeps/s is defined otherwise (-seed=1 +seed=1,2); choose another sweep.name, "
        "or continue it with: rlhf train -m sweep.name=s seed=1"
    )


def test_two_processes_do_not_run_one_sweep() -> None:
    Path("runs/sweeps/s").mkdir(parents=True)
    other = RunDir("runs/sweeps/s")
    other.claim()
    with pytest.raises(ConfigError, match=r"sweep runs/sweeps/s is being run by pid \d+ on host"):
        sweep("seed=1,2")
    other.release()


def test_the_record_is_read_under_the_lock_and_an_error_lets_go(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def opened(path: Path, *_: object) -> None:
        seen.append(RunDir(path).writer())
        raise ConfigError("defined otherwise")

    monkeypatch.setattr(run.Record, "open", opened)
    with pytest.raises(ConfigError, match="defined otherwise"):
        sweep("seed=1")
    assert seen[0] is not None and RunDir("runs/sweeps/s").writer() is None


def test_a_point_handed_to_a_queue_is_submitted_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep("seed=7,1") == 0
    assert states() == ["submitted", "finished"]
    assert sweep("seed=7,1") == 0
    assert starts() == ["seed=7", "seed=1"]
    assert "seed=7 is submitted, skipped; sweep.retry=true submits it again" in capfd.readouterr().out
    Path("runs/sweeps/s/seed=7/status.json").write_text('{"status": "finished"}')  # the queue got there
    assert sweep("seed=7,1") == 0
    assert states() == ["finished", "finished"]


def test_a_submitted_point_is_not_started_again_unasked(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = {"5": Job("RUNNING")}
    monkeypatch.setattr(queue, "jobs", lambda ids: {i: jobs[i] for i in ids if i in jobs})
    monkeypatch.setattr(queue, "present", lambda: True)
    assert sweep("seed=7,1") == 0
    point = RunDir("runs/sweeps/s/seed=7").create()
    point.write_json("job.json", {"job": "5"})
    point.write_json("status.json", {"status": "running", "step": 1, "job": "5"})
    point.claim()
    for more in ([], ["sweep.retry=true"]):
        assert sweep("seed=7,1", *more) == 0
        assert states() == ["submitted", "finished"], "its job works, and the record keeps whose it is"
        assert "seed=7 is submitted, skipped: job 5 is running" in capfd.readouterr().out
    jobs.clear()
    assert sweep("seed=7,1", "sweep.retry=true") == 0
    assert "seed=7 is submitted, skipped: pid " in capfd.readouterr().out
    point.release()
    point.write_json("status.json", {"status": "preempted", "step": 1, "job": "5"})
    jobs["5"] = Job("CANCELLED")
    assert sweep("seed=7,1") == 0
    assert states() == ["submitted", "finished"]
    assert "seed=7 is submitted (cancelled), skipped; sweep.retry=true submits it again" in capfd.readouterr().out
    (point.path / "status.json").unlink()
    (point.logs / "slurm").mkdir()
    (point.logs / "slurm" / "5_0_log.out").write_text("line 3: module: command not found\n")
    jobs["5"] = Job("FAILED")
    assert sweep("seed=7,1") == 1
    assert states() == ["failed", "finished"]
    assert "  failed: seed=7: line 3: module: command not found (" in capfd.readouterr().out
    assert starts() == ["seed=7", "seed=1"], "never once without being asked"
    assert sweep("seed=7,1", "sweep.retry=true") == 0
    assert starts() == ["seed=7", "seed=1", "seed=7"]


def test_a_point_that_was_stopped_after_it_had_been_handed_over_is_submitted(tmp_path: Path) -> None:
    point = RunDir(tmp_path / "a").create()
    assert run.ended(-signal.SIGTERM, point, {}, asked=True) == "interrupted"
    point.write_json("job.json", {"job": "5"})
    assert run.ended(-signal.SIGTERM, point, {}, asked=True) == "submitted"
    assert run.ended(-signal.SIGKILL, point, {}, asked=False) == "failed"


def test_other_sweepers_and_launchers_go_to_hydra() -> None:
    assert run.ours(["seed=1,2"]) == ["seed=1,2"]
    assert run.ours(["hydra/launcher=joblib", "seed=1,2"]) is None
    assert run.ours(["hydra/sweeper=nevergrad", "seed=1,2"]) is None
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.direction=minimize", "seed=1,2"]
    assert run.ours(words) == ["hydra/sweeper=optuna", "sweep.trials=4", "sweep.direction=minimize", "seed=1,2"]
    with pytest.raises(ConfigError, match=r"hydra.sweeper.storage=x: not a setting of the search; settings: hydra"):
        run.ours(["hydra/sweeper=optuna", "hydra.sweeper.storage=x"])
