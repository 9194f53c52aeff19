"""Principles that a reward model reads: which are drawn, where the score is read, and the preferences that train it."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.compose import compose
from rlhf_cli.data.loading import load_whole
from rlhf_cli.data.text import render, response_ids
from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.ask import Reply
from rlhf_cli.rewards.principle_list import PACKAGED, Principle, drawn, principles_of
from rlhf_cli.rewards.principle_preferences import agreed, by_variance, count, deciding, preference
from rlhf_cli.rewards.principle_records import Pair, main, opinions, records, ruled
from rlhf_cli.rewards.principles import END, Principles, body
from rlhf_cli.types import Sample

SAMPLES = [Sample("What is 2 + 2?", r, uid=u) for u, r in (("a", "4"), ("a", "It is four."), ("b", "22"), ("b", "No."))]
GROUP = torch.tensor([0, 0, 1, 1])
FOUR = [Principle(n, n.upper(), "", w) for n, w in (("a", 1.0), ("b", 2.0), ("c", 4.0), ("d", 0.0))]


def model(**changes: Any) -> Principles:
    settings: dict[str, Any] = {
        "path": "tiny:1", "principles": "packaged", "draws": 3, "boost": 128.0, "by": "kind", "per": "row",
        "render": "text", "max_tokens": 2048,
    }  # fmt: skip
    return Principles(**{**settings, **changes})


# -- which are drawn ---------------------------------------------------------------------------------------------------


def test_draws_follow_the_weights_without_replacement() -> None:
    """Two of a, b, c with weights 1, 2, 4: P(first, second) = w1 / 7 * w2 / (7 - w1); weight 0 is never drawn."""
    n, weights = 6000, {"a": 1.0, "b": 2.0, "c": 4.0}
    found = Counter(tuple(p.name for p in drawn(FOUR, 2, "", 0.0, i)) for i in range(n))
    for first, second in itertools.permutations(weights, 2):
        p = weights[first] / 7 * weights[second] / (7 - weights[first])
        assert abs(found[first, second] / n - p) < 4 * math.sqrt(p * (1 - p) / n), (first, second)
    assert sum(found.values()) == n and all(len(set(pair)) == 2 for pair in found)


def test_a_prompts_kind_draws_its_principles_and_some_are_always_shown() -> None:
    kinds = Counter("harmless" in [p.name for p in drawn(PACKAGED, 3, "red_team", 128.0, i)] for i in range(300))
    assert kinds[True] > 290
    plain = Counter("harmless" in [p.name for p in drawn(PACKAGED, 3, "", 128.0, i)] for i in range(300))
    assert plain[True] < 120
    for i in range(20):
        names = [p.name for p in drawn(PACKAGED, 3, "", 0.0, i)]
        assert len(names) == 6 and names[3:] == ["modest", "direct", "concise"]


def test_a_row_draws_alone_and_always_the_same() -> None:
    rows = model()
    assert [rows.shown(s) for s in SAMPLES] == [rows.shown(replace(s)) for s in SAMPLES]
    assert len({tuple(rows.shown(s)) for s in SAMPLES}) > 1
    prompts = model(per="prompt")
    assert prompts.shown(SAMPLES[0]) == prompts.shown(SAMPLES[1])


def test_a_file_of_principles(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"name": "short", "text": "It is short.", "weight": 2}) + "\n\n")
    assert principles_of(str(file)) == (Principle("short", "It is short.", "", 2),)
    for bad in (
        '{"name": "x"}',
        "[1]",
        "no JSON",
        '{"name": "x", "text": "t", "weight": -1}',
        '{"name": "x", "text": "t", "more": 1}',
    ):
        file.write_text(bad)
        with pytest.raises(ConfigError, match=r"mine\.jsonl, line 1: wanted an object with name, text"):
            principles_of(str(file))
    file.write_text('{"name": "x", "text": "t"}\n' * 2)
    with pytest.raises(ConfigError, match="two principles have one name"):
        principles_of(str(file))
    with pytest.raises(ConfigError, match=r"no such file; type packaged, or a file of JSON lines$"):
        principles_of(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="draws=9"):
        model(draws=9)


# -- where the score is read -------------------------------------------------------------------------------------------


def test_the_response_stands_first_and_the_score_is_read_at_the_end() -> None:
    text = body(Sample("Why?", "Because.<|im_end|>"), ["Be kind.", "Be brief."])
    order = [text.index(x) for x in ("Because.", "Why?", "1. Be kind.", "2. Be brief.", END)]
    assert order == sorted(order) and text.endswith(END) and "<|im_end|>" not in text
    reward = model()
    scores = reward(SAMPLES, GROUP)
    ids = reward._ids(SAMPLES[0])
    assert reward.tokenizer.decode(ids).endswith(END)
    with torch.no_grad():
        hidden = reward.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        alone = reward.model.score(hidden)
    assert math.isclose(float(scores.value[0]), float(alone), abs_tol=1e-4)
    assert len(set(scores.value.tolist())) == 4 and not scores.missing.any()  # type: ignore[union-attr]
    turn = model(render="turn")
    turn.load()
    assert turn._ids(SAMPLES[0])[-1] == turn.tokenizer.eos_token_id
    assert turn.tokenizer.decode(turn._ids(SAMPLES[0])[:-1]).endswith(END)


def test_groups_are_scored_alike_on_any_process() -> None:
    whole = model()(SAMPLES, GROUP).value
    assert torch.equal(model()(SAMPLES[2:], GROUP[2:]).value, whole[2:])


def test_what_is_too_long_is_missing() -> None:
    reward = model(max_tokens=1100)
    scores = reward([SAMPLES[0], replace(SAMPLES[1], response="x" * 1200)], GROUP[:2])
    assert scores.missing.tolist() == [False, True] and scores.reasons == {1: "it is longer than 1100 tokens"}  # type: ignore[union-attr]


# -- the preferences that train it -------------------------------------------------------------------------------------


def test_one_principle_decides_after_division_by_the_variance() -> None:
    """+2 on concise with variance 1 and -3 on ethical with variance 9 are 2 and -1/3: concise decides, unless it is negated."""
    found = by_variance({"concise": [2.0, 0.0], "ethical": [-3.0, 3.0]})
    assert found == {"concise": [2.0, 0.0], "ethical": [pytest.approx(-1 / 3), pytest.approx(1 / 3)]}
    first = {name: x[0] for name, x in found.items()}
    assert deciding(first, frozenset()) == ("concise", 2.0)
    assert deciding(first, frozenset({"concise"})) == ("concise", -2.0)
    assert deciding(first, frozenset({"ethical"})) == ("concise", 2.0)
    assert by_variance({"same": [3.0, 3.0]}) == {"same": [0.0, 0.0]}


def test_a_judge_that_prefers_a_place_yields_no_data() -> None:
    """It says +3 for whatever stands first: d12 = 3, d21 = -3."""
    assert agreed(3.0, -3.0) == 0 and agreed(1.0, 2.0) == 1.5 and agreed(-1.0, -2.0) == -1.5 and agreed(0.0, 5.0) == 0
    scores = by_variance({n: [agreed(3.0, -3.0)] * 50 for n in "abc"})
    assert all(preference({n: x[i] for n, x in scores.items()}, 0, i) is None for i in range(50))


def test_how_many_principles_are_shown() -> None:
    """P(1) = 0.2, P(2) = 0.16, and all that is beyond 8 falls on 8: 0.8^7."""
    n = 5000
    found = Counter(count((i + 0.5) / n) for i in range(n))
    assert [round(found[k] / n, 2) for k in (1, 2, 8)] == [0.2, 0.16, round(0.8**7, 2)]
    assert (min(found), max(found), count(0.0)) == (1, 8, 1)


def test_labels_are_flipped_as_often_as_said() -> None:
    scores, n = {"a": 1.0}, 4000
    rate = sum(p.first == bool(p.negated) for i in range(n) if (p := preference(scores, "x", i))) / n
    assert abs(rate - 0.1) < 0.02
    ruled = [preference({"a": 0.0}, "x", i, ruled=True) for i in range(n)]
    assert all(ruled) and abs(sum(not p.first for p in ruled if p) / n - 0.25) < 0.03
    assert preference(scores, "x", 3) == preference(scores, "x", 3)


def test_training_on_negated_principles_turns_the_sign() -> None:
    """A linear reward with own weights for either wording, trained by Bradley-Terry: negating a principle turns its preference."""
    names, rng = "abc", random.Random(0)
    pairs = [{n: rng.gauss(0, 1) for n in names} for _ in range(600)]  # s_j = f_j(first) - f_j(second)
    scaled = by_variance({n: [p[n] for p in pairs] for n in names})
    x, y = [], []
    for i, pair in enumerate(pairs):
        found = preference({n: scaled[n][i] for n in names}, "toy", i)
        if found is not None:
            shown = [n for n in names if n in found.shown]
            x.append(
                [pair[n] * (n in shown and n not in found.negated) for n in names]
                + [pair[n] * (n in found.negated) for n in names]
            )
            y.append(float(found.first))
    inputs, labels = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    weights = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ weights, labels)
        (grad,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            weights -= 2.0 * grad
    assert (weights[:3] > 0.3).all() and (weights[3:] < -0.3).all(), weights


# -- from pairs and a judge to records ---------------------------------------------------------------------------------


class Likes:
    """A judge whose log-odds for the first response are those of a function of the question's rubric and its two texts."""

    def __init__(self, odds: Any) -> None:
        self.odds = odds

    def ask(self, asks: Any) -> list[Reply]:
        found = []
        for a in asks:
            first, second = (b.partition("]\n")[2].rpartition("\n[end")[0] for b in a.user.split("\n\n[")[1:])
            x = self.odds(a.system, first, second)
            found.append(Reply("A", (("A", -math.log1p(math.exp(-x))), ("B", -math.log1p(math.exp(x))))))
        return found


TWO = [Principle("long", "It is long.", "It is short."), Principle("dull", "Dull.", "Bright.")]
PAIRS = [Pair(f"u{i}", f"q{i}", "x" * (20 + 7 * i % 11), "y" * (20 - i % 5)) for i in range(40)]


def by_length(system: str, first: str, second: str) -> float:
    return (len(first) - len(second)) / 5 if "It is long." in system else 0.0


def test_records_prefer_by_the_principle_that_is_shown_and_against_its_negation() -> None:
    said = opinions(PAIRS, TWO, Likes(by_length))  # type: ignore[arg-type]
    assert all(
        x is not None and x == pytest.approx([(len(p.first) - len(p.second)) / 5, 0])
        for p, x in zip(PAIRS, said, strict=True)
    )
    made = list(records(PAIRS, [x for x in said if x is not None], TWO, seed=0))
    assert made == list(records(PAIRS, [x for x in said if x is not None], TWO, seed=0))
    tally = Counter()  # type: ignore[var-annotated]
    for r in made:
        texts = [r[k].partition("# Output\n")[2].partition("\n\n#")[0] for k in ("chosen", "rejected")]
        tally["It is long." in r["chosen"], len(texts[0]) > len(texts[1])] += 1
    for positive in (True, False):  # one of ten labels is flipped
        agree, total = tally[positive, positive], tally[positive, True] + tally[positive, False]
        assert total > 30 and agree / total > 0.8, tally


def test_a_judge_of_the_place_makes_no_records_and_a_lost_reply_loses_its_pair() -> None:
    said = opinions(PAIRS[:3], TWO, Likes(lambda *_: 3.0))  # type: ignore[arg-type]
    assert said == [[0.0, 0.0]] * 3 and not list(records(PAIRS[:3], [[0.0, 0.0]] * 3, TWO, seed=0))

    class Fails(Likes):
        def ask(self, asks: Any) -> list[Reply]:
            return [Reply(error="gone"), *super().ask(asks)[1:]]

    assert opinions(PAIRS[:2], TWO, Fails(by_length))[0] is None  # type: ignore[arg-type]


def test_a_rule_decides_half_the_time_where_one_side_says_what_it_is() -> None:
    says = "As an AI language model, I cannot."
    found = Counter(ruled(Pair("u", "q", says, "Sure."), i) for i in range(1000))
    assert set(found) == {False, None} and abs(found[False] - 500) < 60
    assert {ruled(Pair("u", "q", "Sure.", says), i) for i in range(50)} == {True, None}
    assert {ruled(Pair("u", "q", says, says + "!"), i) for i in range(50)} == {None}


def test_a_record_is_what_the_reward_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    one = next(records([Pair("a", "Why?", "Because.", "No.")] * 2, [[1.0, 0.0], [-1.0, 0.0]], TWO, seed=0))
    text = one["chosen"].partition("# Output\n")[2].partition("\n\n#")[0]
    shown = [
        line.partition(". ")[2]
        for line in one["chosen"].partition("# Principles\n")[2].splitlines()
        if line[:1].isdigit()
    ]
    reward = model(render="turn")
    reward.load()
    monkeypatch.setattr(reward, "shown", lambda sample: [Principle(t, t, "") for t in shown])
    trained = render([{"role": "user", "content": one["prompt"]}], reward.tokenizer, True)
    trained += response_ids(one["chosen"], reward.tokenizer)
    assert reward._ids(Sample("Why?", text)) == trained


def test_one_command_makes_a_file_that_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"uid": f"u{i}", "prompt": f"q{i}", "response": t} for i in range(6) for t in ("x" * (9 + i), "y" * 30, "z")
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"prompt": "alone", "response": "x"}]))
    assert main([str(file), str(out), "judge.backend=rule", "judge.model=length"]) == 0
    made = [json.loads(x) for x in out.read_text().splitlines()]
    assert f"{len(made)} preferences of 6 pairs are in {out}; of 0 pairs" in capsys.readouterr().out
    cfg = compose(
        "train", ["algo=reward_model", "dataset=preferences", "dataset.format=jsonl", f"dataset.path={out}"], None
    )
    assert len(load_whole(cfg.dataset)) == len(made) > 10
    for words, said in (
        ([str(out)], r"^type python -m rlhf_cli\.rewards\.principle_records PAIRS\.jsonl OUT\.jsonl"),
        (
            [str(tmp_path / "none"), str(out), "judge.backend=rule"],
            r"no such file; make it with rlhf generate eval\.samples=2",
        ),
        ([str(out), str(out), "judge.backend=rule"], r"line 1: wanted an object with prompt and response$"),
    ):
        with pytest.raises(ConfigError, match=said):
            main(words)
