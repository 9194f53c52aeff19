"""What `launcher=slurm` asks SLURM for, decided without one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rlhf_cli import cli
from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.launch.choose import launcher_of
from rlhf_cli.launch.slurm import minutes

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
