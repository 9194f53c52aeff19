"""A real SLURM, started here: submit, preempt, requeue, resume bit for bit, cancel, fail, and Hydra's own launcher."""

from __future__ import annotations

import importlib.util
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
    """SLURM's state of a run's job, empty when it is over. A SLURM that does not answer is asked again."""
    while True:
        asked = ["squeue", "-h", "-o", "%T", "-j", job(run)]
        done = subprocess.run(asked, env=os.environ | slurm, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.partition("\n")[0]
        assert "Invalid job id" not in done.stderr, "jobs are remembered for longer than a test takes"
        time.sleep(0.5)


def over(run: Path, slurm: dict[str, str]) -> bool:
    return queued(run, slurm) == ""


def scontrol(slurm: dict[str, str], *words: str) -> None:
    subprocess.run(["scontrol", *words], env=os.environ | slurm, capture_output=True, check=True)


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


EXACT = (*TINY, *RANKS, f"steps={STEPS}", "optim.lr=0.001", "tracker=offline")


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stops."""
    place = tmp_path_factory.mktemp("alone")
    done = e2e.shell("train", *EXACT, "hardware=cpu", *reward(place, VALUES), "run.name=alone", cwd=place)
    assert done.code == 0, done.err
    return place / "runs" / "alone"


def begun(rlhf: Callable[..., Done], slurm: dict[str, str], place: Path, *words: str) -> Path:
    """The same run, submitted, standing still after its first step."""
    run = place / "runs" / "stopped"
    (place / "hold").touch()
    mine = reward(place, held(run, place / "hold"))
    done = rlhf("train", *EXACT, *SLURM, *mine, "run.name=stopped", *words)
    assert done.code == 0, done.err
    assert (
        done.out == f"rlhf: submitted job {job(run)}; the run is runs/stopped; follow it: rlhf logs runs/stopped -f\n"
    )
    again = rlhf("train", *EXACT, *SLURM, *mine, "run.name=stopped", *words)
    assert again.code == 2 and f"run stopped is being written by job {job(run)}" in again.err
    wait(lambda: rows(run) >= 1, run, slurm)
    return run


def goes_on(rlhf: Callable[..., Done], slurm: dict[str, str], run: Path, alone: Path, why: str) -> None:
    """A run that a signal asked to stop saves, is requeued, goes on under the same names, and equals one left alone."""
    tracked = json.loads((run / "wandb" / "mirror.json").read_text())["id"]
    wait(lambda: f"{why}: stopping after this step" in e2e.notes(run), run, slurm)
    (run.parent.parent / "hold").unlink()
    wait(lambda: queued(run, slurm) == "PENDING", run, slurm)
    scontrol(slurm, "hold", job(run))
    stopped = e2e.status(run)
    assert (stopped["status"], stopped["reason"]) == ("preempted", why) and 1 <= stopped["step"] < STEPS
    assert "requeued" in rlhf("runs").out.splitlines()[1].split()
    scontrol(slurm, "release", job(run))
    # SLURM holds a requeued job back for two minutes, until its old credential has expired; a slow machine needs no second stop
    scontrol(slurm, "update", f"JobId={job(run)}", "StartTime=now", "TimeLimit=60")
    wait_over(run, slurm)
    log = rlhf("logs", "runs/stopped").out
    assert f"requeued job {job(run)} (1 of at most 100 times)" in log
    assert f"resumed from step-{stopped['step']:06d}: {stopped['step']} of {STEPS} steps done" in log
    e2e.assert_same(alone, run)
    assert [r["step"] for r in e2e.jsonl(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    folders = [p.name.rpartition("-")[2] for p in (run / "wandb").glob("offline-run-*")]
    assert folders == [tracked, tracked], "one W&B run, written twice"


def test_a_preempted_job_is_requeued_and_equals_one_left_alone(
    rlhf: Callable[..., Done], slurm: dict[str, str], tmp_path: Path, alone: Path
) -> None:
    run = begun(rlhf, slurm, tmp_path)
    urgent = ["sbatch", "--partition=urgent", "--exclusive", f"--output={tmp_path}/urgent.log", "--wrap=echo done"]
    assert "Submitted" in slurm_cluster.tell(urgent, slurm)
    goes_on(rlhf, slurm, run, alone, "SIGTERM")
    assert (tmp_path / "urgent.log").read_text() == "done\n", "it had the machine in between"
    table = rlhf("runs").out
    assert ["stopped", "finished", f"{STEPS}/{STEPS}"] == table.splitlines()[1].split()[:3] and job(run) in table
    assert rlhf("logs", "runs/stopped", "rank=1").code == 0 and (run / "logs" / "rank-1.log").exists()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; type make vllm")
def test_a_preempted_job_that_samples_with_vllm_goes_on(
    rlhf: Callable[..., Done], slurm: dict[str, str], tmp_path: Path
) -> None:
    """SLURM signals every process of the job, and those of the engine must finish the step with the learner."""
    from transformers import LlamaForCausalLM

    from rlhf_cli.models.tiny import tiny_config, tiny_tokenizer

    config, model, apart = tiny_config(), tmp_path / "model", tmp_path / "apart"
    config.head_dim = 32  # which vLLM's attention for CPUs takes
    LlamaForCausalLM(config).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    engine = ("rollout=vllm", "rollout.rows=8", "dataset.max_prompt_tokens=512", "model=path", f"model.path={model}")
    words = (*engine, "hardware.processes=1", "hardware.zero=0")
    apart.mkdir()
    done = e2e.shell("train", *EXACT, "hardware=cpu", *reward(apart, VALUES), "run.name=alone", *words, cwd=apart)
    assert done.code == 0, done.err
    run = begun(rlhf, slurm, tmp_path, *words)
    urgent = ["sbatch", "--partition=urgent", "--exclusive", f"--output={tmp_path}/urgent.log", "--wrap=echo done"]
    assert "Submitted" in slurm_cluster.tell(urgent, slurm)
    goes_on(rlhf, slurm, run, apart / "runs" / "alone", "SIGTERM")


def test_a_time_limit_asks_for_a_checkpoint_and_the_run_goes_on(
    rlhf: Callable[..., Done], slurm: dict[str, str], tmp_path: Path, alone: Path
) -> None:
    # SLURM looks every half minute, and signals as much earlier where it would be late; the end is two minutes later,
    # because the machine may be busy
    run = begun(rlhf, slurm, tmp_path, "launcher.time=20", "launcher.signal_before=119")
    shown = slurm_cluster.tell(["squeue", "-h", "-O", "TimeUsed", "-j", job(run)], slurm).strip().split(":")
    limit = (60 * int(shown[-2]) + int(shown[-1]) + 125) // 60 + 1  # minutes, at least one look before they are over
    scontrol(slurm, "update", f"JobId={job(run)}", f"TimeLimit={limit}")
    goes_on(rlhf, slurm, run, alone, "SIGUSR1")


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
    wait(lambda: rows(run) >= 1, run, slurm)
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
    logs = Path(wrong.err.rpartition("its log lies in ")[2].strip()).glob("*_0_log.*")
    assert "hardware.processes=3: srun started 2 task(s) a machine" in "".join(p.read_text() for p in logs)
    assert "\nseed: 7\n" in f"\n{configs}" and "\nseed: 8\n" in f"\n{configs}"


def test_srun_in_a_batch_script_of_ones_own(slurm: dict[str, str], tmp_path: Path) -> None:
    def srun(*words: str, option: str = "--label") -> subprocess.Popen[str]:
        command = ["srun", "--ntasks=2", option, *e2e.command(*words)]
        pipe, environment = subprocess.PIPE, e2e.environment(**slurm)
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)

    run, killed, hold = tmp_path / "runs" / "own", tmp_path / "runs" / "killed", tmp_path / "hold"
    first = srun("train", *TINY, "steps=1", "run.name=own")
    said = first.communicate(timeout=400)
    assert first.returncode == 0, said
    assert said[1].count("rlhf: warning: should a rank be killed, srun will let the others wait for it") == 1
    again = srun("resume", "runs/own", "steps=2", option="--kill-on-bad-exit=1")
    said = again.communicate(timeout=400)
    assert again.returncode == 0 and "resumed from step-000001: 1 of 2 steps done" in said[0] and rows(run) == 2, said
    assert "rlhf: warning" not in said[1]
    assert json.loads((run / "checkpoints" / "step-000002" / "state.json").read_text())["world"] == 2
    hold.touch()
    # scored in place, so that rank 0 itself stands still and not a worker while rank 0 may still be in a collective
    held_up = [*TINY, *reward(tmp_path, held(killed, hold)), "reward.python.workers=false", "run.name=killed"]
    with srun("train", *held_up, option="--kill-on-bad-exit=1") as last:
        beat = killed / "logs" / "heartbeat-rank-1.json"  # written by a thread, which may come after the first step
        here = tmp_path / "hold-here"
        assert e2e.until(lambda: here.exists() and beat.exists(), process=last)  # type: ignore[arg-type]
        rank = json.loads(beat.read_text())["pid"]
        os.kill(rank, signal.SIGKILL)
        assert e2e.until(lambda: "SIGTERM: stopping" in e2e.notes(killed), process=last)  # type: ignore[arg-type]
        hold.unlink()  # else rank 0 would stand still until SLURM's KillWait is over
        assert last.wait(60) != 0


def test_a_command_that_is_killed_while_it_submits_leaves_no_second_job(
    rlhf: Callable[..., Done], slurm: dict[str, str], tmp_path: Path
) -> None:
    run, slow = tmp_path / "runs" / "once", tmp_path / "bin" / "sbatch"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@" >/dev/null; kill -KILL $PPID\n')
    slow.chmod(0o755)
    words = ("train", *TINY, *SLURM, "steps=1", "launcher.sbatch.hold=true", "run.name=once")
    killed = e2e.shell(*words, cwd=tmp_path, **slurm, PATH=f"{slow.parent}:{os.environ['PATH']}")
    assert killed.code == -signal.SIGKILL and not (run / "job.json").exists()
    queue = slurm_cluster.tell(["squeue", "-h", "--name=once", "-o", "%i"], slurm).split()
    done = rlhf(*words)
    assert done.code == 0 and f"job {queue[0]} waits or works for this run already" in done.out, done
    assert [job(run)] == queue == slurm_cluster.tell(["squeue", "-h", "--name=once", "-o", "%i"], slurm).split()
    scontrol(slurm, "release", job(run))
    wait_over(run, slurm)
    assert e2e.status(run)["status"] == "finished"


def test_sbatch_refuses_in_one_line(rlhf: Callable[..., Done]) -> None:
    done = rlhf("train", *TINY, *SLURM, "launcher.partition=nowhere", "run.name=refused")
    assert done.code == 2 and done.err.count("\n") == 1
    assert done.err.startswith("rlhf: error: SLURM refused the job: ") and "invalid partition" in done.err
