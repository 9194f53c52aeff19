"""A task of srun finds its place in the environment alone."""

from __future__ import annotations

import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.launch import queue, step
from rlhf_cli.launch.queue import Job
from rlhf_cli.record import checkpoint
from rlhf_cli.record.rundir import RunDir

TASK = {
    "SLURM_JOB_ID": "30007", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_CPUS_ON_NODE": "48", "SLURM_RESTART_COUNT": "2",
}  # fmt: skip


def test_several_tasks_are_ranks_and_one_is_not() -> None:
    assert step.here({}) is None
    assert step.here({"SLURM_JOB_ID": "3", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None, "a batch script"
    alone = {**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0"}
    assert step.here(alone) is None, "srun rlhf train, an ordinary run"
    assert step.here({**alone, "SUBMITIT_EXECUTOR": "slurm"}) is not None
    found = step.here(TASK)
    assert found is not None
    assert (found.rank, found.world, found.nodes, found.restarts, found.threads) == (5, 8, 2, 2, 12)
    assert step.here({**TASK, "SLURM_CPUS_PER_TASK": "6"}).threads == 6  # type: ignore[union-attr]
    array = {**TASK, "SLURM_ARRAY_JOB_ID": "30001", "SLURM_ARRAY_TASK_ID": "3"}
    assert step.here(array).job == "30001_3"  # type: ignore[union-attr]


def test_rendezvous_is_the_first_host_and_a_port_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(queue, "hosts", lambda nodes: asked.append(nodes) or ["gpu03", "gpu04"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    found = step.here(TASK)
    assert found is not None
    assert found.environment() == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03", "MASTER_PORT": str(15_000 + 7),
    }  # fmt: skip
    assert asked == ["gpu[03-04]"]
    beside = step.here(TASK | {"SLURM_STEP_ID": "2"})  # srun ... & srun ... & wait
    assert beside is not None and beside.environment()["MASTER_PORT"] == str(15_000 + 7 + 2 * 101)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # --gpus-per-task=1: a task sees its own only
    assert found.environment()["LOCAL_RANK"] == "0"


def test_a_taken_port_is_refused_in_one_line() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            ConfigError, match=r"port \d+ of .*, where the ranks of this job meet, is taken .*submit again"
        ):
            step._refuse_taken(port)
    step._refuse_taken(port)


def test_hardware_is_what_srun_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = step.here(TASK)
    assert found is not None
    cfg = compose("train", [], None)
    hw = step.hardware(cfg, found)
    assert (cfg.hardware.nodes, hw["processes"], hw["threads"], hw["device"]) == (2, 4, 12, "cpu")
    with pytest.raises(ConfigError, match=r"hardware.processes=3: srun started 4"):
        step.hardware(compose("train", ["hardware.processes=3"], None), found)


@pytest.mark.parametrize(
    ("srun", "together"),
    [
        (["srun", "-n2", "rlhf"], False),
        (["srun", "-K", "rlhf"], True),
        (["srun", "-lK1", "rlhf"], True),
        (["srun", "--kill-on-bad-exit=1", "rlhf"], True),
        (["srun", "--kill-on-bad-exit=0", "rlhf"], False),
        (["srun", "-K0", "rlhf"], False),
    ],
)
def test_a_step_whose_ranks_would_wait_for_a_killed_one_is_told_from_srun(
    srun: list[str], together: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"step": "", "config": "KillOnBadExit           = 0\n"}
    monkeypatch.setattr(queue, "_said", lambda *words: answers[words[2]])
    monkeypatch.delenv("SLURM_KILL_BAD_EXIT", raising=False)
    found = step.here({**TASK, "SLURM_PROCID": "0"})
    assert found is not None
    pipe = subprocess.PIPE
    with subprocess.Popen(["sh", "-c", "echo here; read line", *srun], stdin=pipe, stdout=pipe) as p:
        assert p.stdout is not None and p.stdout.readline()  # its command line stands
        answers["step"] = f"   SrunHost:Pid={socket.gethostname()}:{p.pid}\n"
        step.warn_of_waiting(found)
        p.kill()
    said = capsys.readouterr().err
    assert (said == "") is together, said
    if not together:
        assert said.startswith("rlhf: warning: ") and "type srun --kill-on-bad-exit=1" in said
        step.warn_of_waiting(step.here(TASK))  # type: ignore[arg-type]
        answers["config"] = "KillOnBadExit           = 1\n"
        step.warn_of_waiting(found)
        monkeypatch.setenv("SLURM_KILL_BAD_EXIT", "1")
        answers["config"] = ""
        step.warn_of_waiting(found)
        assert capsys.readouterr().err == "", "rank 0 alone speaks, and not where SLURM is told otherwise"


SILENT = "scontrol is not here or does not answer"


def asked(monkeypatch: pytest.MonkeyPatch, answers: list[str], states: list[str]) -> tuple[list[str], list[float]]:
    """SLURM that answers `answers` to requeues, and shows `states` when it is asked for the job's; what was asked and waited for."""
    jobs: list[str] = []
    waited: list[float] = []
    monkeypatch.setattr(step.time, "sleep", waited.append)
    monkeypatch.setattr(queue, "requeue", lambda job: jobs.append(job) or answers[len(jobs) - 1])
    shown = iter(states)
    monkeypatch.setattr(queue, "jobs", lambda ids: {"7": Job(next(shown))})
    return jobs, waited


def test_a_busy_slurm_is_asked_again_to_requeue(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, waited = asked(monkeypatch, [SILENT, SILENT, ""], ["RUNNING"] * 3)
    assert step._requeue("7") == "" and jobs == ["7"] * 3 and waited == [0.0, 5.0, 15.0]
    jobs, _ = asked(monkeypatch, [SILENT] * 3, ["RUNNING"] * 3)
    assert step._requeue("7") == SILENT and len(jobs) == 3
    jobs, _ = asked(monkeypatch, [SILENT], ["PENDING"])
    assert step._requeue("7") == "" and len(jobs) == 1, "the answer was lost, not the request"
    jobs, _ = asked(monkeypatch, ["Job can not be altered"], ["CANCELLED"])
    assert step._requeue("7") == "Job can not be altered" and len(jobs) == 1


def test_a_time_limit_before_the_first_step_is_not_met_a_hundred_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = replace(step.here({**TASK, "SLURM_PROCID": "0"}), job="7")  # type: ignore[type-var]
    run = RunDir(tmp_path / "a").create()
    run.set_job("7")

    def why(signal: str) -> str:
        asked(monkeypatch, [""], ["RUNNING"] * 2)
        return step._why_not(run, task, 100, signal)

    said = "2 tries came to their time limit before their first step was done; raise launcher.time"
    assert why("SIGUSR1") == ""
    assert why("SIGTERM") == "", "who comes first may be preempted as often as others like"
    assert why("SIGUSR1") == said and run.job()["job"] == "7"
    run.prepass.write_text("{}")
    assert why("SIGUSR1") == "", "a prepass gets on without checkpoints"
    assert why("SIGUSR1") == ""
    checkpoint.save(run.checkpoints, 5, lambda p: (p / "a").write_text("x") and None, keep=1)
    assert [why("SIGUSR1") for _ in range(3)] == ["", "", said]
