"""A real SLURM, started here: submit, preempt, requeue, resume bit for bit, cancel, fail, and Hydra's own launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import e2e_support as e2e
import pytest
import slurm_cluster
from e2e_support import TINY, VALUES, Done, held

ABSENT = slurm_cluster.absent()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(ABSENT), reason=ABSENT)]
SLURM = ("launcher=slurm", "hardware=cpu")
RANKS = ("hardware.processes=2", "hardware.zero=2")
SLOW = f"time.sleep(0.3); {VALUES}"  # a moment to be stopped in
STEPS = 4


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which a cluster answers."""
    pytest.importorskip("submitit", reason="submitit is not installed; pip install 'rlhf-cli[slurm]'")
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture
def rlhf(slurm: dict[str, str], tmp_path: Path) -> Callable[..., Done]:
    """Run the command as a user of the cluster does."""
    return lambda *words: e2e.shell(*words, cwd=tmp_path, **slurm)


def job(run: Path) -> str:
    return json.loads((run / "job.json").read_text())["job"]


def queued(run: Path, slurm: dict[str, str]) -> str:
    """SLURM's state of a run's job, empty when it is over."""
    return slurm_cluster.tell(["squeue", "-h", "-o", "%T", "-j", job(run)], slurm).partition("\n")[0]


def over(run: Path, slurm: dict[str, str]) -> bool:
    return "PENDING" not in (now := queued(run, slurm)) and "RUNNING" not in now and "COMPLETING" not in now


def wait(happened: Callable[[], bool], run: Path, slurm: dict[str, str], limit: float = 480) -> None:
    """Until something happened; a job that ended before it is an error, with all that was printed."""
    end = time.monotonic() + limit
    while not happened():
        ended = over(run, slurm) and not happened()
        if ended or time.monotonic() > end:
            printed = {p.name: p.read_text(errors="replace")[-3000:] for p in (run / "logs").rglob("*") if p.is_file()}
            pytest.fail(f"{'the job ended' if ended else 'waited too long'}: {queued(run, slurm)} {printed}")
        time.sleep(0.2)


def wait_over(run: Path, slurm: dict[str, str]) -> None:
    wait(lambda: over(run, slurm), run, slurm)


def rows(run: Path) -> int:
    return len(e2e.jsonl(run / "metrics.jsonl"))


def reward(place: Path, body: str = SLOW) -> list[str]:
    return ["reward=python", e2e.python_reward(place / "mine.py", body)]


def test_a_preempted_job_is_requeued_and_equals_one_left_alone(
    rlhf: Callable[..., Done], slurm: dict[str, str], tmp_path: Path
) -> None:
    run, alone, hold = tmp_path / "runs" / "stopped", tmp_path / "runs" / "alone", tmp_path / "hold"
    hold.touch()
    mine = reward(tmp_path, held(run, hold))
    words = [*TINY, *RANKS, "hardware=cpu", f"steps={STEPS}", "optim.lr=0.001", *mine, "tracker=offline"]
    done = rlhf("train", *words, "launcher=slurm", "run.name=stopped")
    assert done.code == 0, done.err
    assert (
        done.out == f"rlhf: submitted job {job(run)}; the run is runs/stopped; follow it: rlhf logs runs/stopped -f\n"
    )
    assert rows(run) < STEPS, "it came back before the run ended"
    again = rlhf("train", *words, "launcher=slurm", "run.name=stopped")
    assert again.code == 2 and f"run stopped is being written by job {job(run)}" in again.err
    wait(lambda: rows(run) == 1, run, slurm)
    first = json.loads((run / "wandb" / "mirror.json").read_text())["id"]
    slurm_cluster.tell(["scancel", "--signal=USR1", job(run)], slurm)
    wait(lambda: "SIGUSR1: stopping after this step" in e2e.notes(run), run, slurm)
    hold.unlink()
    wait(lambda: queued(run, slurm) == "PENDING", run, slurm)
    stopped = e2e.status(run)
    assert (stopped["status"], stopped["reason"]) == ("preempted", "SIGUSR1") and 1 <= stopped["step"] < STEPS
    assert "requeued" in rlhf("runs").out.splitlines()[1].split()
    # SLURM holds a requeued job back for two minutes, until its old credential has expired
    slurm_cluster.tell(["scontrol", "update", f"JobId={job(run)}", "StartTime=now"], slurm)
    left_alone = rlhf("train", *words, "run.name=alone")
    assert left_alone.code == 0, left_alone.err
    wait_over(run, slurm)
    log = rlhf("logs", "runs/stopped").out
    assert f"requeued job {job(run)} (1 of at most 100 times)" in log
    assert f"resumed from step-{stopped['step']:06d}: {stopped['step']} of {STEPS} steps done" in log
    e2e.assert_same(alone, run)
    assert [r["step"] for r in e2e.jsonl(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    folders = [p.name.rpartition("-")[2] for p in (run / "wandb").glob("offline-run-*")]
    assert folders == [first, first], "one W&B run, written twice"
    table = rlhf("runs").out
    assert ["stopped", "finished", f"{STEPS}/{STEPS}"] == table.splitlines()[2].split()[:3] and job(run) in table
    assert rlhf("logs", "runs/stopped", "rank=1").code == 0 and (run / "logs" / "rank-1.log").exists()


def test_the_first_failing_rank_is_named_and_the_log_followed_to_its_end(
    rlhf: Callable[..., Done], slurm: dict[str, str], tmp_path: Path
) -> None:
    body = f"responses = responses[os.environ['RANK'] == '1' :]; {VALUES}"  # a number too few on rank 1
    run = tmp_path / "runs" / "broken"
    words = [*TINY, *SLURM, "hardware.processes=2", *reward(tmp_path, body), "run.name=broken"]
    assert rlhf("train", *words).code == 0
    followed = rlhf("logs", "runs/broken", "-f")
    assert followed.code == 0
    assert "rlhf: runs/broken: failed: rank 1: GateError: " in followed.err and "values for" in followed.err
    wait_over(run, slurm)
    assert "runs/broken: failed: rank 1: GateError: " in rlhf("runs").out
    assert "values for" in rlhf("logs", "runs/broken", "rank=1").out


def test_a_killed_rank_ends_the_job_and_is_named(
    rlhf: Callable[..., Done], slurm: dict[str, str], tmp_path: Path
) -> None:
    run, hold = tmp_path / "runs" / "killed", tmp_path / "hold"
    hold.touch()
    words = [*TINY, *SLURM, *RANKS, *reward(tmp_path, held(run, hold)), "run.name=killed"]
    assert rlhf("train", *words).code == 0
    wait(lambda: rows(run) == 1, run, slurm)
    os.kill(json.loads((run / "logs" / "heartbeat-rank-1.json").read_text())["pid"], signal.SIGKILL)
    wait_over(run, slurm)
    assert "runs/killed: failed: rank 1 was killed (SIGKILL); out of memory? see dmesg" in rlhf("runs").out


def test_cancel_saves_and_resume_submits_again(
    rlhf: Callable[..., Done], slurm: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "long"
    assert rlhf("train", *TINY, *SLURM, "steps=500", *reward(tmp_path), "run.name=long").code == 0
    wait(lambda: rows(run) >= 1, run, slurm)
    first = job(run)
    assert rlhf("cancel", "runs/long").out == f"rlhf: cancelled job {first}; to go on later: rlhf resume runs/long\n"
    wait_over(run, slurm)
    assert e2e.status(run)["status"] == "preempted" and "not requeued: cancelled" in rlhf("logs", "runs/long").out
    assert "runs/long: cancelled: rlhf resume runs/long" in rlhf("runs").out
    assert "nobody works on runs/long" in rlhf("cancel", "runs/long").err
    done_steps = e2e.status(run)["step"]
    slow = tmp_path / "bin" / "sbatch"  # SLURM takes its time; meanwhile the same is typed again
    slow.parent.mkdir()
    slow.write_text(
        f'#!/bin/sh\ntouch {tmp_path}/asked\nwhile ! [ -e {tmp_path}/go ]; do sleep 0.1; done\nexec {shutil.which("sbatch")} "$@"\n'
    )
    slow.chmod(0o755)
    words = ("resume", "runs/long", f"steps={done_steps + 1}")
    with ThreadPoolExecutor(1) as beside:
        path = {"PATH": f"{slow.parent}:{os.environ['PATH']}"}
        resumed = beside.submit(e2e.shell, *words, cwd=tmp_path, **slurm, **path)
        e2e.until((tmp_path / "asked").exists, process=None)
        twice = rlhf(*words)
        (tmp_path / "go").touch()
        assert resumed.result().code == 0, resumed.result().err
    assert twice.code == 2 and twice.err.startswith("rlhf: error: run long is being written by "), twice
    assert job(run) != first
    assert slurm_cluster.tell(["squeue", "-h", "--name=long", "-o", "%i"], slurm).split() == [job(run)]
    wait_over(run, slurm)
    assert e2e.status(run)["status"] == "finished" and rows(run) == done_steps + 1


def test_a_sweep_submits_every_point_at_once(rlhf: Callable[..., Done], slurm: dict[str, str], tmp_path: Path) -> None:
    words = ("train", "-m", *TINY, *SLURM, "steps=1", "seed=1,2", "launcher.sbatch.hold=true", "sweep.name=s")
    sweep = tmp_path / "runs" / "sweeps" / "s"
    done = rlhf(*words)
    assert done.code == 0 and "2 points: 2 submitted" in done.out, done.out + done.err
    points = [sweep / "seed=1", sweep / "seed=2"]
    jobs = [job(p) for p in points]
    assert [queued(p, slurm) for p in points] == ["PENDING", "PENDING"] and jobs[0] != jobs[1]
    again = rlhf(*words, "sweep.retry=true")
    assert again.code == 0 and "2 points: 2 submitted" in again.out, again.out + again.err
    assert f"seed=1 is submitted, skipped: job {jobs[0]} is pending" in again.out
    assert [job(p) for p in points] == jobs, "a point that waits is not submitted again"
    assert rlhf("cancel", str(points[1])).code == 0
    slurm_cluster.tell(["scontrol", "release", jobs[0]], slurm)
    wait_over(points[0], slurm)
    wait_over(points[1], slurm)
    last = rlhf(*words, "sweep.retry=true")
    assert "seed=1 is finished, skipped" in last.out and "2 points: 1 finished, 1 submitted" in last.out, last.out
    assert job(points[0]) == jobs[0] and job(points[1]) != jobs[1], "the cancelled one is submitted again"
    assert rlhf("cancel", str(points[1])).code == 0


def test_hydras_submitit_launcher_with_two_tasks_a_node(
    rlhf: Callable[..., Done], slurm: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=5"]
    words = ["train", "-m", *TINY, "hardware=cpu", "steps=1", *launcher]
    done = rlhf(*words, "hardware.processes=2", "seed=7,8")
    assert done.code == 0, done.err
    found = sorted((tmp_path / "runs").glob("grpo-bleu-*"))
    assert len(found) == 2
    for run in found:
        assert json.loads((run / "checkpoints" / "step-000001" / "state.json").read_text())["world"] == 2
        assert e2e.status(run)["status"] == "finished" and rows(run) == 1
    configs = "".join((run / "config.yaml").read_text() for run in found)
    wrong = rlhf(*words, "hardware.processes=3", "seed=9")  # a failure in a job must not look like success here
    assert wrong.code == 2 and "sweep point 1 ended with 2; its log lies in " in wrong.err
    log = next(tmp_path.glob("runs/sweeps/*/.submitit/*/*_0_log.err"))
    assert "hardware.processes=3: srun started 2 task(s) a machine" in "".join(
        p.read_text() for p in log.parent.parent.parent.parent.glob("*/.submitit/*/*_0_log.*")
    )
    assert "\nseed: 7\n" in f"\n{configs}" and "\nseed: 8\n" in f"\n{configs}"


def test_srun_in_a_batch_script_of_ones_own(slurm: dict[str, str], tmp_path: Path) -> None:
    def srun(*words: str) -> str:
        command = ["srun", "--ntasks=2", *e2e.command(*words)]
        environment = e2e.environment(**slurm)
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run = tmp_path / "runs" / "own"
    srun("train", *TINY, "steps=1", "run.name=own")
    shown = srun("resume", "runs/own", "steps=2")
    assert "resumed from step-000001: 1 of 2 steps done" in shown and rows(run) == 2
    assert json.loads((run / "checkpoints" / "step-000002" / "state.json").read_text())["world"] == 2


def test_sbatch_refuses_in_one_line(rlhf: Callable[..., Done]) -> None:
    done = rlhf("train", *TINY, *SLURM, "launcher.partition=nowhere", "run.name=refused")
    assert done.code == 2 and done.err.count("\n") == 1
    assert done.err.startswith("rlhf: error: SLURM refused the job: ") and "invalid partition" in done.err
