"""The run directory: one writer, whole files, readable names, no secrets."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from rlhf_cli.errors import ConfigError
from rlhf_cli.record import files, rundir
from rlhf_cli.record.provenance import provenance
from rlhf_cli.record.redact import MARK, redact, redact_argv, redact_text
from rlhf_cli.record.rundir import RunDir, name_run

HOLD = """
import os, sys, time
from rlhf_cli.record.rundir import RunDir
run = RunDir(sys.argv[1]).create()
run.claim()
if len(sys.argv) > 2 and os.fork() == 0:
    os.close(1); time.sleep(30); os._exit(0)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def hold(path: Path, *more: str) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(path), *more], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    assert int(child.stdout.readline()) == child.pid
    return child


def test_second_writer_is_named_and_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    child = hold(tmp_path / "a")
    run = RunDir(tmp_path / "a").create()
    host = os.uname().nodename
    expected = f"run a is being written by pid {child.pid} on host {host}; stop it (rlhf cancel {tmp_path / 'a'}), or choose another run.name"
    with pytest.raises(ConfigError) as e:
        run.claim()
    assert str(e.value) == expected
    assert run.writer() == f"pid {child.pid} on host {host}"
    child.kill()
    child.wait()
    assert run.claim() is None
    run.release()
    assert run.writer() is None


def test_a_writer_that_is_about_to_go_is_waited_for(tmp_path: Path) -> None:
    first, second = RunDir(tmp_path / "a").create(), RunDir(tmp_path / "a")
    first.claim()
    with pytest.raises(ConfigError, match="is being written by"):
        second.claim()
    threading.Timer(0.5, first.release).start()
    assert second.claim(60) is None


def test_the_lock_names_nobody_after_a_release_and_a_forked_child_leaves_the_name(tmp_path: Path) -> None:
    run, lock = RunDir(tmp_path / "a").create(), tmp_path / "a" / ".lock"
    run.claim()
    who = json.loads(lock.read_text())
    assert (who["pid"], who["born"]) == (os.getpid(), rundir.born(os.getpid()))
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert json.loads(lock.read_text()) == who and run.writer() == f"pid {os.getpid()} on host {who['host']}"
    run.release()
    assert lock.read_text() == "", "whoever comes next is not taken for this process"


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "a").create()
    monkeypatch.setattr(rundir, "_flock", lambda *_: errno.ENOLCK)
    run.claim()
    said = f"rlhf: warning: {tmp_path / 'a'}: this file system has no locks; do not start it twice\n"
    assert capsys.readouterr().err == said
    run.release()


def test_a_copy_has_no_job_and_a_moved_run_keeps_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a").create()
    run.set_job("12")
    shutil.copytree(run.path, tmp_path / "b")
    assert run.job()["job"] == "12" and RunDir(tmp_path / "b").job() == {}
    run.path.rename(tmp_path / "c")
    assert RunDir(tmp_path / "c").job()["job"] == "12"
    (tmp_path / "c" / "job.json").write_text('{"job": "3"}')  # of a version that did not note the folder
    assert RunDir(tmp_path / "c").job()["job"] == "3"


def test_a_forked_child_does_not_keep_a_dead_run_locked(tmp_path: Path) -> None:
    child = hold(tmp_path / "a", "fork")
    child.kill()
    child.wait()
    RunDir(tmp_path / "a").create().claim()


def test_status_says_where_and_who(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a").create()
    assert run.status() == {}
    run.set_status("preempted", phase="update", step=7, reason="SIGTERM")
    status = run.status()
    assert {k: status[k] for k in ("status", "phase", "step", "reason", "pid")} == {
        "status": "preempted", "phase": "update", "step": 7, "reason": "SIGTERM", "pid": os.getpid(),
    }  # fmt: skip
    assert (run.checkpoints.is_dir(), run.logs.is_dir()) == (True, True)


def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    files.write_json_atomic(path, {"a": float("nan"), "b": (1, 2.5)})
    assert json.loads(path.read_text()) == {"a": None, "b": [1, 2.5]}

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        files.write_json_atomic(path, {"a": 2})
    assert json.loads(path.read_text())["b"] == [1, 2.5]


def test_names_are_readable_and_unique(tmp_path: Path) -> None:
    when = time.mktime((2026, 11, 23, 14, 30, 0, 0, 0, -1))
    names = {"reward": "[bleu, length]", "algo": "grpo", "model": "my/model", "hardware": "cpu"}
    assert name_run(tmp_path, names, when) == "grpo-bleu+length-my_model-20261123-143000"
    assert name_run(tmp_path, names, when) == "grpo-bleu+length-my_model-20261123-143000-2"
    assert name_run(tmp_path, {}, when) == "20261123-143000"


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"^run.dir: cannot write .*file/a: Not a directory; choose another folder with run.dir=DIR$"
    ):
        RunDir(tmp_path / "file" / "a").create()
    with pytest.raises(ConfigError, match=r"^run.dir: cannot write .*file: Not a directory"):
        name_run(tmp_path / "file", {"algo": "grpo"})


WANDB = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("api_key", "x"), ("apiKey", "x"), ("judge_api_key", "abc"), ("token", "abc"), ("hf_token", "abc"),
        ("password", "abc"), ("client_secret", "abc"), ("credentials", "abc"), ("Authorization", "Bearer abc"),
        ("header", "Bearer abcdefgh123"), ("url", "http://me:pw@host"),
        ("note", "hf_" + "a" * 30), ("note", "sk-proj-" + "a" * 30), ("note", WANDB), ("note", "from-env-123"),
    ],
)  # fmt: skip
def test_secrets_go(key: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from-env-123")
    assert MARK in redact({"a": {key: value}})["a"][key]
    assert value not in str(redact({"a": [{key: value}]}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_tokens", 64), ("micro_batch_tokens", "512"), ("pad_token", "<pad>"), ("eos_token", "</s>"), ("token", 5),
        ("tokenizer", "gpt2"), ("api_key_env", "OPENAI_API_KEY"), ("token", ""), ("token", None),
        ("reduce", "token_mean"),
        ("revision", WANDB), ("_target_", "rlhf_cli.reduce.token_mean"), ("use_secret", True), ("note", "from-env"),
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(key: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAD_TOKEN", "from-env")
    assert redact({key: value}) == {key: value}


def test_saved_config_has_no_secret_and_the_rest_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "hunter2222")
    config = {
        "lr": 1e-6,
        "judge": {"url": "https://u:hunter2222@host/v1", "api_key": "k"},
        "stop": ["é", "\n"],
        "n": None,
    }
    run = RunDir(tmp_path / "a").create()
    run.save_config(config)
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {
        **config, "judge": {"url": f"https://{MARK}@host/v1", "api_key": MARK},
    }  # fmt: skip


def test_command_line_and_texts() -> None:
    words = [
        "train",
        "a.api_key=K1",
        "--token=K2",
        "--api-key",
        "K3",
        "r={api_key: K4,max_tokens: 3}",
        "max_tokens=5",
        "pad_token=<p>",
    ]
    assert redact_argv(words) == [
        "train", f"a.api_key={MARK}", f"--token={MARK}", "--api-key", MARK,
        f"r={{api_key: {MARK},max_tokens: 3}}", "max_tokens=5",
        "pad_token=<p>",
    ]  # fmt: skip
    assert redact_text("GET http://h/x?token=abc==&n=1") == f"GET http://h/x?token={MARK}"
    assert redact_text(f"commit {WANDB} key {'0' * 40}") == f"commit {WANDB} key {MARK}"


def test_provenance_has_the_facts_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "f").write_text("1")
    subprocess.run([*git, "add", "f"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    monkeypatch.chdir(tmp_path)
    got = provenance(seeds={"seed": 1}, data={"sha256": "ab"}, model={"path": "m"}, argv=["rlhf", "x.api_key=K"])
    assert got["command"] == ["rlhf", f"x.api_key={MARK}"]
    assert got["git"]["folder"]["dirty"] is False
    assert len(got["git"]["folder"]["commit"]) == 40
    (tmp_path / "f").write_text("2")
    again = provenance(seeds={}, data={}, model={}, argv=[])["git"]["folder"]
    assert (again["dirty"], again["changed_files"]) == (True, 1)
    assert got["packages"]["omegaconf"].count(".") == 2
    assert got["seeds"] == {"seed": 1} and got["memory_gib"] > 0.1 and got["cpu"]["cores"] >= 1
    json.dumps(got)
