"""Disks that fill up or take nothing, checkpoints that are damaged, runs that are already being written, and a short stress."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import e2e_support as e2e
import pytest
from e2e_support import TINY, Done

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
Rlhf = Callable[..., Done]


def words(place: Path, *more: str) -> list[str]:
    reward = () if "reward=python" in more else ("reward=length", "reward.length.unit=characters")
    return ["train", *TINY, *reward, f"run.dir={place}", "run.name=r", *more]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small disk of its own: a tmpfs, which takes the rights of root to mount."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / "disk"
        place.mkdir(exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(place)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.decode().strip()}")
        made.append(place)
        return place

    yield mount
    for place in made:
        subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def fills(place: Path, rows: int, leave: int, calm: Path) -> str:
    """A user's reward that fills the disk, all but `leave` bytes, once so many steps are done and until `calm` exists."""
    metrics, ballast = place / "r" / "metrics.jsonl", place / "ballast"
    done = (
        f"os.path.exists('{metrics}') and len(open('{metrics}').readlines()) >= {rows} and not os.path.exists('{calm}')"
    )
    size = f"__import__('shutil').disk_usage('{place}').free - {leave}"
    fill = f"{done} and {size} > 0 and open('{ballast}', 'ab').write(b'x' * ({size}))"
    return f"{fill}; values = [sum(map(ord, r)) % 7 / 7 for r in responses]"


@pytest.mark.parametrize(
    ("what", "rows", "leave"), [("metrics", 1, 0), ("checkpoint", 1, 200_000), ("export", 3, 1_500_000)]
)
def test_a_full_disk_loses_nothing(
    what: str, rows: int, leave: int, disk: Callable[[str], Path], rlhf: Rlhf, tmp_path: Path
) -> None:
    """It ends with 2 and one line that says what to do; after room was made, the run ends with the bits of its twin."""
    place, calm, whole = disk("size=40m"), tmp_path / "calm", tmp_path / "whole"
    reward = e2e.python_reward(tmp_path / f"{what}.py", fills(place, rows, leave, calm))
    more = ("reward=python", reward, "steps=3", "optim.lr=0.001", "checkpoint.keep=9")
    assert rlhf(*words(whole, *more)).code == 0
    full = rlhf(*words(place, *more))
    assert full.code == 2, full.out + full.err
    own = [x for x in full.err.splitlines() if x.startswith("rlhf: ")]
    assert len(own) == 1 and "No space left on device" in own[0] and f"rlhf resume {place / 'r'}" in own[0], full.err
    assert "Traceback" not in full.err
    there = sorted(p.name for p in (place / "r" / "checkpoints").iterdir())
    kept = {"metrics": 1, "checkpoint": 1, "export": 3}[what]
    assert there == [f"step-{n:06d}" for n in range(1, kept + 1)], "a half written checkpoint is removed"
    assert (place / "r" / "export").exists() is False
    (place / "ballast").unlink()
    calm.touch()
    again = rlhf("resume", str(place / "r"))
    assert again.code == 0, again.out + again.err
    found = [e2e.numbers(run)["metrics.jsonl"] for run in (whole / "r", place / "r")]
    assert found[0] == found[1]
    a, b = (run / "r" / "export" / "model.safetensors" for run in (whole, place))
    assert a.read_bytes() == b.read_bytes()


def test_a_read_only_directory_is_refused_before_anything_loads(disk: Callable[[str], Path], rlhf: Rlhf) -> None:
    place = disk("size=40m")
    assert rlhf(*words(place)).code == 0
    before = {p: p.read_bytes() for p in (place / "r").rglob("*") if p.is_file()}
    remount(place, "ro")
    for command in (["resume", str(place / "r"), "steps=3"], words(place, "steps=3"), [*words(place), "run.name=new"]):
        done = rlhf(*command)
        assert done.code == 2 and "Read-only file system; choose another folder with run.dir=DIR" in done.err, done.err
    assert before == {p: p.read_bytes() for p in (place / "r").rglob("*") if p.is_file()}


def test_a_truncated_checkpoint_is_refused_and_no_valid_one_is_an_error(rlhf: Rlhf, tmp_path: Path) -> None:
    assert rlhf(*words(tmp_path)).code == 0
    run = tmp_path / "r"

    def truncate(step: int) -> None:
        file = run / "checkpoints" / f"step-{step:06d}" / "policy.exp_avg.safetensors"
        file.write_bytes(file.read_bytes()[:-7])

    truncate(2)
    done = rlhf("resume", str(run), "steps=3")
    assert done.code == 0 and "checkpoint step-000002 refused: policy.exp_avg.safetensors has " in done.out
    assert "resumed from step-000001: 1 of 3 steps done" in done.out
    truncate(2)
    truncate(3)
    done = rlhf("resume", str(run), "steps=4")
    assert done.code == 2 and "no valid checkpoint in " in done.err and "start over with resume=never" in done.err


def test_two_at_once_one_refuses(tmp_path: Path) -> None:
    """Both typed in the same instant, to start a run and to resume one: exactly one goes on, and the other touches nothing."""
    for number, command in enumerate((words(tmp_path), ["resume", str(tmp_path / "r"), "steps=3"])):
        logs = [tmp_path / f"log{number}{i}" for i in range(2)]
        codes = sorted(p.wait(240) for p in [e2e.begin(*command, log=log) for log in logs])
        said = "".join(log.read_text() for log in logs)
        assert codes == [0, 2], said
        assert said.count("is being written by pid ") == 1
        assert e2e.status(tmp_path / "r")["status"] == "finished"
        assert [r["step"] for r in e2e.jsonl(tmp_path / "r" / "metrics.jsonl")] == list(range(1, 3 + number))


def test_a_short_stress(tmp_path: Path) -> None:
    """The script behind the figures of docs/reliability.md: every kind of moment once, under ZeRO-3 and on two ranks, one of which dies alone."""
    script, out = ROOT / "scripts" / "stress.py", tmp_path / "figures.json"
    asked = ["--kills", "8", "--setups", "1x3,2x2", "--moments", "rename,renamed,checkpoint,random"]
    done = subprocess.run(
        [sys.executable, str(script), *asked, "--dir", str(tmp_path / "s"), "--out", str(out)],
        capture_output=True, text=True, timeout=900, env=e2e.environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())
    assert (figures["kills"], figures["exact"]) == (8, 8)
    one, two = (row["where"] for row in figures["setups"])
    assert one == {"checkpoint": 1, "random": 1, "rename": 1, "renamed": 1}
    assert two == {"checkpoint": 1, "random": 1, "rename": 1, "renamed of one rank": 1}


def test_a_stress_at_an_unknown_moment_is_refused() -> None:
    asked = [sys.executable, str(ROOT / "scripts" / "stress.py"), "--moments", "rename,lunch"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--moments lunch: unknown; there are load, rollout" in done.stderr
