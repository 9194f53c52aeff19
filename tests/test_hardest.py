"""Choosing prompts by what the initial policy scores on them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_cli.compose import compose
from rlhf_cli.data.record import Record
from rlhf_cli.engine.comm import Comm
from rlhf_cli.errors import ConfigError
from rlhf_cli.hardest import Banded, choose
from rlhf_cli.plan import validate
from rlhf_cli.prepass import References
from rlhf_cli.sources.sampled import Sampled

SCORES = dict(enumerate([0.5, 0.1, 0.9, 0.3, 0.1, 0.7, 0.2]))
ALONE = [[i] for i in SCORES]


@pytest.mark.parametrize(
    ("band", "k", "chosen"),
    [
        ("hardest", 3, [1, 4, 6]), ("hardest", 1, [1]), ("easiest", 2, [2, 5]),
        ("medium", 3, [0, 3, 6]),  # ranked .1 .1 .2 .3 .5 .7 .9: the window of three in the middle is .2 .3 .5
    ],
)  # fmt: skip
def test_bands(band: str, k: int, chosen: list[int]) -> None:
    assert choose(SCORES, ALONE, k, band, 0) == chosen


def test_the_hardest_are_the_k_smallest_scores() -> None:
    g = torch.Generator().manual_seed(0)
    score = dict(enumerate(torch.rand(50, generator=g).tolist()))
    for k in (1, 7, 50):
        picked = choose(score, [[i] for i in score], k, "hardest", 0)
        assert sorted(score[i] for i in picked) == sorted(score.values())[:k] and picked == sorted(picked)
    some, again = (choose(score, [[i] for i in score], 7, "random", 3) for _ in range(2))
    assert some == again != choose(score, [[i] for i in score], 7, "random", 4)


def test_links_stay_whole_and_what_has_no_score_is_never_chosen() -> None:
    assert choose(SCORES, [[0, 1], [2, 3], [4, 5]], 2, "hardest", 0) == [0, 1]  # means .3, .6, .4
    partly = {i: s for i, s in SCORES.items() if i != 1}
    assert choose(partly, ALONE, 2, "hardest", 0) == [4, 6]
    with pytest.raises(
        ConfigError, match=r"dataset.hardest=9: only 6 training prompts have a score of the initial policy"
    ):
        choose(partly, ALONE, 9, "hardest", 0)


def record(i: int) -> Record:
    return Record(({"role": "user", "content": str(i)},), str(i), uid=f"u{i}", where=f"f:{i}")


def test_a_source_draws_from_the_chosen_only_and_goes_on_after_a_resume() -> None:
    records = [record(i) for i in range(6)]
    made: list[Any] = [
        Sampled(records, [[1]] * 6, SimpleNamespace(), lambda: None, SimpleNamespace(), prompts=2, samples=1, seed=0)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    made[0].keep([4, 1, 2])
    taken = [made[0]._take() for _ in range(3)]
    assert sorted(i for t in taken for i in t) == [1, 1, 2, 2, 4, 4]
    made[1].load_state_dict(made[0].state_dict())
    made[1].keep([1, 2, 4])
    assert made[1]._take() == made[0]._take()


def test_the_choice_is_told_and_written(tmp_path: Path) -> None:
    lines = [
        {"uid": f"u{i}", "tokens": [1, 1], "responses": ["", ""], "scores": {"bleu": s, "length": [1.0, 1.0]}}
        for i, s in enumerate(([0.5, 0.3], [0.2, None], [0.1, 0.1], [None, None]))
    ]  # means .4, .2, .1, none; times the weight 2, and length logged only
    prepass: Any = SimpleNamespace(run=lambda *a: True, references=lambda: References(lines, 2))
    kept: list[Any] = []
    said: list[str] = []
    weights, path = {"bleu": 2.0, "length": 0.0}, tmp_path / "chosen.json"
    banded = Banded(
        prepass, kept.append, [record(i) for i in range(4)], weights, 2, "hardest", 0, path, Comm(torch.device("cpu"))
    )
    assert banded.run(0, lambda: False, said.append)
    assert kept == [[1, 2]] and banded.scores() == pytest.approx({0: 0.8, 1: 0.4, 2: 0.2})
    assert [c["where"] for c in json.loads(path.read_text())["chosen"]] == ["f:1", "f:2"]
    assert said == [
        "2 of 4 training prompts are drawn (hardest): the initial policy scores 0.3000 on them, 0.4667 on all; chosen.json lists them"
    ]
    prepass.run = lambda *a: False
    assert not banded.run(0, lambda: False, said.append) and len(kept) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dataset.hardest=-1"], "dataset.hardest=-1: must be at least 0"),
        (["dataset.hardest=3", "dataset.band=hard"], "dataset.band: 'hard' is not allowed; choose one of hardest, medium, easiest, random; did you mean 'hardest'?"),
        (["dataset.hardest=3", "algo=sft"], "dataset.hardest: it takes responses of the initial policy and a reward; type source=sampled reward=NAME, or dataset.hardest=0"),
        (["dataset.hardest=3", "environment=guess_number", "reward=environment"], "environment: a prepass compares with single responses of the initial policy; type environment=none, or a shaping without references"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        validate(compose("train", words, None))
    assert str(e.value) == said


def test_the_plan_says_it() -> None:
    plan = validate(compose("train", ["experiment=bleuberi"], None))
    assert [s.does for s in plan.stages if s.name == "choice"] == ["96 training prompts by these scores: hardest"]
    assert any(n.startswith("prepass: before the first step 1 responses") for n in plan.notes)
