"""Where a run begins is asked for once: a requeue or another resume goes on with the line that it began."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_cli.compose import compose
from rlhf_cli.config import load_config
from rlhf_cli.launch import local, step
from rlhf_cli.record import checkpoint
from rlhf_cli.record.rundir import RunDir
from rlhf_cli.worker import Session


def save(run: RunDir, *steps: int) -> None:
    for n in steps:
        checkpoint.save(run.checkpoints, n, lambda p: (p / "a").write_text("x") and None, keep=9)


def frozen(path: Path, asked: str) -> RunDir:
    from omegaconf import OmegaConf

    run = RunDir(path).create()
    cfg = compose("train", ["debug=tiny"], None)
    cfg.resume, cfg.run.dir, cfg.run.name = asked, str(path.parent), path.name
    run.save_config(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    return run


def started(run: RunDir) -> Session:
    """A session that reads the frozen configuration, as every try of a job does, and has found where to begin."""
    session = Session.__new__(Session)
    session.rundir, session.cfg = run, load_config(run.path)
    session.found = session._find()[0]  # type: ignore[attr-defined]
    return session


def begins(run: RunDir) -> str:
    found = started(run).found  # type: ignore[attr-defined]
    return Path(found).name if found else ""


def test_never_starts_over_once_and_a_requeue_goes_on(tmp_path: Path) -> None:
    run = frozen(tmp_path / "a", "never")
    save(run, 10, 50)
    assert begins(run) == "" and load_config(run.path).resume == "auto"
    assert begins(run) == "", "nothing of the abandoned line is taken, also before the first checkpoint of the new one"
    save(run, 3)
    assert begins(run) == "step-000003"


def test_an_older_checkpoint_is_gone_back_to_once(tmp_path: Path) -> None:
    run = frozen(tmp_path / "a", str(tmp_path / "a" / "checkpoints" / "step-000010"))
    save(run, 10, 50)
    assert begins(run) == "step-000010" and load_config(run.path).resume == "auto"
    save(run, 12)
    assert begins(run) == "step-000012" and begins(run) == "step-000012"


def test_another_runs_checkpoint_is_needed_until_there_is_one_of_this_run(tmp_path: Path) -> None:
    other, run = RunDir(tmp_path / "b").create(), None
    save(other, 20)
    run = frozen(tmp_path / "a", str(other.checkpoints / "step-000020"))
    assert begins(run) == "step-000020" and load_config(run.path).resume.endswith("step-000020")
    session = started(run)
    save(run, 21)
    session._begun()  # after the first checkpoint
    assert load_config(run.path).resume == "auto" and begins(run) == "step-000021"


@pytest.mark.parametrize(("own", "asked"), [((), "other"), ((21,), "auto")])
def test_resume_forgets_another_runs_checkpoint_when_there_is_one(
    own: tuple[int, ...], asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = frozen(tmp_path / "a", "other")
    save(run, *own)
    seen: list[str] = []
    monkeypatch.setattr(local.Local, "__call__", lambda self, cfg, freeze: seen.append(cfg.resume) or 0)
    assert local.resume(run.path, []) == 0 and seen == [asked]


def test_a_requeued_job_that_types_its_command_again_does_not_start_over_again(tmp_path: Path) -> None:
    task = step.Step("7", 7, 0, 0, 0, 2, 1, "", 1, restarts=0)
    run = frozen(tmp_path / "a", "auto")
    cfg = load_config(run.path)
    cfg.resume = "never"
    assert local.repeated(cfg, replace(task, restarts=1)) == "never", "another command's run"
    run.write_json("job.json", {"job": "7"})
    assert local.repeated(cfg, task) == "never" and local.repeated(cfg, replace(task, restarts=1)) == "auto"
