"""Several ranks: one that dies, hangs or refuses ends the others, and what is said is what happened first."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import e2e_support as e2e
import psutil
import pytest
from e2e_support import TINY
from omegaconf import OmegaConf

from rlhf_cli.compose import compose
from rlhf_cli.hardware import resolve_hardware
from rlhf_cli.launch.local import prepare
from rlhf_cli.report.runs import first_error

pytestmark = pytest.mark.slow
TWO = ("hardware.processes=2", "hardware.zero=2")
ON_RANK_1 = "os.environ.get('RANK') == '1'"


def words(place: Path, name: str, body: str, *more: str) -> list[str]:
    reward = e2e.python_reward(place / f"{name}.py", f"{body}; values = [len(r) / 9 for r in responses]")
    here = "reward_workers.processes=-1"  # in the rank itself, so that the rank fails and not a worker
    return ["train", *TINY, "reward=python", reward, here, f"run.dir={place}", f"run.name={name}", *more]


def rank_pid(run: Path, rank: int) -> int:
    return json.loads((run / "logs" / f"heartbeat-rank-{rank}.json").read_text())["pid"]


def phase(run: Path, rank: int) -> str:
    path = run / "logs" / f"heartbeat-rank-{rank}.json"
    return json.loads(path.read_text())["phase"] if path.exists() else ""


def nobody_is_left(run: Path) -> bool:
    return not [p for p in psutil.process_iter(["cmdline"]) if str(run) in (p.info["cmdline"] or [])]


def test_a_killed_rank_ends_one_that_waits_for_it_and_is_named(tmp_path: Path) -> None:
    run, log = tmp_path / "killed", tmp_path / "log"
    sleeps = f"time.sleep(3000 if {ON_RANK_1} else 0)"
    process = e2e.begin(*words(tmp_path, "killed", sleeps, *TWO, "eval.prompts=2"), log=log)
    assert e2e.until(lambda: phase(run, 1) == phase(run, 0) == "evaluate", process=process), log.read_text()
    os.kill(rank_pid(run, 1), signal.SIGKILL)
    assert process.wait(120) == 1, "rank 0 waits in a collective; it has to be ended"
    said = f"rlhf: error: rank 1 was killed (SIGKILL); out of memory? see dmesg; go on with: rlhf resume {run}\n"
    assert log.read_text().endswith(said)
    state = e2e.status(run)
    assert (state["status"], state["reason"]) == ("failed", "rank 1 was killed (SIGKILL); out of memory? see dmesg")
    assert e2e.until(lambda: nobody_is_left(run), process=None)


def test_an_error_on_one_rank_is_the_one_that_is_shown(tmp_path: Path) -> None:
    raises = f"print('hello from the reward'); responses = responses[{ON_RANK_1} :]"  # a number too few on rank 1
    done = e2e.shell(*words(tmp_path, "raises", raises, *TWO))
    logs = tmp_path / "raises" / "logs"
    assert done.code == 3, done.err  # a reward that miscounts is a gate
    assert done.err.startswith("rlhf: error: rank 1: ") and "values for" in done.err and done.err.count("\n") == 1
    assert e2e.status(tmp_path / "raises")["status"] == "failed"
    assert "values for" in (logs / "rank-1.log").read_text(), "tracebacks are in the rank's own log"
    assert "hello from the reward" in (logs / "rank-0.log").read_text() and "hello from the reward" in done.out


def test_a_rank_that_runs_out_of_memory_is_named_with_what_to_type(tmp_path: Path) -> None:
    """In its reward's own code it would be that row's loss, so its forward asks for more than there is."""
    asks = f"import torch; {ON_RANK_1} and setattr(torch.nn.Linear, 'forward', lambda *a, **k: torch.empty(1 << 60, dtype=torch.uint8))"
    done = e2e.shell(*words(tmp_path, "memory", asks, *TWO))
    assert done.code == 2, done.err
    assert done.err.startswith("rlhf: error: rank 1: out of memory; halve hardware.micro_batch_tokens"), done.err
    assert done.err.count("\n") == 1 and e2e.status(tmp_path / "memory")["status"] == "failed"
    assert "DefaultCPUAllocator" in (tmp_path / "memory" / "logs" / "rank-1.error").read_text()


def test_silence_writes_the_stacks_of_every_rank_even_of_one_that_holds_the_lock(tmp_path: Path) -> None:
    stuck = f"import ctypes; {ON_RANK_1} and ctypes.PyDLL(None).sleep(300)"  # PyDLL keeps the interpreter's lock
    done = e2e.shell(*words(tmp_path, "stuck", stuck, *TWO, "hardware.timeout=20"))
    logs = tmp_path / "stuck" / "logs"
    assert done.code == 75, done.err
    said = r"rank 0 silent for \d+ s in phase evaluate; every rank but 1 waits in a collective; stacks of every rank"
    assert re.search(said, done.err), done.err
    assert "in score" in (logs / "rank-1.stacks").read_text() and "stuck.py" in (logs / "rank-1.stacks").read_text()
    assert "torch/distributed" in (logs / "rank-0.stacks").read_text()
    assert e2e.status(tmp_path / "stuck")["status"] == "failed"


def test_silence_writes_the_stacks_of_every_rank_without_a_keeper_too(tmp_path: Path) -> None:
    """Two ranks as torchrun or srun starts them: nobody but the other rank can reach the one that holds the interpreter's lock."""
    stuck = f"import ctypes; {ON_RANK_1} and ctypes.PyDLL(None).sleep(300)"
    cfg = compose("train", words(tmp_path, "bare", stuck, *TWO, "hardware.timeout=20")[1:], None)
    OmegaConf.update(cfg, "hardware", resolve_hardware(cfg), merge=True)
    run = prepare(cfg)
    run.release()
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())}
    ranks = []
    for rank in ("0", "1"):
        environment = e2e.environment(RANK=rank, LOCAL_RANK=rank, **world)
        with (tmp_path / f"log{rank}").open("wb") as log:
            command = [sys.executable, "-m", "rlhf_cli.worker", str(run.path)]
            ranks.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    codes = [p.wait(240) for p in ranks]  # a shell may have started the tests deaf to SIGQUIT
    assert codes[0] == 75 and codes[1] in (-signal.SIGQUIT, -signal.SIGKILL), (tmp_path / "log0").read_text()
    assert "in score" in run.stacks(1).read_text() and "bare.py" in run.stacks(1).read_text()
    assert "torch/distributed" in run.stacks(0).read_text()
    state = e2e.status(run.path)
    assert state["status"] == "failed" and state["reason"].startswith("rank 0 silent for ")
    assert "; every rank but 1 waits in a collective; stacks of every rank are in " in first_error(run)


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_saves_and_a_second_one_stops_at_once(processes: int, tmp_path: Path) -> None:
    run, log = tmp_path / "c", tmp_path / "log"
    more = TWO if processes == 2 else ()
    process = e2e.begin(*words(tmp_path, "c", "time.sleep(0.3)", *more, "steps=300"), log=log)
    assert e2e.until(lambda: len(e2e.jsonl(run / "metrics.jsonl")) >= 1, process=process), log.read_text()
    process.send_signal(signal.SIGINT)
    assert process.wait(180) == 75, log.read_text()
    text = log.read_text()
    assert "SIGINT: stopping after this step, with a checkpoint; Ctrl-C again stops at once" in text
    state = e2e.status(run)
    assert (state["status"], state["reason"]) == ("preempted", "SIGINT") and state["step"] >= 1
    assert (run / "checkpoints" / f"step-{state['step']:06d}" / "manifest.json").exists()

    process = e2e.begin("resume", str(run), log=log)
    rows = len(e2e.jsonl(run / "metrics.jsonl"))
    assert e2e.until(lambda: len(e2e.jsonl(run / "metrics.jsonl")) > rows, process=process), log.read_text()
    (tmp_path / "c.py").write_text("")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(180) in (75, 130, -signal.SIGINT), (
        "130, which is also what a shell says of -2; 75 when the step ended between the two"
    )
    assert e2e.status(run)["status"] in ("preempted", "failed")
    assert e2e.until(lambda: nobody_is_left(run), process=None)


def test_ctrl_c_while_loading(tmp_path: Path) -> None:
    run, log = tmp_path / "early", tmp_path / "log"
    process = e2e.begin(*words(tmp_path, "early", "pass"), log=log)
    assert e2e.until(lambda: (run / "plan.txt").exists(), process=process)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(180) == 75, log.read_text()
    assert e2e.status(run)["status"] == "preempted" and e2e.status(run)["step"] == 0
    assert f"go on with: rlhf resume {run}" in log.read_text()


@pytest.mark.parametrize("stage", [2, 3])
def test_uneven_data_does_not_hang(stage: int, tmp_path: Path) -> None:
    """One prompt on two ranks leaves one of them without rows; three held-out prompts do not divide by two."""
    more = ("hardware.processes=2", f"hardware.zero={stage}", "batch.prompts=1", "batch.samples=3", "eval.prompts=3")
    done = e2e.shell(*words(tmp_path, "uneven", "pass", *more, "gates.constant_steps=50"))
    assert done.code == 0, done.out + done.err
    assert [r["count/groups"] for r in e2e.jsonl(tmp_path / "uneven" / "metrics.jsonl")] == [1, 1]


def test_offloading_to_the_host_changes_no_loss(tmp_path: Path) -> None:
    """Two processes under ZeRO-3 with DeepSpeed's own offloading of state and parameters, against the same without."""
    runs = {}
    for offload in ("none", "cpu"):
        more = ("hardware.processes=2", "hardware.zero=3", f"hardware.offload={offload}", "optim.lr=0.001")
        done = e2e.shell(*words(tmp_path, offload, "pass", *more))
        assert done.code == 0, done.out + done.err
        runs[offload] = e2e.numbers(tmp_path / offload)["metrics.jsonl"]
    assert [r["step"] for r in runs["cpu"]] == [1, 2]
    assert runs["cpu"][0]["policy/grad_norm"] > 0, "something is learnt"
    for plain, moved in zip(*runs.values(), strict=True):
        assert moved == pytest.approx(plain, rel=1e-4, abs=1e-6)


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_machines_without_a_scheduler(tmp_path: Path) -> None:
    """Two launchers on this machine, one rank each; machine 1 is started first and waits."""
    more = ["hardware.nodes=2", f"hardware.master=127.0.0.1:{port()}", "hardware.processes=1", "hardware.zero=1"]
    command = words(tmp_path, "nodes", "pass", *more)
    first = e2e.begin(*command, "hardware.node_rank=1", log=tmp_path / "log1")
    assert e2e.until(lambda: "waiting for machine 0" in (tmp_path / "log1").read_text(), process=first)
    done = e2e.shell(*command, "hardware.node_rank=0")
    assert done.code == 0, done.out + done.err
    assert first.wait(180) == 0, (tmp_path / "log1").read_text()
    run = tmp_path / "nodes"
    assert e2e.status(run)["status"] == "finished"
    assert {p.name for p in (run / "logs").glob("rank-*.log")} == {"rank-0.log", "rank-1.log"}
    assert json.loads((run / "checkpoints" / "step-000002" / "state.json").read_text())["world"] == 2


def test_a_hostfile_starts_the_others_over_ssh_and_they_end_together(tmp_path: Path) -> None:
    """`ssh` is a script that runs the line in a shell of this machine; everything else is real."""
    fake = tmp_path / "bin" / "ssh"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nwhile [ "$1" = -o ]; do shift 2; done\necho "to $1" >&2\nexec sh -c "$2"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1  # here\nother slots=1\n")
    more = ["hardware.nodes=2", f"hardware.hostfile={hosts}", "hardware.processes=1"]
    path = f"{fake.parent}:{os.environ['PATH']}"
    command = words(tmp_path, "ssh", f"responses = responses[{ON_RANK_1} :]", *more)  # a number too few on rank 1
    done = e2e.shell(*command, PATH=path)
    assert done.code == 3 and done.err.startswith("rlhf: error: rank 1: ") and "values for" in done.err, (
        done.out + done.err
    )
    assert "to other" in (tmp_path / "ssh" / "logs" / "node-1.log").read_text()
    assert "values for" in (tmp_path / "ssh" / "logs" / "rank-1.log").read_text(), "rank 1 ran on the other machine"
    assert e2e.until(lambda: nobody_is_left(tmp_path / "ssh"), process=None)
