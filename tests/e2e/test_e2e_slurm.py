"""A real SLURM, started here: submit, preempt, requeue, resume bit for bit, cancel, fail, and Hydra's own launcher."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import e2e_support as e2e
import pytest
import slurm_cluster
from e2e_support import TINY, Done

ABSENT = slurm_cluster.absent()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.skipif(bool(ABSENT), reason=ABSENT),
]
SLURM = ("launcher=slurm", "hardware=cpu")
RANKS = ("hardware.processes=2", "hardware.zero=2")
SLOW = "time.sleep(0.3); values = [sum(map(ord, r)) % 7 / 7 for r in responses]"  # a moment to be stopped in
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


def rows(run: Path) -> int:
    return len(e2e.jsonl(run / "metrics.jsonl"))


def reward(place: Path, body: str = SLOW) -> list[str]:
    return ["reward=python", e2e.python_reward(place / "mine.py", body)]


def test_a_preempted_job_is_requeued_and_equals_one_left_alone(
    rlhf: Callable[..., Done], slurm: dict[str, str], tmp_path: Path
) -> None:
    words = [*TINY, *RANKS, "hardware=cpu", f"steps={STEPS}", "optim.lr=0.001", *reward(tmp_path), "tracker=offline"]
    run, alone = tmp_path / "runs" / "stopped", tmp_path / "runs" / "alone"
    began = time.monotonic()
    done = rlhf("train", *words, "launcher=slurm", "run.name=stopped")
    assert done.code == 0, done.err
    assert (
        done.out == f"rlhf: submitted job {job(run)}; the run is runs/stopped; follow it: rlhf logs runs/stopped -f\n"
    )
    assert time.monotonic() - began < 20 and rows(run) < STEPS, "it came back before the run ended"
    again = rlhf("train", *words, "launcher=slurm", "run.name=stopped")
    assert again.code == 2 and f"run stopped is being written by job {job(run)}" in again.err
    e2e.until(lambda: rows(run) >= 1, process=None)
    first = json.loads((run / "wandb" / "mirror.json").read_text())["id"]
    slurm_cluster.tell(["scancel", "--signal=USR1", job(run)], slurm)
    e2e.until(lambda: queued(run, slurm) == "PENDING", process=None)
    stopped = e2e.status(run)
    assert (stopped["status"], stopped["reason"]) == ("preempted", "SIGUSR1") and 1 <= stopped["step"] < STEPS
    assert "requeued" in rlhf("runs").out.splitlines()[1].split()
    # SLURM holds a requeued job back for two minutes, until its old credential has expired
    slurm_cluster.tell(["scontrol", "update", f"JobId={job(run)}", "StartTime=now"], slurm)
    left_alone = rlhf("train", *words, "run.name=alone")
    assert left_alone.code == 0, left_alone.err
    e2e.until(lambda: over(run, slurm), process=None)
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
    body = "values = [1 / (os.environ['RANK'] == '0') + i for i, r in enumerate(responses)]"
    run = tmp_path / "runs" / "broken"
    words = [*TINY, *SLURM, "hardware.processes=2", *reward(tmp_path, body), "run.name=broken"]
    assert rlhf("train", *words).code == 0
    followed = rlhf("logs", "runs/broken", "-f")
    assert followed.code == 0
    assert "rlhf: runs/broken: failed: rank 1: GateError: " in followed.err and "ZeroDivisionError" in followed.err
    assert over(run, slurm)
    assert "runs/broken: failed: rank 1: GateError: " in rlhf("runs").out
    assert "ZeroDivisionError" in rlhf("logs", "runs/broken", "rank=1").out


def test_cancel_saves_and_resume_submits_again(
    rlhf: Callable[..., Done], slurm: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "long"
    assert rlhf("train", *TINY, *SLURM, "steps=500", *reward(tmp_path), "run.name=long").code == 0
    e2e.until(lambda: rows(run) >= 1, process=None)
    first = job(run)
    assert rlhf("cancel", "runs/long").out == f"rlhf: cancelled job {first}; to go on later: rlhf resume runs/long\n"
    e2e.until(lambda: over(run, slurm), process=None)
    assert e2e.status(run)["status"] == "preempted" and "not requeued: cancelled" in rlhf("logs", "runs/long").out
    assert "runs/long: cancelled: rlhf resume runs/long" in rlhf("runs").out
    assert "nobody works on runs/long" in rlhf("cancel", "runs/long").err
    done_steps = e2e.status(run)["step"]
    assert rlhf("resume", "runs/long", f"steps={done_steps + 1}").code == 0
    assert job(run) != first
    e2e.until(lambda: over(run, slurm), process=None)
    assert e2e.status(run)["status"] == "finished" and rows(run) == done_steps + 1


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
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
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
