"""The `judge` section: what is refused before anything is asked, who judges, and what stands in."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.launch.local import _hard
from rlhf_cli.plan import validate

URL = "judge.url=http://127.0.0.1:8000/v1"


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as e:
        validate(compose("train", ["reward=judge", *words], None))
    return str(e.value)


def test_nobody_judges() -> None:
    assert refused() == (
        "judge.url is empty: who judges? type judge.url=http://HOST:PORT/v1 judge.model=NAME for an endpoint, "
        "or judge.backend=transformers judge.model=smollm2 (or a folder, run or Hub id)"
    )
    assert refused("judge.backend=transformers").startswith("judge.model is empty: who judges?")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((URL,), "judge.model is empty: which model of http://127.0.0.1:8000/v1? type judge.model=NAME"),
        (("judge.url=host:1", "judge.model=m"), "judge.url=host:1: wanted an address such as http://127.0.0.1:8000/v1"),
        ((URL, "judge.model=m", "judge.timeout=0"), "judge.timeout=0.0: must be at least 0.01"),
        ((URL, "judge.model=m", "judge.retries=-1"), "judge.retries=-1: must be at least 0"),
        (
            ("judge.backend=opnai",),
            "judge.backend=opnai: unknown; choose one of openai, transformers, rule; did you mean 'openai'?",
        ),
        (
            ("judge.backend=rule", "judge.model=hsah"),
            "judge.model=hsah: unknown; choose one of hash, length; did you mean 'hash'?",
        ),
    ],
)
def test_what_is_refused(words: tuple[str, ...], text: str) -> None:
    assert refused(*words) == text


def test_secrets_have_no_place_in_the_configuration() -> None:
    text = refused("judge.url=http://me:hunter2hunter2@host/v1", "judge.model=m")
    assert text.startswith("judge.url=http://host...: an address must hold no user, password or query;")
    assert "hunter2" not in text and "judge.key_env=NAME" in text
    text = refused(URL, "judge.model=m", "judge.key_env=sk-abcdefghijklmnop")
    assert text == "judge.key_env: wanted the name of an environment variable, such as OPENAI_API_KEY, never a key"
    with pytest.raises(ConfigError, match=r"^judge\.api_key: unknown key"):
        compose("train", ["reward=judge", "judge.api_key=x"], None)


@pytest.mark.parametrize(
    ("words", "who"),
    [
        ((URL, "judge.model=m"), "judges responses: m at http://127.0.0.1:8000/v1"),
        (("judge.backend=transformers", "judge.model=smollm2"), "judges responses: smollm2 in this process"),
        (("judge.backend=rule",), "judges by the rule hash, without reading"),
    ],
)
def test_the_plan_says_who_judges(words: tuple[str, ...], who: str) -> None:
    assert validate(compose("train", ["reward=judge", *words], None)).models["judge"] == who


def test_a_rule_stands_in_and_says_so() -> None:
    cfg = compose("train", ["reward=judge", "debug=tiny"], None)
    assert cfg.judge.backend == "rule"
    assert "judge: a rule answers without reading (debug.stand_ins); its numbers mean nothing" in validate(cfg).notes
    given = compose("train", ["reward=judge", "debug=tiny", URL, "judge.model=m"], None)
    assert given.judge.backend == "openai" and not [n for n in validate(given).notes if "stand_ins" in n]
    assert compose("train", ["reward=bleu", "debug=tiny"], None).judge.backend == "openai", "nobody asks a judge"


def test_a_run_may_reach_its_judge_another_way_and_keeps_the_judge() -> None:
    found: dict[str, Any] = {"judge.url": ("a", "b"), "judge.timeout": (1, 2), "judge.model": ("m", "n")}
    assert _hard(found) == ["judge.model"]
