"""What `launcher=slurm` asks SLURM for, decided without one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from rlhf_cli import cli
from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.launch.choose import launcher_of
from rlhf_cli.launch.slurm import _words, minutes
from rlhf_cli.launch.stop import SIGNALS, undisturbed

pytest.importorskip("submitit", reason="submitit is not installed; pip install 'rlhf-cli[slurm]'")


def script(*words: str) -> list[str]:
    cfg = compose("train", ["launcher=slurm", *words], None)
    return launcher_of(cfg).script(cfg).splitlines()


def hardware(*words: str) -> tuple:
    cfg = compose("train", ["launcher=slurm", *words], None)
    hw = launcher_of(cfg).hardware(cfg)
    return hw["device"], hw["nodes"], hw["processes"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:30", 91), ("4:00:00", 240), ("1-0", 1440), ("2-03:30", 3090), ("1-01:01:01", 1502), ("0:59", 1)],
)
def test_time_limits_in_slurms_notation(text: str, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["4h", "", "1:2:3:4", "-5", "0"])
def test_wrong_time_limits(text: str) -> None:
    with pytest.raises(ConfigError, match=r"launcher.time="):
        minutes(text)


def test_a_gpu_per_rank_unless_the_cpu_is_asked_for() -> None:
    assert hardware() == ("cuda", 1, 1)
    assert hardware("hardware.processes=8") == ("cuda", 1, 8)
    assert hardware("launcher.gpus=4") == ("cuda", 1, 4)
    assert hardware("hardware=cpu") == ("cpu", 1, 1)
    assert hardware("launcher.gpus=0", "hardware.processes=2") == ("cpu", 1, 2)
    assert hardware("hardware.nodes=2", "launcher.gpus=8") == ("cuda", 2, 8)
    assert hardware("launcher.nodes=2") == ("cuda", 2, 1)
    assert "#SBATCH --gpus-per-node=8" in script("hardware.processes=8")
    assert not [line for line in script("hardware=cpu") if "gpu" in line]
    with pytest.raises(ConfigError, match=r"type launcher.gpus=4, or hardware=cpu"):
        hardware("launcher.gpus=2", "hardware.processes=4")
    with pytest.raises(ConfigError, match="disagree"):
        hardware("launcher.nodes=2", "hardware.nodes=3")


def test_every_setting_becomes_a_line() -> None:
    words = ["partition=long", "account=lab", "qos=high", "time=1-12:00:00", "nodes=2", "gpus=8", "cpus_per_task=12"]
    words += [
        "memory=900G",
        "constraint=a100",
        "setup=[module load cuda]",
        "sbatch.reservation=spring",
        "sbatch.mail_type=END",
    ]
    lines = script(*(f"launcher.{w}" for w in words), "launcher.signal_before=600", "run.name=first", "hardware=zero3")
    expected = {
        "job-name=first", "partition=long", "account=lab", "qos=high", "time=2160", "nodes=2", "ntasks-per-node=8",
        "gpus-per-node=8", "cpus-per-task=12", "mem=900G", "constraint=a100", "reservation=spring", "mail-type=END",
        "signal=USR1@600", "requeue", "open-mode=append",
    }  # fmt: skip
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert expected == {a for a in asked if not a.startswith("output=")}
    assert f"output={Path.cwd()}/runs/first/logs/slurm/%j_0_log.out" in asked
    command = lines[-1] if lines[-1] else lines[-2]
    assert command.startswith("srun ") and "--kill-on-bad-exit=1" in command and "--cpus-per-task=12" in command
    assert "ssh" not in command and lines.index("module load cuda") < lines.index(command)
    assert subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, check=False).returncode == 0
    with pytest.raises(ConfigError, match=r"launcher.sbatch.nodes: is set by"):
        script("launcher.sbatch.nodes=3")
    with pytest.raises(ConfigError, match=r"launcher.time=5: .* N under 300 seconds"):
        script("launcher.time=5")  # it would be requeued before its first step, again and again


def test_preview_prints_the_script_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "launcher=slurm", "--print-sbatch"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/bash\n") and out.rstrip().splitlines()[-1].startswith("srun ")
    assert cli.main(["plan", "launcher=slurm"]) == 0
    plan = capsys.readouterr().out
    assert all(line.rstrip() in plan for line in out.splitlines()) and "cuda, 1 x all cores that the job gets" in plan
    assert cli.main(["train", "--print-sbatch"]) == 2
    assert (
        capsys.readouterr().err == "rlhf: error: --print-sbatch: this launcher submits nothing; type launcher=slurm\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_without_sbatch_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["train", "launcher=slurm", "hardware=cpu"]) == 2
    assert "no sbatch on this machine" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def commands(place: Path, monkeypatch: pytest.MonkeyPatch, **bodies: str) -> None:
    """Shell scripts in the place of SLURM's commands."""
    place.mkdir()
    for name, body in bodies.items():
        (place / name).write_text(f"#!/bin/bash\n{body}\n")
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")


def submit() -> int:
    return cli.main(["train", "launcher=slurm", "hardware=cpu", "debug=tiny", "run.name=a"])


def test_signals_wait_until_a_job_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # sbatch takes its time, in which every signal reaches it and the process that waits for it; bash keeps the mask, as sbatch does
    told = " ".join(f"kill -{s.name[3:]} $PPID $$;" for s in SIGNALS)
    commands(tmp_path / "bin", monkeypatch, srun="exit", sbatch=f"{told} sleep 0.2; echo Submitted batch job 77")
    seen: dict[int, bool] = {}
    before = {s: signal.signal(s, lambda n, _: seen.update({n: Path("runs/a/job.json").exists()})) for s in SIGNALS}
    try:
        assert submit() == 0
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    assert seen == dict.fromkeys(SIGNALS, True)
    assert json.loads(Path("runs/a/job.json").read_text())["job"] == "77"
    assert "submitted job 77" in capsys.readouterr().out
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_a_signal_acts_after_an_undisturbed_block_and_an_error_still_leaves_it() -> None:
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a script starts with `&` ignores it
    try:
        with pytest.raises(KeyboardInterrupt), undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            done = True
        assert done
    finally:
        signal.signal(signal.SIGINT, ours)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="mine"), undisturbed():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGTERM) == before and signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_a_job_that_nobody_wrote_down_is_found_and_not_submitted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    other = f"echo '{76:<32}{tmp_path}/runs/b/logs/slurm/%j_0_log.out'"
    found = f"{other}; echo '{77:<32}{tmp_path}/runs/a/logs/slurm/%j_0_log.out'"
    commands(tmp_path / "bin", monkeypatch, srun="exit", sbatch="kill -KILL $PPID", squeue=found)
    child = os.fork()  # killed by the stub, as by the kernel, after SLURM took the job
    if child == 0:
        os._exit(submit())
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not Path("runs/a/job.json").exists() and not list(Path("runs/a/logs/slurm").glob("77*"))
    assert submit() == 0
    assert json.loads(Path("runs/a/job.json").read_text())["job"] == "77"
    assert Path("runs/a/logs/slurm/77_submitted.pkl").exists(), "what submitit had no time for"
    out = capsys.readouterr().out
    assert "job 77 waits or works for this run already, submitted by a command that was killed" in out
    Path("runs/a/job.json").unlink()
    commands(tmp_path / "elsewhere", monkeypatch, squeue=other, sbatch="echo Submitted batch job 78")
    assert submit() == 0
    assert json.loads(Path("runs/a/job.json").read_text())["job"] == "78", "another run's job is not this one's"


def test_sbatchs_own_words_and_a_hint_only_where_it_fits() -> None:
    refused = Exception(
        "Job failed\nsbatch: error: invalid partition specified: gpu\nsbatch: error: Batch job submission failed"
    )
    assert _words(refused) == "invalid partition specified: gpu; Batch job submission failed"
    refused = Exception("sbatch: error: Invalid generic resource (gres) specification")
    assert _words(refused) == "Invalid generic resource (gres) specification (without GPUs: hardware=cpu)"
