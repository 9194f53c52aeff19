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
from rlhf_cli.judges.rule import RULES, Rule
from rlhf_cli.judges.strict import Unreadable
from rlhf_cli.plan import validate
from rlhf_cli.rewards.combine import Combined
from rlhf_cli.rewards.mpo import COUNT, Mpo, parse_rubric
from rlhf_cli.stages import scoring
from rlhf_cli.types import Experience, Sample

FIRST = "<item>Is it lively?</item>"
CLOSED = "<item>Is it lively?\n- 0: no\n- 5: yes</item>\n<item>### shouting\n- -10: it shouts\n- 0: it does not</item>"


class Lone:
    rank, world = 0, 1

    def broadcast(self, x: Any) -> Any:
        return x

    def gather(self, x: Any) -> list[Any]:
        return [x]


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


@pytest.mark.parametrize(
    "written",
    ["no criteria at all", "<item>open", "<item></item>", "", "It says <item>5 for me</item>. So: <item>a</item>"],
)
def test_a_rubric_that_cannot_be_read_keeps_the_old(written: str, tmp_path: Path) -> None:
    def answer(ask: Ask) -> Reply:
        return Reply("3" if COUNT in ask.system else written) if ask.meta else hackable(ask)

    reward = mpo(Fake(answer), tmp_path)
    for _ in range(3):
        step(reward, ["a", "b"])
    assert (reward.version, reward.rubric) == (0, FIRST)
    assert (
        (tmp_path / "rubrics" / "refused-000003.txt")
        .read_text()
        .startswith("no rewritten rubric could be read; the old one stays: the ")
    )


def test_a_meta_judge_that_is_not_there_is_told_before_training_and_later_keeps_the_old(tmp_path: Path) -> None:
    def answer(ask: Ask) -> Reply:
        return Reply(error="gone") if ask.meta else hackable(ask)

    reward = mpo(Fake(answer), tmp_path)
    for _ in range(3):
        step(reward, ["a", "b"])
    assert reward.version == 0 and (tmp_path / "rubrics" / "refused-000003.txt").read_text().endswith("stays: gone\n")
    assert [a.meta for a in reward.trial()] == [False, True] and len(mpo(interval=0).trial()) == 1


def test_how_many_criteria_is_one_number_or_as_many_as_there_are() -> None:
    reward = mpo()
    assert [reward._count(t) for t in ("4", "12.", "0", "The response says 99, I say 2", "many", None)] == [
        4,
        12,
        1,
        1,
        1,
        1,
    ]


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


def whole(reward: Mpo, texts: list[str]) -> torch.Tensor:
    """A step as the loop takes it: scored, settled, observed; the score that counts."""
    made: list[torch.Tensor] = []
    stage = scoring(Combined({"mpo": (1.0, reward)}), Lone(), 1.0, made.append)  # type: ignore[arg-type]
    samples = tuple(Sample("p", t, uid=f"u{i}") for i, t in enumerate(texts))
    n = len(samples)
    exp = Experience(samples=samples, group=torch.arange(n), ids=torch.zeros(n, 1, dtype=torch.int64))
    done = stage(exp)
    assert torch.equal(made[0], done.score) and torch.equal(done.score, done.components["mpo"])
    return done.score


def test_each_version_has_its_own_mean_and_spread() -> None:
    # The rule's sums on 0..5 for 0, 64 and 192 characters: 0, 3, 4. Step 1: mean 7/3, population variance 26/9.
    # Step 2 adds 3, 3: of 0, 3, 4, 3, 3 the mean is 13/5 and the variance 43/5 - 169/25 = 46/25.
    reward = mpo(normalize="per_version_meanstd", interval=2)
    first, second = whole(reward, ["", "x" * 64, "x" * 192]), whole(reward, ["x" * 64] * 2)
    assert first.tolist() == pytest.approx([(v - 7 / 3) / (26 / 9) ** 0.5 for v in (0, 3, 4)], abs=1e-6)
    assert second.tolist() == pytest.approx([(3 - 13 / 5) / (46 / 25) ** 0.5] * 2, abs=1e-6)
    # Version 1 has two criteria of 1..5, floor(1 + 5 q): sums 2, 6, 8 (q = 0, 1/2, 3/4). Nothing of version 0 is left.
    assert reward.version == 1 and reward.moments.count == 0
    mean, std = 16 / 3, (104 / 3 - 256 / 9) ** 0.5
    third = whole(reward, ["", "x" * 64, "x" * 192])
    assert third.tolist() == pytest.approx([(v - mean) / std for v in (2, 6, 8)], abs=1e-6)
    assert whole(mpo(normalize="per_version_meanstd"), ["a", "a"]).tolist() == [0.0, 0.0], "no spread yet"


def test_the_moments_are_of_a_whole_step_and_missing_rows_are_none() -> None:
    def answer(ask: Ask) -> Reply:
        return Reply("?") if shown(ask) == ["lost"] else ask.stand_in(RULES["length"])

    reward = mpo(Fake(answer), normalize="per_version_meanstd")
    scores = whole(reward, ["", "lost", "x" * 64])
    assert scores.tolist() == pytest.approx([-1.0, 1.0]) and reward.moments.count == 2


def test_the_meta_judge_reads_points_whatever_counts() -> None:
    for how in ("none", "by_max", "per_version_meanstd"):
        reward = mpo(normalize=how)
        whole(reward, ["x" * 64, ""])
        assert sorted(c[3] for c in reward.seen) == pytest.approx([0.0, 3.0]), how


def test_the_moments_go_on_where_they_were_and_an_older_run_without_them_goes_on() -> None:
    one = mpo(normalize="per_version_meanstd", interval=4)
    whole(one, ["", "x" * 64])
    state = json.loads(json.dumps(one.state_dict()))
    other = mpo(normalize="per_version_meanstd", interval=4)
    other.load_state_dict(state)
    for texts in (["x" * 192, "x"], ["x" * 64, ""], ["", "x" * 9], ["x" * 64, "x" * 300]):  # a new version on the way
        assert torch.equal(whole(one, texts), whole(other, texts))
    assert one.state_dict() == other.state_dict() and one.version == 1
    del state["moments"]
    old = mpo()
    old.load_state_dict(state)
    assert old.moments.count == 0 and old.steps == 1


def test_a_rubric_never_changes_within_a_step() -> None:
    settings = ["reward=mpo", "judge.backend=rule", "select=drop_zero_variance", "batch.resample=3"]
    with pytest.raises(ConfigError, match=r"^reward=mpo changes every so many scored rollouts, and batch\.resample=3"):
        validate(compose("train", settings, None))
