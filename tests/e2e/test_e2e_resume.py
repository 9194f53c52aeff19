"""The promise: killed at any moment and started again, a run ends with the same bits as one that was left alone."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import e2e_support as e2e
import pytest
from e2e_support import TINY, Done

pytestmark = pytest.mark.slow
STEPS = 4
SLOW = "time.sleep(0.1); values = [sum(map(ord, r)) % 7 / 7 for r in responses]"  # a moment to be killed in
ZERO2 = ("hardware.processes=2", "hardware.zero=2")
Rlhf = Callable[..., Done]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def words(place: Path) -> list[str]:
    """The experiment: two learners, two passes a step, warm-up and a schedule, so that all of their state counts."""
    reward = e2e.python_reward(place / "mine.py", SLOW)
    optim = ("optim.lr=0.001", "optim.warmup=1", "optim.schedule=cosine")
    return [
        "algo=ppo",
        *TINY,
        f"steps={STEPS}",
        "batch.minibatches=2",
        *optim,
        "reward=python",
        reward,
        f"run.dir={place}",
    ]


def uninterrupted(place: Path, words: list[str], name: str, *more: str) -> Path:
    done = e2e.shell("train", *words, f"run.name={name}", *more)
    assert done.code == 0, done.out + done.err
    assert len(e2e.jsonl(place / name / "metrics.jsonl")) == STEPS
    return place / name


@pytest.fixture(scope="module")
def alone(place: Path, words: list[str]) -> Path:
    """The run that was left alone, one process."""
    return uninterrupted(place, words, "alone")


@pytest.fixture(scope="module")
def alone_zero2(place: Path, words: list[str]) -> Path:
    """The run that was left alone, two processes under ZeRO-2."""
    return uninterrupted(place, words, "alone-zero2", *ZERO2)


def copy_of(run: Path, name: str) -> Path:
    target = run.parent / name
    shutil.copytree(run, target)
    (target / ".lock").unlink(missing_ok=True)
    return target


def saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".tmp-step-*"))


def killed_until_done(run: Path, argv: list[str], seed: int) -> int:
    """Start the command and kill it during a checkpoint, then at random moments, then let it end. Returns the kills."""
    chance, kills = random.Random(seed), 0
    for attempt in range(3):
        process = e2e.begin(*argv, log=run.parent / f"{run.name}.log")
        rows = len(e2e.jsonl(run / "metrics.jsonl"))
        ready = (lambda: saving(run)) if attempt == 0 else (lambda n=rows: len(e2e.jsonl(run / "metrics.jsonl")) > n)
        if attempt < 2 and e2e.until(ready, process=process):
            time.sleep(chance.uniform(0, 0.01) if attempt == 0 else chance.uniform(0, 0.3))
            kills += process.poll() is None
            e2e.kill_tree(process)
        elif process.wait(240) == 0:
            break
    log = (run.parent / f"{run.name}.log").read_text(encoding="utf-8")
    assert e2e.status(run)["status"] == "finished", log[-3000:]
    return kills


def test_killed_and_started_again_equals_left_alone(alone: Path, words: list[str], place: Path) -> None:
    seed = random.randrange(1000)
    kills = killed_until_done(place / "killed", ["train", *words, "run.name=killed"], seed)
    assert kills >= 2, f"seed {seed}: the run was too quick to be killed"
    print(f"kill seed {seed}")
    e2e.assert_same(alone, place / "killed")


def test_two_zero2_processes_killed_equal_left_alone(alone_zero2: Path, words: list[str], place: Path) -> None:
    seed = random.randrange(1000)
    kills = killed_until_done(place / "killed2", ["train", *words, *ZERO2, "run.name=killed2"], seed)
    assert kills >= 2, f"seed {seed}: the run was too quick to be killed"
    print(f"kill seed {seed}")
    e2e.assert_same(alone_zero2, place / "killed2")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_saves_and_resume_finishes(
    processes: int, words: list[str], place: Path, request: pytest.FixtureRequest
) -> None:
    whole = request.getfixturevalue("alone" if processes == 1 else "alone_zero2")
    run, log = place / f"term{processes}", place / f"term{processes}.log"
    more = ZERO2 if processes == 2 else ()
    process = e2e.begin("train", *words, *more, f"run.name={run.name}", log=log)
    assert e2e.until(lambda: len(e2e.jsonl(run / "metrics.jsonl")) >= 1, process=process), log.read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) == 75, log.read_text()
    state = e2e.status(run)
    assert state["status"] == "preempted" and state["reason"] == "SIGTERM" and 1 <= state["step"] < STEPS
    assert f"stopped by SIGTERM after {state['step']} steps; go on with: rlhf resume {run}" in log.read_text()
    done = e2e.shell("resume", str(run))
    assert done.code == 0, done.out + done.err
    assert f"resumed from step-{state['step']:06d}: {state['step']} of {STEPS} steps done" in e2e.notes(run)
    e2e.assert_same(whole, run)


def test_a_tampered_checkpoint_is_refused_and_the_one_before_it_used(alone: Path, words: list[str], rlhf: Rlhf) -> None:
    run = copy_of(alone, "tampered")
    file = run / "checkpoints" / f"step-{STEPS:06d}" / "policy.weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    done = rlhf("train", *words, "run.name=tampered")
    assert done.code == 0, done.err
    assert f"checkpoint step-{STEPS:06d} refused: policy.weights.safetensors has sha256 " in done.out
    assert f"manifest says {e2e_hash(alone)}..; using step-{STEPS - 1:06d}" in done.out
    e2e.assert_same(alone, run)


def e2e_hash(run: Path) -> str:
    import hashlib

    file = run / "checkpoints" / f"step-{STEPS:06d}" / "policy.weights.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def test_resume_from_an_older_checkpoint_sets_the_later_aside(alone: Path, rlhf: Rlhf) -> None:
    run = copy_of(alone, "older")
    before = f"step-{STEPS - 1:06d}"
    done = rlhf("resume", str(run), f"resume={run}/checkpoints/{before}")
    assert done.code == 0, done.err
    said = f"checkpoint step-{STEPS:06d} is later than the resumed step {STEPS - 1}; set aside as discarded-1-step-{STEPS:06d}"
    assert said in done.out and f"resumed from {before}: {STEPS - 1} of {STEPS} steps done" in done.out
    assert (run / "checkpoints" / f"discarded-1-step-{STEPS:06d}").is_dir()
    e2e.assert_same(alone, run)


def test_a_start_from_the_beginning_counts_once(alone: Path, rlhf: Rlhf) -> None:
    run = copy_of(alone, "over")
    done = rlhf("resume", str(run), "resume=never", "steps=2")
    assert done.code == 0, done.err
    assert f"checkpoint step-{STEPS:06d} belongs to the line that is left; set aside as " in done.out
    done = rlhf("resume", str(run), f"steps={STEPS}")
    assert done.code == 0, done.err
    assert f"resumed from step-000002: 2 of {STEPS} steps done" in done.out
    assert e2e.status(run)["status"] == "finished" and e2e.status(run)["step"] == STEPS


def test_two_processes_go_on_as_one(alone_zero2: Path, words: list[str], rlhf: Rlhf) -> None:
    run = copy_of(alone_zero2, "fewer")
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:06d}")
    done = rlhf("train", *words, "hardware.processes=1", "hardware.zero=0", "run.name=fewer")
    assert done.code == 0, done.err
    assert f"rlhf: continuing {run} with hardware.processes: 2 -> 1" in done.out
    assert "written by 2 process(es) and is continued by 1; states were re-sharded" in done.out
    first, second = e2e.numbers(alone_zero2)["metrics.jsonl"], e2e.numbers(run)["metrics.jsonl"]
    assert first[:-1] == second[:-1] and second[-1]["step"] == STEPS
    for name, value in first[-1].items():
        assert second[-1][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_one_process_goes_on_as_two(alone: Path, words: list[str]) -> None:
    """The other way, and into shards: ZeRO-0 of one process becomes ZeRO-3 of two."""
    run = copy_of(alone, "more")
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:06d}")
    done = e2e.shell("train", *words, "hardware.processes=2", "hardware.zero=3", "run.name=more")
    assert done.code == 0, done.out + done.err
    assert f"rlhf: continuing {run} with hardware.processes: 1 -> 2" in done.out
    assert f"rlhf: continuing {run} with hardware.zero: 0 -> 3" in done.out
    assert "written by 1 process(es) and is continued by 2; states were re-sharded" in e2e.notes(run)
    first, second = e2e.numbers(alone)["metrics.jsonl"], e2e.numbers(run)["metrics.jsonl"]
    assert first[:-1] == second[:-1] and second[-1]["step"] == STEPS
    for name, value in first[-1].items():
        assert second[-1][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_a_finished_run_goes_on_only_for_more_steps(alone: Path, rlhf: Rlhf) -> None:
    run = copy_of(alone, "longer")
    done = rlhf("resume", str(run))
    assert done.code == 0 and done.out == (
        f"rlhf: {run} is finished ({STEPS} steps); for more, type rlhf resume {run} steps=N\n"
    )
    more = rlhf("resume", str(run), f"steps={STEPS + 1}")
    assert more.code == 0, more.err
    assert f"rlhf: resume changes steps: {STEPS} -> {STEPS + 1}" in more.out
    assert [r["step"] for r in e2e.jsonl(run / "metrics.jsonl")] == list(range(1, STEPS + 2))


def test_resume_refuses_another_experiment(alone: Path, rlhf: Rlhf) -> None:
    def wrong(*words: str) -> str:
        done = rlhf("resume", *words)
        assert done.code == 2 and done.out == ""
        return done.err.removeprefix("rlhf: error: ").rstrip("\n")

    saved = (alone / "config.yaml").read_text()
    assert wrong(str(alone), "algo=grpo") == (
        "algo=grpo: a run keeps its algo (ppo); for another, start a new run: rlhf train algo=grpo"
    )
    assert wrong(str(alone), "optim.lrr=1") == "optim.lrr: unknown key; did you mean 'lr'?"
    assert wrong(str(alone), "steps=x").startswith("steps=x: wanted int, e.g. steps=")
    assert wrong(str(alone), "batch.minibatches=3").startswith("batch.prompts=2 does not divide into")
    assert wrong("nowhere") == "resume: nowhere is no run directory (no config.yaml in it); rlhf resume runs/NAME"
    assert (alone / "config.yaml").read_text() == saved
