"""What may be claimed from a held-out set."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_cli.data.record import Record
from rlhf_cli.engine.comm import Comm
from rlhf_cli.models.tiny import tiny_causal, tiny_tokenizer
from rlhf_cli.report.evaluate import (
    Interval,
    bootstrap,
    by_prompt,
    generate_and_score,
    paired,
    read_rows,
    summarise,
    write_rows,
)
from rlhf_cli.rollout.sampler import Decoding, Sampler
from rlhf_cli.types import Sample, Scores


def test_the_interval_of_normal_data_is_the_textbook_one() -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 1
    found = bootstrap(x.tolist(), 4000)
    half = 1.96 * float(x.std()) / 20  # 1.96 standard errors of a mean of 400
    assert found.mean == pytest.approx(float(x.mean()), abs=1e-12)
    assert found.low == pytest.approx(found.mean - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.15 * half)


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    g = torch.Generator().manual_seed(1)
    intervals = [bootstrap(torch.randn(60, generator=g).tolist(), 400, seed=i) for i in range(200)]
    covered = sum(i.low <= 0 <= i.high for i in intervals)
    assert (
        177 <= covered <= 199
    )  # 190 expected, standard deviation 3.1; a 90 % interval would give 180, this one leans to 187


def test_degenerate_data() -> None:
    assert bootstrap([0.5] * 10, 100) == Interval(0.5, 0.5, 0.5)
    assert bootstrap([3.0], 100) == Interval(3.0, 3.0, 3.0)
    empty = bootstrap([], 100)
    assert math.isnan(empty.mean) and not empty.excludes_zero
    assert bootstrap([0.0, 1.0, 5.0], 500) == bootstrap([0.0, 1.0, 5.0], 500), "the same numbers every time"


def test_excluding_zero_and_the_printed_form() -> None:
    assert (
        Interval(1, 0.1, 2).excludes_zero
        and Interval(-1, -2, -0.1).excludes_zero
        and not Interval(0.5, -0.1, 2).excludes_zero
    )
    assert str(Interval(0.5, -0.25, 1.25)) == "+0.5000 [-0.2500, +1.2500]"


def row(uid: str, score: float | None, sample: int = 0) -> dict[str, object]:
    return {"uid": uid, "sample": sample, "score": score}


def test_differences_are_paired_by_prompt_and_sample() -> None:
    before = [row("a", 1.0), row("b", 10.0), row("c", None), row("d", 4.0), row("a", 7.0, 1)]
    after = [row("b", 10.5), row("a", 1.5), row("c", 9.0), row("d", None), row("e", 3.0), row("a", 7.5, 1)]
    # a, b and the second sample of a: +0.5 each; c, d and e have no partner
    assert paired(before, after, 200) == Interval(0.5, 0.5, 0.5)
    assert paired(before, [row("a", 3.0), row("b", 10.0)], 200).mean == 1.0


def test_a_summary_by_hand() -> None:
    rows = [
        {"uid": "a", "tokens": 4, "truncated": True, "score": 1.0, "components": {"bleu": 0.5, "length": 2.0}},
        {"uid": "b", "tokens": 6, "truncated": False, "score": 3.0, "components": {"bleu": 1.5}},
        {"uid": "c", "tokens": 8, "truncated": False, "score": None, "components": {}},
        {"uid": "d", "tokens": 2, "truncated": False, "score": 2.0, "components": {"bleu": 1.0}},
    ]
    found = summarise(rows, 200)
    assert (found["tokens"], found["truncated"], found["reward"], found["missing"]) == (5.0, 0.25, 2.0, 1.0)
    assert found["reward/bleu"] == 1.0 and found["reward/length"] == 2.0
    assert 1.0 <= found["reward_low"] <= 2.0 <= found["reward_high"] <= 3.0
    assert "reward" not in summarise([{"tokens": 1, "truncated": False}], 10)


def test_samples_of_one_prompt_count_as_one() -> None:
    """Eight equal answers to each of two prompts say no more than one: the interval reaches both prompts' values."""
    rows = [{"uid": u, "sample": k, "score": x} for u, x in (("a", 0.0), ("b", 1.0)) for k in range(8)]
    assert by_prompt(rows) == [0.0, 1.0]
    before = [{**r, "score": 0.0} for r in rows]
    found = paired(before, rows, 2000)
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = [{"uid": "a", "score": 0.1, "response": "größer\nzwei"}, {"uid": "b", "score": None}]
    write_rows(tmp_path / "x.jsonl", rows)
    assert read_rows(tmp_path / "x.jsonl") == rows and [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_generated_rows_carry_their_scores() -> None:
    def scorer(samples: Sequence[Sample], group: Tensor) -> Scores:
        assert group.tolist() == [0, 0, 1, 1]
        value = torch.tensor([float(len(s.response)) for s in samples])
        return Scores(value, torch.tensor([False, True, False, False]), {"length": value})

    records = [Record(({"role": "user", "content": p},), p, uid=p) for p in ("one", "two")]
    sampler = Sampler(tiny_causal(0, torch.float32), tiny_tokenizer(), Decoding(max_tokens=5, rows=4), device="cpu")
    comm, ids = Comm(torch.device("cpu")), [[256, *b"one"], [256, *b"two"]]
    rows = generate_and_score(sampler, scorer, records, ids, comm, Decoding(max_tokens=5, rows=4), k=2, seed=0)
    assert [(r["uid"], r["sample"]) for r in rows] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    assert [r["score"] for r in rows] == [
        len(rows[0]["response"]),
        None,
        len(rows[2]["response"]),
        len(rows[3]["response"]),
    ]
    assert all(0 < r["tokens"] <= 5 for r in rows) and rows[0]["components"] == {"length": rows[0]["score"]}
    again = generate_and_score(sampler, None, records, ids, comm, Decoding(max_tokens=5, rows=4), k=2, seed=0)
    assert [r["response"] for r in again] == [r["response"] for r in rows] and "score" not in again[0]
