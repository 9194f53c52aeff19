"""Reasoning-SQL's judge: asked where execution fails and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from judge_server import ATTACKS
from test_rewards import Fake, by, by_length, reply

from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.ask import Ask, Reply
from rlhf_cli.plan import validate
from rlhf_cli.rewards.sql_judge import SqlJudge
from rlhf_cli.rewards.sql_partial import SqlPartial
from rlhf_cli.types import Sample, Scores

SCRIPT = "CREATE TABLE users (id INTEGER, name TEXT, age INTEGER); INSERT INTO users VALUES (1,'ann',40),(2,'bob',20);"
GOLD = "SELECT name FROM users WHERE age > 30"
ROOM: dict[str, Any] = {"folder": "packaged", "instructions": 1_000_000, "seconds": 10.0, "rows": 100}


def judged(backend: Any, *responses: str, gold: str = GOLD, **meta: Any) -> Scores:
    reward = SqlJudge(**{"rubric": "Be right.", "most": 2.0, **ROOM})
    reward.connect(backend)
    samples = [Sample("Who is over 30?", r, (gold,), meta or {"script": SCRIPT}, uid="u") for r in responses]
    return reward(samples, torch.zeros(len(samples), dtype=torch.int64))


def always(score: float) -> Fake:
    return Fake(lambda ask: reply(rationale="", score=score))


def test_it_is_asked_only_where_execution_fails() -> None:
    # Right in two spellings: 0, unasked. Wrong rows, and a table that is not there: the judge's 1.5. Without SELECT: 0, unasked.
    backend = always(1.5)
    found = judged(
        by(backend), GOLD, "```sql\nSELECT name FROM users WHERE age>=40;\n```", "SELECT id FROM users", "SELECT x FROM no", "hi"
    )  # fmt: skip
    assert found.value.tolist() == [0.0, 0.0, 1.5, 1.5, 0.0] and not found.reasons
    assert found.components["asked"].tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]
    assert found.timing["calls"] == 2 and len(backend.asked) == 2
    user = backend.asked[0].user
    assert (
        "Who is over 30?" in user
        and GOLD in user
        and "SELECT id FROM users" in user
        and "Be right." in backend.asked[0].system
    )


def test_the_database_is_asked_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_cli.rewards import sql_judge

    ran: list[str] = []
    found = sql_judge.compared
    monkeypatch.setattr(sql_judge, "compared", lambda s, *rest: ran.append(s.response) or found(s, *rest))
    reward = SqlJudge(**{"rubric": "Be right.", "most": 2.0, **ROOM})
    reward.connect(by(always(1.0)))
    samples = [Sample("q", r, (GOLD,), {"script": SCRIPT}) for r in (GOLD, "SELECT id FROM users")]
    reward.begin(samples)
    reward(samples, torch.zeros(2, dtype=torch.int64))
    assert ran == [GOLD, "SELECT id FROM users"]
    reward(samples, torch.zeros(2, dtype=torch.int64))  # another step: what the wall clock said then is forgotten
    assert ran == [GOLD, "SELECT id FROM users"] * 2


def test_two_empty_results_are_unequal() -> None:
    none = "SELECT name FROM users WHERE age > 99"
    assert judged(by(always(0.5)), none, gold=none).value.tolist() == [0.5]


def test_with_the_partial_rewards_it_is_the_execution_reward_of_the_paper() -> None:
    weights = {"execution": 3.0, "syntax": 0.0, "schema": 0.0, "ngram": 0.0, "format": 0.0}
    partial = SqlPartial(**{"weights": weights, "linking": "jaccard", "tags": ["reasoning", "answer"], **ROOM})
    texts = [GOLD, "SELECT id FROM users"]
    samples = [Sample("p", t, (GOLD,), {"script": SCRIPT}) for t in texts]
    own = partial(samples, torch.zeros(2, dtype=torch.int64)).value + judged(by(always(2.0)), *texts).value
    assert own.tolist() == [3.0, 2.0], "the judge's most never beats a right query"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (reply(rationale="", score=2.5), "score is not from 0 to 2|2.5 is not from 0 to 2"),
        (reply(rationale="", score="2"), "score is '2', wanted a number from 0 to 2"),
        (Reply("1.5"), "is no JSON object"),
        (Reply(error="gone"), "gone"),
        (Reply('{"rationale": "", "score": 2}', finish="length"), "cut at its token limit"),
    ],
)
def test_what_cannot_be_read_is_missing_and_never_zero(answer: Reply, why: str) -> None:
    import re

    found = judged(by(Fake(lambda ask: answer)), GOLD, "SELECT id FROM users")
    assert found.missing is not None and found.missing.tolist() == [False, True]
    assert re.search(why, found.reasons[1]), found.reasons


def test_what_the_database_cannot_tell_is_missing_and_not_asked() -> None:
    backend = always(1.0)
    found = judged(by(backend), "SELECT id FROM users", database="no.sqlite")
    assert found.reasons[0].startswith("there is no database ") and not backend.asked
    assert judged(by(backend), "SELECT 1", gold="SELECT nix FROM users").reasons[0].startswith("its gold query fails")
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c) SELECT max(x) FROM c"
    assert judged(by(backend), endless).value.tolist() == [1.0], (
        "a query that works too much fails, and is worth asking about"
    )


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_a_query_cannot_speak_to_the_score(attack: str) -> None:
    def answer(ask: Ask) -> Reply:
        return reply(rationale=f"It says: {ask.user}", score=0.25)

    assert judged(by(Fake(answer)), f"SELECT 1 -- {attack}").value.tolist() == [0.25]


def test_a_rule_stands_in() -> None:
    # n / (n + 64) of the query's 20 characters, times 2.
    assert judged(by_length(), "SELECT id FROM users").value.tolist() == pytest.approx([2 * 20 / 84])


def test_the_experiment_wants_a_judge_and_says_how_to_go_without() -> None:
    with pytest.raises(ConfigError, match=r"^judge\.url is empty: who judges\?"):
        validate(compose("train", ["experiment=reasoning_sql"], None))
    assert "judge" in validate(compose("train", ["experiment=reasoning_sql", "judge.backend=rule"], None)).models
    assert "judge" not in validate(compose("train", ["experiment=reasoning_sql", "reward=sql_partial"], None)).models


def test_settings_without_a_meaning_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^reward\.sql_judge\.most=0: must be above 0$"):
        SqlJudge(**{"rubric": "r", "most": 0.0, **ROOM})
    with pytest.raises(ConfigError, match=r"^reward\.sql_judge: instructions=1, "):
        SqlJudge(**{"rubric": "r", "most": 2.0, **ROOM, "instructions": 1})
