"""A key in the environment, servers that quote it in every way, and then: it stands in nothing that a run leaves or says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import e2e_support as e2e
import pytest
from e2e_support import TINY, Done

sys.path.insert(0, str(Path(__file__).parents[1] / "judges"))
from judge_server import Body, Say, Server, serving

pytestmark = pytest.mark.slow
Rlhf = Callable[..., Done]
NAME = "JUDGE_ACCESS"  # says nothing of a secret, so only the setting that names it tells
KEY = "k3y/Zq8vT1x+WmR5pLb0c=="  # an address writes it in another way
FINE = json.dumps({"rationale": "clear", "score": 4})


def quoting(key: str) -> list[Say]:
    """What a server may answer to a question of a judge."""
    return [
        Say(status=500, raw=key.encode()),
        Say(status=401, raw=json.dumps({"error": {"message": f"wrong key {key}"}}).encode()),
        Say(status=400, raw=json.dumps({"error": {"message": "x" * 190 + key}}).encode()),  # cut amid the key
        Say(status=403, raw=f"<a href='?key={quote(key, safe='')}'>".encode()),
        Say(status=429, raw=b"{}", headers={"Retry-After": "0", "X-Key": key}),
        Say(f"You sent {key}"),
        Say(key, finish=key),
        Say(json.dumps({"rationale": key, "score": key})),
        Say(json.dumps({"rationale": key, "score": 3, key: 1})),
        Say(json.dumps({"rationale": key, "score": 3})),
        Say(raw=key.encode()),
    ]


def null(key: str, n: int) -> list[Say]:
    """What a server may answer to samples."""
    bodies: list[Any] = [
        {"values": [None] * n, "reasons": ["y" * 195 + key] * n},
        {"values": [key] * n},
        {"values": [1] * n, "components": {key: [1] * n}},
    ]
    return [Say(status=400, raw=("z" * 95 + key).encode()), *(Say(raw=json.dumps(b).encode()) for b in bodies)]


class Quoting:
    """Answers the question before training well, and everything else with the key."""

    def __init__(self) -> None:
        self.server: Server | None = None

    def __call__(self, body: Body, n: int) -> Say:
        assert self.server is not None
        key = self.server.headers[n]["authorization"].removeprefix("Bearer ")
        if "messages" in body:
            return Say(FINE) if "1 + 1" in body["messages"][1]["content"] else quoting(key)[n % len(quoting(key))]
        says = null(key, len(body["samples"]))
        return says[n % len(says)]


@pytest.fixture
def server() -> Iterator[Server]:
    answer = Quoting()
    with serving(answer) as made:
        answer.server = made
        yield made


def asked(server: Server, *rewards: str) -> list[str]:
    """The rewards, and where their servers and keys are."""
    ways = {
        "judge": [f"judge.url={server.url}", "judge.model=m", f"judge.key_env={NAME}", "judge.retries=1"],
        "http": [f"reward.http.url={server.url}", f"reward.http.key_env={NAME}", "reward.http.retries=0"],
        "python": [],
    }
    return [*TINY, f"reward=[{','.join(rewards)}]", *(w for name in rewards for w in ways[name])]


def absent(*texts: str | bytes) -> None:
    """Neither the key, nor its first third, in any spelling."""
    for text in texts:
        data = text.encode() if isinstance(text, str) else text
        for form in (KEY, KEY[:8], quote(KEY, safe="")[:10], json.dumps(KEY)[1:-1]):
            at = data.find(form.encode())
            assert at < 0, data[max(0, at - 200) : at + 80]


def test_a_run_of_two_ranks_leaves_the_key_nowhere(server: Server, tmp_path: Path) -> None:
    """Metrics, samples, logs of every rank, replies that are kept, W&B's offline files, and the terminal."""
    more = (
        "reward.judge.weight=0",
        "reward.http.weight=0",
        "tracker=offline",
        "hardware.processes=2",
        "gates.failures=0.9",
    )
    body = f"values = [float(os.environ[{NAME!r}]) if sum(map(ord, r)) % 3 == 0 else len(r) for r in responses]"  # an error that quotes it
    mine = e2e.python_reward(tmp_path / "mine.py", body)
    words = [
        *asked(server, "judge", "http", "python"),
        *more,
        mine,
        "reward.python.sees=sample",
        "steps=2",
        f"run.dir={tmp_path}",
        "run.name=r",
    ]
    done = e2e.shell("train", *words, **{NAME: f"{KEY}\n"})
    assert done.code == 0, done.out + done.err
    assert {h["authorization"] for h in server.headers} == {f"Bearer {KEY}"} and len(server.bodies) > 20
    files = [p for p in (tmp_path / "r").rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files) and any("judge" in p.parts for p in files)
    assert any("<redacted>" in p.read_text(errors="replace") for p in files), "something was there to hide"
    absent(done.out, done.err, *(p.read_bytes() for p in files))


def test_a_run_that_fails_tells_why_and_not_the_key(
    server: Server, tmp_path: Path, rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate of failed rewards quotes the first reason, in the terminal, the status and the traceback."""
    monkeypatch.setenv(NAME, KEY)
    monkeypatch.setenv("RLHF_TRACEBACK", "1")
    failing = lambda key: Say(status=401, raw=f"wrong key {key}".encode())  # noqa: E731
    server.answer = lambda body, n: (
        Say(FINE)
        if "1 + 1" in json.dumps(body)
        else failing(server.headers[n]["authorization"].removeprefix("Bearer "))
    )
    words = [f"run.dir={tmp_path}", "tracker=offline"]
    for reward in ("judge", "http"):
        done = rlhf("train", *asked(server, reward), *words, f"run.name={reward}")
        assert done.code != 0 and "wrong key <redacted>" in done.err and "Traceback" in done.err, done.err
        files = [p for p in (tmp_path / reward).rglob("*") if p.is_file()]
        assert any("wrong key <redacted>" in p.read_text(errors="replace") for p in files)
        absent(done.out, done.err, *(p.read_bytes() for p in files))
    server.answer = lambda body, n: failing(server.headers[n]["authorization"].removeprefix("Bearer "))
    done = rlhf("train", *asked(server, "judge"), *words, "run.name=refused")
    assert done.code == 2 and "status 401: wrong key <redacted>" in done.err
    absent(done.out, done.err)


def test_a_key_that_no_header_can_carry_is_refused_and_not_quoted(
    server: Server, tmp_path: Path, rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, f"{KEY} and more")
    for reward in ("judge", "http"):
        done = rlhf("train", *asked(server, reward), f"run.dir={tmp_path}")
        assert done.code == 2 and f"the environment variable {NAME} holds blanks" in done.err, done.err
        absent(done.out, done.err)
