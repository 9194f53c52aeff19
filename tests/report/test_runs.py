"""`rlhf runs`: what each run is doing, from its files and the queue; the table in wide and narrow terminals."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli import cli
from rlhf_cli.errors import ConfigError
from rlhf_cli.launch.cancel import cancel
from rlhf_cli.launch.queue import Job
from rlhf_cli.record.rundir import RunDir
from rlhf_cli.report import runs
from rlhf_cli.report.runs import Seen

OLD, OWN, LATER = "11", "12", "2026-11-23T11:00:00+0000"


def made(path: Path, *, said: str = "", by: str = OWN, job: dict[str, str] | None = None, **status: Any) -> RunDir:
    rundir = RunDir(path).create()
    (path / "config.yaml").write_text("seed: 0\nsteps: 8\n")
    if said:
        rundir.write_json("status.json", {"status": said, "job": by, "host": socket.gethostname(), **status})
    if job is not None:
        rundir.write_json("job.json", {"job": OWN, "time": LATER, **job})
    return rundir


AGAIN = "rlhf resume {}"
CASES = {
    # what status.json says and of which job, job.json, the queue -> status, note
    "waiting": ("", OWN, {}, Job("PENDING", "Resources"), "queued", "Resources"),
    "loading": ("", OWN, {}, Job("RUNNING"), "starting", ""),
    "resumed": ("preempted", OLD, {}, Job("PENDING"), "queued", ""),
    "working": ("running", OWN, {}, Job("RUNNING"), "running", ""),
    "requeued": ("preempted", OWN, {}, Job("PENDING", "BeginTime"), "requeued", "BeginTime"),
    "waits for ever": (
        *("", OWN, {}, Job("PENDING", "PartitionTimeLimit"), "queued"),
        "PartitionTimeLimit; its partition allows less time: sinfo; rlhf cancel {0}, then rlhf resume {0} launcher.time=TIME",
    ),
    "stopping": ("preempted", OWN, {}, Job("COMPLETING"), "stopping", ""),
    "finished": ("finished", OWN, {}, None, "finished", ""),
    "failed": ("failed", OWN, {"reason": "boom"}, Job("FAILED"), "failed", "boom"),
    "failed and ends": ("failed", OWN, {"reason": "boom"}, Job("COMPLETING"), "failed", "boom"),
    "failed, job goes on": ("failed", OWN, {"reason": "boom"}, Job("RUNNING"), "failed", "boom"),
    "cancelled": ("preempted", OWN, {"cancelled": LATER}, Job("CANCELLED"), "cancelled", AGAIN),
    "scancelled": ("running", OWN, {}, Job("CANCELLED"), "cancelled", AGAIN),
    "cancelled while waiting": ("", OWN, {"cancelled": LATER}, None, "cancelled", AGAIN),
    "not requeued": ("preempted", OWN, {}, Job("FAILED"), "preempted", AGAIN),
    "node died": ("running", OWN, {}, Job("NODE_FAIL"), "lost", f"its job ended as node_fail; {AGAIN}"),
    "vanished": ("running", OWN, {}, None, "lost", f"its job is gone; {AGAIN}"),
    "time was up": ("running", OWN, {}, Job("TIMEOUT"), "lost", f"its job ended as timeout; {AGAIN}"),
}


@pytest.mark.parametrize("case", CASES)
def test_state_of_a_job(case: str, tmp_path: Path) -> None:
    said, by, more, job, status, note = CASES[case]
    reason = {"reason": more["reason"]} if "reason" in more else {}
    run = made(tmp_path / "a", said=said, by=by, job={k: v for k, v in more.items() if k != "reason"}, **reason)
    assert runs.state(run, {"12": job} if job else {}) == (status, note.format(run.path))


def test_a_failed_job_shows_its_first_rank_or_its_batch_script(tmp_path: Path) -> None:
    run = made(tmp_path / "a", job={})
    (run.logs / "slurm").mkdir()
    (run.logs / "slurm" / "12_0_log.out").write_text("submitit INFO x\nline 3: module: command not found\n")
    assert runs.state(run, {"12": Job("FAILED")}) == ("failed", "line 3: module: command not found")
    for rank, kind in ((1, "rlhf_cli.errors.GateError: no"), (0, "RuntimeError: the other side hung up")):
        (run.logs / f"rank-{rank}.error").write_text(f"Traceback\n{kind}\n")
        os.utime(run.logs / f"rank-{rank}.error", (100 - rank, 100 - rank))
    assert runs.state(run, {}) == ("failed", "rank 1: GateError: no")


JOB_LOG = """\
submitit INFO (2026-11-23 11:00:00,000) - Starting with JobEnvironment(job_id=12, hostname=a)
{}
slurmstepd-a: error: *** STEP 12.0 ON a CANCELLED AT 2026-11-23T11:00:09{} ***
srun: error: a: task 0: Terminated
srun: Force Terminated StepId=12.0
"""
KILLED = "srun: error: a: task 1: Killed"


@pytest.mark.parametrize(
    ("line", "why", "said"),
    [
        (KILLED, "", "rank 1 was killed (SIGKILL); out of memory? see dmesg"),
        ("srun: error: a: tasks 2-3: Out Of Memory", "", "rank 2 was killed: out of memory; raise launcher.memory"),
        (
            "srun: error: a: task 1: Segmentation fault (core dumped)",
            "",
            "rank 1 was killed (Segmentation fault (core dumped))",
        ),
        (
            f"srun: error: a: task 0: Exited with exit code 1\n{KILLED}",
            "",
            "rank 0: RuntimeError: Connection closed by peer",
        ),
        (KILLED, " DUE TO TIME LIMIT", "rank 0: RuntimeError: Connection closed by peer"),
    ],
)
def test_a_rank_that_a_signal_ended_is_named_by_srun(line: str, why: str, said: str, tmp_path: Path) -> None:
    run = made(tmp_path / "a", said="failed", job={})
    (run.logs / "slurm").mkdir()
    before = JOB_LOG.format("srun: error: a: task 7: Killed", "")  # another try of the same job
    runs.batch(run).write_text(before + JOB_LOG.format(line, why))
    run.error(0).write_text("Traceback\nRuntimeError: Connection closed by peer\n")
    assert runs.state(run, {"12": Job("FAILED")}) == ("failed", said)
    run.error(0).write_text("Traceback\nValueError: a cause of its own\n")
    assert runs.state(run, {"12": Job("FAILED")}) == ("failed", "rank 0: ValueError: a cause of its own")


def test_a_hang_is_told_before_the_deaths_that_followed_from_it(tmp_path: Path) -> None:
    run = made(tmp_path / "a", said="running", job={})
    (run.logs / "slurm").mkdir()
    runs.batch(run).write_text(JOB_LOG.format("srun: error: a: task 1: Quit (core dumped)", ""))
    run.silent.write_text("rank 0 silent for 9 s in phase update")
    run.error(0).write_text("Traceback\nRuntimeError: Connection closed by peer\n")
    os.utime(run.error(0), ns=(time.time_ns() + 10**9,) * 2)
    said = f"rank 0 silent for 9 s in phase update; stacks of every rank are in {run.logs}/rank-*.stacks"
    assert runs.state(run, {"12": Job("FAILED")}) == ("failed", said)
    run.error(1).write_text("Traceback\nValueError: first\n")
    os.utime(run.error(1), (1, 1))
    assert runs.state(run, {"12": Job("FAILED")}) == ("failed", "rank 1: ValueError: first")


def test_a_job_that_failed_before_its_ranks_could_speak_shows_its_last_error(tmp_path: Path) -> None:
    run = made(tmp_path / "a", job={})
    (run.logs / "slurm").mkdir()
    told = "Traceback (most recent call last):\n  x\nrlhf_cli.errors.ConfigError: port 15001 of a is taken"
    runs.batch(run).write_text(JOB_LOG.format(f"{told}\nsrun: error: a: task 0: Exited with exit code 1", ""))
    assert runs.state(run, {"12": Job("FAILED")}) == ("failed", "ConfigError: port 15001 of a is taken")


def test_a_queue_that_cannot_be_asked(tmp_path: Path) -> None:
    assert runs.state(made(tmp_path / "a", job={}), None) == ("submitted", "SLURM cannot be asked from here")
    assert runs.state(made(tmp_path / "b", said="finished", job={}), None) == ("finished", "")


def test_state_of_a_run_of_this_machine(tmp_path: Path) -> None:
    run = made(tmp_path / "a", said="running")
    assert runs.state(run, {}) == ("dead", f"rlhf resume {run.path}")
    run.claim()
    assert runs.state(run, {}) == ("running", "")
    run.release()
    far = made(tmp_path / "b", said="running", host="elsewhere")
    beat = far.logs / "heartbeat-rank-0.json"
    beat.write_text("{}")
    assert runs.state(far, {})[0] == "running"
    os.utime(beat, (time.time() - 100, time.time() - 100))
    assert runs.state(far, {})[0] == "dead"
    assert runs.state(made(tmp_path / "c"), {}) == ("not started", "")
    assert runs.state(made(tmp_path / "d", said="failed", reason="boom"), {}) == ("failed", "boom")


def rows(path: Path, *made_rows: dict[str, Any], torn: str = "") -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in made_rows) + torn)


def test_points_of_sweeps_are_found_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path / "sweep" / "seed=1", said="running")
    timed = [{"step": i, "score/mean": i / 10, "time/step": 2.0, "time/between": 1.0} for i in (1, 2, 3)]
    rows(run.path / "metrics.jsonl", *timed, torn='{"step": 4, "score')
    run.claim()
    rows(made(tmp_path / "old", said="finished").path / "evaluations.jsonl", {"step": 0, "eval/reward": 0.25})
    os.utime(tmp_path / "old" / "config.yaml", (5, 5))
    (tmp_path / "sweep" / "seed=1" / "checkpoints" / "x" / "logs").mkdir(parents=True)
    (tmp_path / "sweep" / "seed=1" / "checkpoints" / "x" / "config.yaml").write_text("")
    new, old = runs.look(tmp_path)
    assert (new.path, new.status, new.step, new.steps, new.reward) == (run.path, "running", 3, 8, 0.3)
    assert new.left == 5 * 3.0  # five steps of two seconds, and a second between them
    assert (old.path.name, old.reward, old.left) == ("old", 0.25, None)
    run.release()


def seen(name: str, status: str, note: str = "") -> Seen:
    return Seen(Path("runs") / name, status, note, 5, 80, 0.25, "1234", 1000.0, 90.0 if status == "running" else None)


def test_table_wide_and_narrow() -> None:
    shown = [
        seen("grpo-bleu-20261123-101010", "running"),
        seen("b", "dead", "rlhf resume runs/b"),
        seen("c", "queued", "Priority"),
    ]
    assert runs.table(shown, Path("runs"), 200, 1060.0) == [
        "run                        status   step  reward  job   age         left",
        "grpo-bleu-20261123-101010  running  5/80  0.2500  1234  1 min 00 s  1 min 30 s",
        "b                          dead     5/80  0.2500  1234  1 min 00 s",
        "c                          queued   5/80  0.2500  1234  1 min 00 s",
        "",
        "runs/b: dead: rlhf resume runs/b",
        "runs/c: queued (Priority)",
    ]
    for width in (20, 30, 45, 60, 80):
        lines = runs.table(shown, Path("runs"), width, 1060.0)
        assert max(map(len, lines)) <= width
        assert lines[0].split()[:2] == ["run", "status"] and lines[1].startswith("grpo-")
    assert runs.table([], Path("runs"), 80, 0.0) == ["no runs in runs; rlhf train makes one"]


def test_verbs_refuse_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "runs" / "a", said="finished")
    expected = {
        ("runs", "nowhere"): "runs: no folder nowhere here; type rlhf runs DIR, or rlhf train to make one",
        ("runs", "a", "b"): "runs: takes one DIR at most, got a b",
        ("logs",): "logs: takes one run; type rlhf logs RUN, e.g. rlhf logs runs/NAME",
        ("logs", "runs"): "logs: runs is no run directory (no config.yaml in it); rlhf runs lists them",
        ("logs", "runs/a", "rank=x"): "logs: rank=x: type a number, e.g. rank=1",
        ("cancel", "runs/a"): "cancel: nobody works on runs/a; rlhf runs shows what it is",
    }
    for words, message in expected.items():
        assert cli.main(list(words)) == 2
        assert capsys.readouterr().err == f"rlhf: error: {message}\n"


def test_cancel_asks_the_writer_on_this_machine_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path / "a", said="running")
    code = "import sys, time; from rlhf_cli.record.rundir import RunDir; r = RunDir(sys.argv[1]); r.claim(); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline()
        assert cli.main(["cancel", str(run.path)]) == 0
        assert writer.wait(60) == -signal.SIGTERM
    assert capsys.readouterr().out.startswith(f"rlhf: asked process {writer.pid} to stop after its step")


def test_cancel_of_a_run_that_ends_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path / "a", said="running")
    gone = f"{run.path} has just ended; rlhf runs shows how"
    for text in (json.dumps({"pid": 1 << 22, "host": socket.gethostname()}), ""):  # no such process; not yet written
        (run.path / ".lock").write_text(text)
        seen = iter(["pid 7 on host a", None])
        monkeypatch.setattr(RunDir, "writer", lambda self, seen=seen: next(seen))
        assert cancel(run) == gone
    monkeypatch.setattr(RunDir, "writer", lambda self: "another process")
    with pytest.raises(ConfigError, match=r"cancel: .*a is just starting; type it again"):
        cancel(run)
    word = '{"pid": 7, "host": "elsewhere"}'  # the writer's, a moment later
    monkeypatch.setattr(time, "sleep", lambda seconds: seconds and (run.path / ".lock").write_text(word))
    with pytest.raises(ConfigError, match=r"runs on elsewhere; type rlhf cancel .*a there"):
        cancel(run)


def test_watch_refreshes_in_place_and_ends_with_the_table(tmp_path: Path) -> None:
    made(tmp_path / "a", said="finished")
    main, child = pty.openpty()
    words = [sys.executable, "-m", "rlhf_cli.cli", "runs", str(tmp_path), "--watch"]
    with subprocess.Popen(
        words, stdin=child, stdout=child, stderr=child, env=os.environ | {"TERM": "xterm"}
    ) as process:
        os.close(child)
        out = b""
        while b"finished" not in out:
            out += os.read(main, 4096)
        assert b"\x1b[?1049h" in out, "the second screen"
        process.send_signal(signal.SIGINT)
        rest = b""
        try:
            while part := os.read(main, 4096):
                rest += part
        except OSError:  # the other end is closed
            pass
        assert process.wait(60) == 0
    left, _, after = rest.partition(b"\x1b[?1049l")
    assert b"finished" in after and b"Traceback" not in left + after


def test_logs_before_the_ranks_begin_leave_out_submitits_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path / "a", job={})
    (run.logs / "slurm").mkdir()
    (run.logs / "slurm" / "12_0_log.out").write_text("loading modules\nsubmitit INFO (now) - Starting with x\n")
    assert cli.main(["logs", str(run.path)]) == 0
    assert capsys.readouterr().out == "loading modules\n"


def test_logs_of_a_finished_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path / "a", said="finished")
    (run.logs / "rank-1.log").write_text("one\ntwo\n")
    assert cli.main(["logs", str(run.path), "rank=1", "-f"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "one\ntwo\n" and shown.err == f"rlhf: {run.path}: finished\n"
    (run.logs / "notes.log").write_text("a note\n")
    assert cli.main(["logs", str(run.path)]) == 0
    assert capsys.readouterr().out == "a note\n"
