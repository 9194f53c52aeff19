"""A rubric that is rewritten on schedule: kept, resumed, never mixed, and able to close a loophole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rewards import Fake, reply, shown

from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.ask import Ask, Reply, Sampling
from rlhf_cli.judges.cache import Cache
from rlhf_cli.judges.judge import Judge
from rlhf_cli.judges.rule import Rule
from rlhf_cli.judges.strict import Unreadable
from rlhf_cli.plan import validate
from rlhf_cli.rewards.mpo import COUNT, Mpo, parse_rubric
from rlhf_cli.types import Sample

FIRST = "<item>Is it lively?</item>"
CLOSED = "<item>Is it lively?\n- 0: no\n- 5: yes</item>\n<item>### shouting\n- -10: it shouts\n- 0: it does not</item>"


class Lone:
    rank, world = 0, 1

    def broadcast(self, x: Any) -> Any:
        return x


def mpo(backend: Any = None, folder: Path | None = None, **more: Any) -> Mpo:
    reward = Mpo(**{"rubric": FIRST, "low": 0, "high": 5, "interval": 3, "cases": 4, "normalize": "none", **more})
    reward.connect(Judge(backend or Rule("length"), Sampling(0.0, 64, True, {}), Cache(None), folder))
    return reward


def step(reward: Mpo, texts: list[str]) -> torch.Tensor:
    samples = [Sample("p", t, uid=f"u{i}") for i, t in enumerate(texts)]
    scores = reward(samples, torch.arange(len(samples)))
    versions = scores.components["rubric_version"]
    assert bool((versions == versions[0]).all()), "one step, one rubric"
    reward.observe(samples, scores.value, Lone())
    return scores.value


def hackable(ask: Ask) -> Reply:
    """A judge that loves "!!!" and, where its rubric says so, takes 10 off for it; a meta judge that adds that criterion."""
    if ask.meta:
        return Reply("2" if COUNT in ask.system else CLOSED if "<item>" in ask.system else "It rewards shouting.")
    loud = "!!!" in shown(ask)[0]
    found = {"item_1": {"rationale": "", "score": 5 if loud else 0}}
    if "shouting" in ask.system:
        found["item_2"] = {"rationale": "", "score": -10 if loud else 0}
    return reply(**found)


def test_the_rate_of_a_loophole_rises_and_falls_after_the_rubric_closes_it() -> None:
    # A policy of one logit, shouting with probability sigmoid(x); REINFORCE with the exact expectation of its gradient.
    reward, x, rates = mpo(Fake(hackable), interval=20), torch.tensor(-1.0), []
    for _ in range(60):
        p = torch.sigmoid(x)
        loud, calm = step(reward, ["hey!!!", "hey"]).tolist()
        x = x + 0.1 * p * (1 - p) * (loud - calm)
        rates.append(float(p))
    assert rates[0] < 0.3 and max(rates[:21]) == rates[20] > 0.7, "the judge of version 0 teaches shouting"
    assert rates[59] < 0.2 and rates == sorted(rates[:21]) + sorted(rates[21:], reverse=True)
    assert reward.version == 3 and len(reward.items) == 2


def test_the_version_counts_whole_intervals_and_every_one_is_kept(tmp_path: Path) -> None:
    reward = mpo(folder=tmp_path)
    for n in range(1, 12):
        step(reward, ["a", "bb"])
        assert reward.version == n // 3
    kept = sorted(p.name for p in (tmp_path / "rubrics").iterdir())
    assert kept == [f"version-{v:04d}.txt" for v in range(4)]
    assert (tmp_path / "rubrics" / "version-0000.txt").read_text() == FIRST
    assert (tmp_path / "rubrics" / "version-0003.txt").read_text() == reward.rubric


def test_without_rewriting_it_is_a_plain_judge() -> None:
    never, late = mpo(interval=0), mpo(interval=10**9)
    texts = ["", "x" * 64, "x" * 192]
    for _ in range(4):
        assert torch.equal(step(never, texts), step(late, texts))
    # Qualities 0, 1/2, 3/4 on 0..5: floor(6 q).
    assert step(never, texts).tolist() == [0.0, 3.0, 4.0] and (never.version, never.seen) == (0, [])


@pytest.mark.parametrize("written", ["no criteria at all", "<item>open", "<item></item>", ""])
def test_a_rubric_that_cannot_be_read_keeps_the_old(written: str, tmp_path: Path) -> None:
    def answer(ask: Ask) -> Reply:
        return Reply("3" if COUNT in ask.system else written) if ask.meta else hackable(ask)

    reward = mpo(Fake(answer), tmp_path)
    for _ in range(3):
        step(reward, ["a", "b"])
    assert (reward.version, reward.rubric) == (0, FIRST)
    assert (tmp_path / "rubrics" / "refused-000003.txt").exists()


def test_it_goes_on_where_it_was() -> None:
    whole = mpo()
    values = [step(whole, ["a" * n, "b"]) for n in range(1, 8)]
    half = mpo()
    for n in range(1, 5):
        step(half, ["a" * n, "b"])
    again = mpo()
    again.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert all(torch.equal(step(again, ["a" * n, "b"]), values[n - 1]) for n in range(5, 8))
    assert again.state_dict() == whole.state_dict() and again.version == 2


def test_cases_are_drawn_from_all_steps_of_the_interval_and_only_those() -> None:
    backend = Fake(hackable)
    reward = mpo(backend, cases=3)
    for n in range(3):
        step(reward, [f"r{n}{i}" for i in range(8)])
    asked = [a.user for a in backend.asked if a.meta and "analyse this case" in a.system]
    assert len(asked) == 3 and all("Score: 0" in u and "\nr" in u for u in asked) and reward.seen == []


def test_rubrics() -> None:
    items = parse_rubric("<item>free</item> text <item>\n- 1: low\n- 4: high\n</item><item>free</item>", 0, 5)
    assert [(i.low, i.high) for i in items] == [(0, 5), (1, 4)], "points of its lines, or the default; no repetition"
    assert [(i.low, i.high) for i in parse_rubric("<item>x\n- -10: it shouts</item>", 0, 5)] == [(-10, 0)]
    with pytest.raises(Unreadable):
        parse_rubric("nothing", 0, 5)
    with pytest.raises(ConfigError, match=r"^reward\.mpo\.rubric: the rubric has no whole <item>"):
        mpo(rubric="be good")


def test_sums_by_the_largest_sum_and_unreadable_grades() -> None:
    assert step(mpo(normalize="by_max"), ["x" * 64]).tolist() == [0.6000000238418579]  # 3 of 5
    lost = mpo(Fake(lambda ask: reply(item_1={"rationale": "", "score": 9})))
    scores = lost([Sample("p", "r")], torch.zeros(1, dtype=torch.int64))
    assert scores.reasons == {0: "the judge's score of item_1 9 is not from 0 to 5"}


def test_a_rubric_never_changes_within_a_step() -> None:
    settings = ["reward=mpo", "judge.backend=rule", "select=drop_zero_variance", "batch.resample=3"]
    with pytest.raises(ConfigError, match=r"^reward=mpo changes every so many scored rollouts, and batch\.resample=3"):
        validate(compose("train", settings, None))
