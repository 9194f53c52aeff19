"""Checkpoints: whole or absent, refused when a byte differs, never lost to a kill."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_cli.errors import ConfigError
from rlhf_cli.record import checkpoint


def writer(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / "model.bin").write_text(text)
        (path / "ranks").mkdir()
        (path / "ranks" / "0.bin").write_text(text * 2)

    return write


def three(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, writer(f"step {step}"), keep=3)
    return tmp_path


def test_manifest_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 50, lambda p: (p / "a").write_text("abc") and None, keep=1)
    assert path.name == "step-000050"
    # SHA-256 of "abc", FIPS 180-2 appendix B.1
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest == {"version": 1, "step": 50, "files": {"a": {"size": 3, "sha256": digest}}}
    assert checkpoint.step_of(path) == 50


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, writer(str(step)), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000005"]


def test_a_crash_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    three(tmp_path)

    def crash(path: Path) -> None:
        (path / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 40, crash, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-000020", "step-000030"]


@pytest.mark.parametrize("nth", [1, 2])
def test_a_crash_at_a_rename_leaves_a_valid_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Saving a step again renames the old one away (1) and the new one in (2); the old survives a crash at either."""
    checkpoint.save(tmp_path, 10, writer("old"), keep=1)
    real, calls = checkpoint.os.rename, []

    def rename(a: Path, b: Path) -> None:
        calls.append(a)
        if len(calls) == nth:
            raise KeyboardInterrupt
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 10, writer("new"), keep=1)
    path, notes = checkpoint.newest_valid(tmp_path)
    assert path is not None and (path / "model.bin").read_text() == "old" and notes == []
    final = checkpoint.save(tmp_path, 10, writer("new"), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000010"]
    assert (final / "model.bin").read_text() == "new"


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 10, writer("old"), keep=1)
    stale = tmp_path / f".old-step-000010-{os.getpid()}"
    stale.mkdir()
    (stale / "model.bin").write_text("older")
    final = checkpoint.save(tmp_path, 10, writer("new"), keep=1)
    assert (final / "model.bin").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["step-000010"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


TAMPER: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (lambda p: flip(p / "model.bin"), r"model.bin has sha256 [0-9a-f]{12}\.\., manifest says [0-9a-f]{12}\.\."),
    "short": (lambda p: (p / "ranks/0.bin").write_text("x"), "ranks/0.bin has 1 bytes, manifest says 14"),
    "missing": (lambda p: (p / "ranks/0.bin").unlink(), "ranks/0.bin is missing"),
    "extra": (lambda p: (p / "ranks/1.bin").write_text(""), "ranks/1.bin is not in the manifest"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "torn manifest": (lambda p: (p / "manifest.json").write_text('{"fi'), "manifest.json is damaged"),
    "empty manifest": (lambda p: (p / "manifest.json").write_text("{}"), "manifest.json is damaged"),
    "renamed": (lambda p: (p / "manifest.json").write_text('{"step": 7, "files": {}}'), "manifest.json says step 7"),
}


@pytest.mark.parametrize("how", TAMPER)
def test_a_damaged_checkpoint_is_refused_aloud_and_the_previous_used(tmp_path: Path, how: str) -> None:
    three(tmp_path)
    damage, why = TAMPER[how]
    damage(tmp_path / "step-000030")
    path, notes = checkpoint.newest_valid(tmp_path)
    assert path == tmp_path / "step-000020"
    assert len(notes) == 1
    assert re.fullmatch(f"checkpoint step-000030 refused: {why}; using step-000020", notes[0]), notes


def test_none_valid_is_an_error_that_lists_why_and_none_at_all_is_not(tmp_path: Path) -> None:
    assert checkpoint.newest_valid(tmp_path / "nowhere") == (None, [])
    three(tmp_path)
    for p in tmp_path.iterdir():
        (p / "model.bin").unlink()
    with pytest.raises(ConfigError) as e:
        checkpoint.newest_valid(tmp_path)
    listed = "; ".join(f"step-0000{s}: model.bin is missing" for s in (30, 20, 10))
    assert str(e.value) == f"no valid checkpoint in {tmp_path}: {listed}; restore one, or start over with resume=never"


def test_pruning_never_removes_the_one_just_written(tmp_path: Path) -> None:
    """Resumed at 20 because 30 was damaged: saving 25 with keep=1 must not count 30."""
    three(tmp_path)
    (tmp_path / "step-000030" / "model.bin").unlink()
    checkpoint.save(tmp_path, 25, writer("25"), keep=1)
    path, _ = checkpoint.newest_valid(tmp_path)
    assert path == tmp_path / "step-000025"


def test_later_checkpoints_are_set_aside_when_an_older_one_is_resumed(tmp_path: Path) -> None:
    three(tmp_path)
    assert checkpoint.set_aside_after(tmp_path, 10) == [
        "checkpoint step-000030 is later than the resumed step 10; set aside as discarded-1-step-000030",
        "checkpoint step-000020 is later than the resumed step 10; set aside as discarded-1-step-000020",
    ]
    assert checkpoint.newest_valid(tmp_path)[0] == tmp_path / "step-000010"


def test_a_start_asked_for_sets_aside_all_that_it_leaves(tmp_path: Path) -> None:
    own, other = three(tmp_path / "a"), three(tmp_path / "b")
    assert checkpoint.starting_point(own, "auto") == (own / "step-000030", [])
    path, notes = checkpoint.starting_point(own, str(own / "step-000020"))
    assert path == own / "step-000020" and len(notes) == 1
    assert checkpoint.newest_step(own) == 20
    path, notes = checkpoint.starting_point(own, str(other / "step-000020"))
    assert path == other / "step-000020" and checkpoint.newest_step(own) == -1, (
        "its own are of another line, earlier ones too"
    )
    assert notes[0] == "checkpoint step-000020 belongs to the line that is left; set aside as discarded-1-step-000020"
    assert checkpoint.starting_point(other, "never")[0] is None
    assert sorted(p.name for p in other.iterdir()) == [f"discarded-1-step-0000{s}" for s in (10, 20, 30)]
    with pytest.raises(ConfigError, match=r"resume=gone: manifest.json is missing; type resume=auto"):
        checkpoint.starting_point(own, "gone")


def test_several_writers_between_begin_and_commit(tmp_path: Path) -> None:
    aside = checkpoint.begin(tmp_path, 5)
    for rank in range(3):
        (aside / f"rank-{rank}.bin").write_bytes(bytes([rank]))
    assert checkpoint.newest_valid(tmp_path) == (None, [])
    assert checkpoint.verify(checkpoint.commit(aside, 5, 1)) is None


SAVER = """
import sys
from pathlib import Path
from rlhf_cli.record import checkpoint
folder = Path(sys.argv[1])
def write(path):
    for i in range(4):
        (path / f"{i}.bin").write_bytes(bytes([step % 256]) * 100_000)
step = int(sys.argv[2])
while True:
    step += 1
    checkpoint.save(folder, step - step % 2, write, 2)
    print(step - step % 2, flush=True)
"""


def test_sigkill_at_any_moment_leaves_the_last_finished_checkpoint_valid(tmp_path: Path) -> None:
    """Every second save replaces a checkpoint of the same step. What the process reported as saved must be there."""
    rng, step = random.Random(0), 0
    for _ in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), str(step)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout
        child.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        said = [int(x) for x in child.stdout.read().split()]
        child.wait()
        path, notes = checkpoint.newest_valid(tmp_path)
        assert path is not None and notes == []
        assert checkpoint.step_of(path) >= max(said, default=2)
        data = {p.read_bytes()[:1] for p in path.glob("*.bin")}
        assert len(data) == 1, "files of two saves are mixed"
        step = checkpoint.step_of(path)
