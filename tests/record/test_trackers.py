"""Trackers may fail: W&B offline is real, a failing one is turned off, a repeated stretch is not sent twice."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config import build
from rlhf_cli.record.trackers import Mirror, Start, TensorBoard, WandB, has_key

CONF = Path(__file__).parents[2] / "conf" / "tracker"


class Fake:
    """Fails in one method."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.seen: list[Any] = []

    def _do(self, name: str, *what: Any) -> None:
        if name == self.fails:
            raise OSError("no route to host\nsecond line")
        self.seen.append((name, *what))

    def start(self, run: Start) -> None:
        self._do("start", run.step, dict(run.state))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._do("log", step, dict(values))

    def finish(self, status: str) -> None:
        self._do("finish", status)

    def state(self) -> dict[str, Any]:
        self._do("state")
        return {"id": "new"}


@pytest.mark.parametrize("fails", ["start", "log", "state", "finish"])
def test_a_failing_tracker_warns_once_and_harms_nobody(tmp_path: Path, fails: str) -> None:
    notes: list[str] = []
    bad, good = Fake(fails), Fake()
    mirror = Mirror({"bad": bad, "good": good}, notes.append)
    mirror.start(tmp_path, {"api_key": "x"}, 4, {"bad": {"id": "old"}})
    for step in (5, 6):
        mirror.log(step, {"step": step, "a": 1.0, "nan": float("nan"), "text": "x"})
    state = mirror.state()
    mirror.finish("finished")
    assert notes == ["warning: tracker bad is off from here on, the run goes on: OSError: no route to host"]
    assert good.seen == [
        ("start", 4, {}), ("log", 5, {"a": 1.0}), ("log", 6, {"a": 1.0}), ("state",), ("finish", "finished"),
    ]  # fmt: skip
    assert state["bad"] == {"id": "old" if fails != "finish" else "new"}, (
        "a failed tracker keeps its id in the checkpoint"
    )


def test_options_build() -> None:
    import yaml

    found = {p.stem: yaml.safe_load(p.read_text()) for p in CONF.glob("*.yaml")}
    assert {k: sorted(v) for k, v in found.items()} == {
        "none": [], "offline": ["tensorboard", "wandb"], "tensorboard": ["tensorboard"], "wandb": ["wandb"],
    }  # fmt: skip
    for nodes in found.values():
        for name, node in nodes.items():
            assert isinstance(build(node, f"tracker.{name}"), WandB | TensorBoard)


def test_key_from_environment_or_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_key()


WANDB = """
import json, sys
from pathlib import Path
from rlhf_cli.record.trackers import Mirror, WandB
path, mode, first, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
notes = []
mirror = Mirror({"wandb": WandB(mode=mode, project="p", entity=None)}, notes.append)
mirror.start(path, {"lr": 0.1, "judge": {"api_key": "topsecret"}}, first, {})
assert "wandb" in mirror.trackers, notes
print("to the console")
sent = []
real = mirror.trackers["wandb"]._run.log
mirror.trackers["wandb"]._run.log = lambda values, step: (sent.append(step), real(values, step=step))
for step in range(first + 1, last + 1):
    mirror.log(step, {"score/mean": step / 3})
mirror.log(last, {"eval/reward": 0.5})
state = mirror.state()
mirror.finish("finished")
Path(sys.argv[5]).write_text(json.dumps({"notes": notes, "sent": sent, "state": state}))
"""


def wandb_run(path: Path, mode: str, first: int, last: int, **environment: str) -> tuple[dict[str, Any], str]:
    pytest.importorskip("wandb", reason="WANDB IS NOT INSTALLED: the W&B tracker is not tested")
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"NETRC": "/nowhere"} | environment
    path.mkdir(exist_ok=True)
    out = path.parent / "out.json"
    command = [sys.executable, "-c", WANDB, str(path), mode, str(first), str(last), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout + done.stderr


def test_wandb_writes_an_offline_run_silently_and_resumes_it_without_repeating(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first, printed = wandb_run(path, "offline", 0, 5)
    assert printed == "to the console\n" and first["notes"] == []
    assert not list(path.rglob("output.log")), "the console is not captured"
    (file,) = path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"score/mean" in file.read_bytes() and b"topsecret" not in file.read_bytes()
    assert first["state"]["wandb"]["last"] == 5 and first["state"]["wandb"]["id"] in file.name
    assert first["sent"] == [1, 2, 3, 4, 5, 5]
    again, _ = wandb_run(path, "online", 2, 7)  # killed after step 5, resumed from 2; and there is no key
    assert again["notes"] == ["W&B has no key (WANDB_API_KEY, or `wandb login`); writing offline"]
    assert again["sent"] == [6, 7, 7]
    assert again["state"]["wandb"]["id"] == first["state"]["wandb"]["id"]


def test_wandb_gets_the_rows_that_its_service_did_not_live_to_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, dict[str, float]]] = []

    class Service:
        id, step = "abc", 0

        def log(self, values: dict[str, float], step: int) -> None:
            sent.append((step, values))

    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "mirror.json").write_text(json.dumps({"id": "abc", "last": 1}))  # then a signal ended it
    rows = [{"step": n, "score/mean": n / 2, "text": "x"} for n in (1, 2, 3)]  # the third is of no checkpoint
    torn = '{"step": 4, "sc'
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + torn)
    (tmp_path / "evaluations.jsonl").write_text(json.dumps({"step": 2, "eval/reward": 0.5}) + "\n")
    monkeypatch.setattr(WandB, "_init", lambda *_: Service())
    wandb = WandB(mode="offline", project="p", entity=None)
    wandb.start(Start(tmp_path, {}, 2, {}, print))
    assert sent == [(2, {"score/mean": 1.0, "eval/reward": 0.5})]
    wandb.log(3, {"score/mean": 1.5})
    assert [step for step, _ in sent] == [2, 3]


def test_wandb_without_network_goes_offline_in_seconds(tmp_path: Path) -> None:
    with socket.socket() as s:  # a port that refuses
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
    got, printed = wandb_run(tmp_path / "run", "online", 0, 2, WANDB_API_KEY="0" * 40, WANDB_BASE_URL=url)
    path = tmp_path / "run"
    send = f"wandb sync {path}/wandb/offline-run-*"
    assert got["notes"] == [
        f"W&B cannot be reached ([Errno 111] Connection refused); writing offline, send it later: {send}"
    ]
    assert got["sent"] == [1, 2, 2] and printed == "to the console\n"
    assert len(list(path.glob("wandb/offline-run-*/run-*.wandb"))) == 1


def test_tensorboard_rewrites_what_a_resume_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TENSORBOARD IS NOT INSTALLED: its tracker is not tested")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, offset in ((0, 5, 0.0), (3, 6, 0.5)):  # killed after 5, resumed from 3
        t = TensorBoard()
        t.start(Start(tmp_path, {}, first, {}, print))
        for step in range(first + 1, last + 1):
            t.log(step, {"score/mean": step + offset})
        t.state()
        t.finish("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("score/mean")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5),
    ]  # fmt: skip
