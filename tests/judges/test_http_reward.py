"""reward=http against a server on this machine: what is sent, what an answer may be, and what a fault costs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from judge_server import Body, Say, Server, serving

from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.network import Limits, Network
from rlhf_cli.rewards.http import Http, read_answer
from rlhf_cli.types import Sample, Scores

KEY = "t0ken-of-the-server-5512"
SAMPLES = [
    Sample("Say a.", "a", ("r",), {"level": 2, "where": "file:1"}, "u"),
    Sample("Say a.", "bbb", ("r",), {"level": 2, "where": "file:1"}, "u"),
    Sample("Say b.", "cc\ud800", uid="v"),
    Sample("Say b.", "cc\ud800", uid="v"),
]
GROUP = torch.tensor([0, 0, 1, 1])


async def no_wait(seconds: float) -> None:
    pass


def http(server: Server, **changes: Any) -> Http:
    settings: dict[str, Any] = {"sees": "group", "key_env": "", "concurrency": 4, "timeout": 20.0, "retries": 2}
    made = Http(**{"url": server.url, **settings, **changes})
    made.network = Network(made.network.limits, no_wait)
    return made


def give(**body: Any) -> Say:
    return Say(raw=json.dumps(body).encode())


def lengths(body: Body, n: int) -> Say:
    return give(values=[len(s["response"]) for s in body["samples"]])


def score(reward: Http, samples: list[Sample] = SAMPLES) -> Scores:
    return reward(samples, GROUP[: len(samples)])


def test_what_is_sent_and_read() -> None:
    with serving(lengths) as server:
        scores = score(http(server))
        bodies = sorted(server.bodies, key=lambda b: b["samples"][0]["uid"])
    assert scores.value.tolist() == [1.0, 3.0, 3.0, 3.0] and not scores.missing.any()  # type: ignore[union-attr]
    assert [len(b["samples"]) for b in bodies] == [2, 2]
    assert bodies[0]["samples"][1] == {
        "uid": "u", "prompt": "Say a.", "response": "bbb", "references": ["r"], "meta": {"level": 2},
    }  # fmt: skip
    assert bodies[1]["samples"][0]["response"] == "cc?", "what UTF-8 cannot hold is replaced"
    assert (scores.timing["calls"], scores.timing["failed"], scores.timing["retries"]) == (2, 0, 0)


def test_one_response_a_request() -> None:
    with serving(lengths) as server:
        assert score(http(server, sees="sample")).value.tolist() == [1.0, 3.0, 3.0, 3.0]
        assert [len(b["samples"]) for b in server.bodies] == [1] * 4


@pytest.mark.parametrize("sees", ["group", "sample"])
def test_what_is_begun_is_sent_once(sees: str) -> None:
    """Two of the responses are equal: each is a request of its own."""
    with serving(lengths) as server:
        reward = http(server, sees=sees)
        reward.begin(SAMPLES[:2])
        reward.begin(SAMPLES[2:])
        assert score(reward).value.tolist() == [1.0, 3.0, 3.0, 3.0]
        assert len(server.bodies) == (2 if sees == "group" else 4)
        score(reward)
        assert len(server.bodies) == (4 if sees == "group" else 8), "and a later step asks anew"


def test_null_is_missing_and_parts_are_kept() -> None:
    body = {"values": [0.5, None], "components": {"style": [1, None]}, "reasons": [None, "too rude"]}
    with serving(lambda b, n: give(**body)) as server:
        scores = score(http(server), SAMPLES[:2])
    assert scores.missing.tolist() == [False, True] and math.isnan(scores.value[1])  # type: ignore[union-attr]
    assert scores.components["style"][0] == 1 and math.isnan(scores.components["style"][1])
    assert scores.reasons == {1: "too rude"}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ([1, 2], "no list `values` for 2 samples"),
        ({"values": 3}, "no list `values` for 2 samples"),
        ({"values": [1]}, "holds 1 values for 2 samples"),
        ({"values": [1, 2], "components": {"a": [1]}}, "are no lists of 2"),
        ({"values": [1, 2], "components": [1, 2]}, "are no lists of 2"),
        ({"values": [1, 2], "reasons": "x"}, "are no lists of 2"),
        ({"values": [True, "1"]}, "its value is 'True'"),
        ({"values": [math.nan, math.inf]}, "its value is 'nan'"),
        ({"values": [1e39, 10**400]}, "its value is '1e\\+39'"),
        ({"values": [None, None]}, "the server says null"),
    ],
)
def test_another_form_is_missing_never_a_number(body: Any, why: str) -> None:
    rows = read_answer(body, 2)
    assert [r.value for r in rows] == [None, None] and re.search(why, rows[0].reason), rows


def once(fault: Say) -> Callable[[Body, int], Say]:
    return lambda body, n: fault if n == 0 else lengths(body, n)


@pytest.mark.parametrize(
    "fault",
    [Say(status=429, raw=b""), Say(status=500, raw=b"oops"), give(values=[1, 2]), Say(raw=b"no JSON"), Say(sleep=1.0)],
    ids=["429", "500", "cut", "text", "slow"],
)
def test_a_fault_that_passes_costs_one_retry(fault: Say) -> None:
    fault.cut = 5 if fault.raw == give(values=[1, 2]).raw else 0
    with serving(once(fault)) as server:
        scores = score(http(server, timeout=0.4 if fault.sleep else 20.0), SAMPLES[:2])
    assert scores.value.tolist() == [1.0, 3.0]
    assert (scores.timing["retries"], scores.timing["failed"]) == (1, 0)


@pytest.mark.parametrize(
    ("fault", "said", "asked"),
    [
        (Say(status=503, raw=b""), "the server failed: status 503; tried 3 times", 3),
        (Say(status=404, raw=b"no such path"), "the server failed: status 404: no such path", 1),
        (Say(raw=b"hello"), "the server failed: its answer is no JSON; tried 3 times", 3),
        (Say(sleep=0.4), r"no answer within 0\.1 s \(reward\.http\.timeout\); tried 3 times", 3),
    ],
)
def test_a_fault_that_stays_is_missing_with_its_reason(fault: Say, said: str, asked: int) -> None:
    with serving(lambda body, n: fault) as server:
        scores = score(http(server, timeout=0.1 if fault.sleep else 20.0), SAMPLES[:2])
        assert len(server.bodies) == asked
    assert scores.missing.tolist() == [True, True] and re.search(said, scores.reasons[0])  # type: ignore[union-attr]
    assert (scores.timing["failed"], scores.timing["retries"]) == (1, asked - 1)


def test_nobody_listens() -> None:
    with serving(lengths) as server:
        reward = http(server, retries=0)
    scores = score(reward, SAMPLES[:2])
    assert scores.reasons[0] == "the server failed: no answer (ConnectError)"


def test_the_token_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TOKEN", KEY)
    with serving(lambda b, n: give(values=[None], reasons=[f"you sent {KEY}"])) as server:
        scores = score(http(server, key_env="TEST_TOKEN"), SAMPLES[:1])
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert scores.reasons == {0: "you sent <redacted>"}
    body = {"values": [1], "components": {KEY: [1]}}
    with serving(lambda b, n: give(**body)) as server:
        scores = score(http(server, key_env="TEST_TOKEN"), SAMPLES[:1])
    assert list(scores.components) == ["<redacted>"]
    with serving(lambda b, n: give(values=[None], reasons=["x" * 195 + KEY])) as server:
        scores = score(http(server, key_env="TEST_TOKEN"), SAMPLES[:1])
    assert KEY[:3] not in scores.reasons[0], "hidden before it is cut off"
    with serving(lambda b, n: Say(status=400, raw=KEY.encode())) as server:
        scores = score(http(server, key_env="TEST_TOKEN"), SAMPLES[:1])
    assert KEY not in scores.reasons[0] and "<redacted>" in scores.reasons[0]


def test_no_more_requests_at_a_time_than_allowed() -> None:
    def slow(body: Body, n: int) -> Say:
        say = lengths(body, n)
        say.sleep = 0.02
        return say

    with serving(slow) as server:
        score(http(server, sees="sample", concurrency=2))
        assert server.most_at_once <= 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"url": ""}, r"^reward\.http\.url is empty; type reward\.http\.url=http://HOST:PORT/PATH$"),
        ({"url": "here"}, "wanted an address such as"),
        ({"url": "http://me:pw@h/"}, r"reward\.http\.key_env=NAME"),
        ({"key_env": "sk-123"}, "wanted the name of an environment variable, never a key"),
        ({"key_env": "NOT_SET_ANYWHERE"}, "the environment variable is not set"),
        ({"concurrency": 0}, "concurrency=0.*type larger numbers"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    settings: dict[str, Any] = {
        "url": "http://127.0.0.1:1",
        "sees": "group",
        "key_env": "",
        "concurrency": 1,
        "timeout": 1.0,
    }
    with pytest.raises(ConfigError, match=said):
        Http(**{**settings, "retries": 0, **changes})


def test_the_limits_of_a_judge_keep_their_name() -> None:
    assert Limits(1, 1.0, 0).named == "judge.timeout"
