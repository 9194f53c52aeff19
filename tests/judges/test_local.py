"""A judge in this process, with the tiny random model: its numbers are those of the model's own forward. A real model: test_served.py."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli import cli
from rlhf_cli.data.text import render
from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.ask import Ask, Reply, Sampling
from rlhf_cli.judges.cache import Cache
from rlhf_cli.judges.judge import Judge as Asked
from rlhf_cli.judges.local import AT_ONCE, Local, device_of
from rlhf_cli.models.tiny import tiny_causal, tiny_tokenizer
from rlhf_cli.rewards.judge import Judge
from rlhf_cli.rewards.judge_pairs import JudgePairwise
from rlhf_cli.types import Sample

ROOM = 128  # tokens that the tiny model holds here
LOGITS: dict[str, Any] = {"rubric": "r", "low": 1, "high": 5, "read": "logits", "votes": 1}
PAIR: dict[str, Any] = {
    "rubric": "r", "against": "group", "answer": "logits", "rule": "mean", "scale": "rate", "inconsistent": "tie", "votes": 1,
}  # fmt: skip


def local(**more: Any) -> Local:
    sampling = Sampling(**{"temperature": 0.0, "max_tokens": 6, "structured": True, "extra": {}, **more})
    return Local("tiny:3", sampling, torch.device("cpu"), torch.float32)


def ask(text: str, **more: Any) -> Ask:
    return Ask("s", text, lambda quality: Reply("?"), **more)


def own_logp(a: Ask) -> torch.Tensor:
    """[V]: what the model itself gives after the question, alone, without padding."""
    ids = render(a.messages, tiny_tokenizer(), True)
    with torch.no_grad():
        return tiny_causal(3, torch.float32)(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)


def test_log_probabilities_are_those_of_the_models_own_forward() -> None:
    """Of questions of unequal lengths in one batch, more than go at once."""
    asks = [ask("x" * n, top=20) for n in range(1, AT_ONCE + 4)]
    model = tiny_causal(3, torch.float32)
    assert model.config.vocab_size > 20
    for a, wait in zip(asks, local().start(asks), strict=True):
        found, want = wait.result(), own_logp(a).topk(20)
        assert not found.error and len(found.top) == 20
        assert [p for _, p in found.top] == pytest.approx(want.values.tolist(), abs=1e-5)
        assert found.text == found.top[0][0] == tiny_tokenizer().decode([int(want.indices[0])])


def test_a_greedy_reply_is_the_models_own_and_is_cut_at_its_limit() -> None:
    model, tokenizer, a = tiny_causal(3, torch.float32), tiny_tokenizer(), ask("hm")
    ids = render(a.messages, tokenizer, True)
    made: list[int] = []
    for _ in range(6):
        with torch.no_grad():
            made.append(int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax()))
    found = local().start([a])[0].result()
    assert found.text == tokenizer.decode(made, skip_special_tokens=True) and found.finish == "length"
    short = local().start([replace(a, max_tokens=2)])[0].result()
    assert short.text == tokenizer.decode(made[:2], skip_special_tokens=True)


def test_replies_to_one_question_differ_by_their_number_and_by_nothing_else() -> None:
    warm = local(temperature=1.0, max_tokens=12)
    first, second = (warm.start([ask("hm", draw=d)])[0].result().text for d in (0, 1))
    assert first != second
    together = [w.result().text for w in warm.start([ask("other"), ask("hm", draw=1), ask("z" * 40), ask("hm")])]
    assert together[1] == second and together[3] == first


def test_a_question_that_is_too_long_is_missing_and_the_others_are_asked() -> None:
    judge = local()
    judge.sampler().model.config.max_position_embeddings = ROOM
    asks = [ask("x" * 9, top=5), ask("x" * 500, top=5), ask("x" * 9), ask("x" * 500)]
    found = [w.result() for w in judge.start(asks)]
    assert [bool(r.error) for r in found] == [False, True, False, True]
    assert found[1].error.endswith(f"tokens, the judge holds {ROOM}") and found[3].error.endswith(f"holds {ROOM}")


def asked(backend: Local) -> Asked:
    return Asked(backend, backend.sampling, Cache(None))


def test_the_rewards_read_it() -> None:
    """The expectation over the score tokens, and log-odds in both orders, by the model's own forward."""
    samples = [Sample("p", t, uid="u") for t in ("good", "bad")]
    reward, tokenizer = Judge(**LOGITS), tiny_tokenizer()
    reward.connect(asked(local()))
    scores = reward(samples, torch.zeros(2, dtype=torch.int64))
    everything = Judge(**LOGITS)
    for i, a in enumerate(everything.questions(samples)):
        top = own_logp(a).topk(20)
        p = {tokenizer.decode([int(t)]): math.exp(x) for t, x in zip(top.indices, top.values.tolist(), strict=True)}
        legal = {s: p[str(s)] for s in range(1, 6) if str(s) in p}
        if not legal:
            assert bool(scores.missing[i]) and "likeliest is" in scores.reasons[i]  # type: ignore[index]
            continue
        want = sum(s * x for s, x in legal.items()) / sum(legal.values())
        assert float(scores.value[i]) == pytest.approx(want, abs=1e-4)
    pairs = JudgePairwise(**PAIR)
    pairs.connect(asked(local()))
    both = pairs(samples, torch.zeros(2, dtype=torch.int64))
    assert both.value.isnan().all() or float(both.value.sum()) == pytest.approx(1.0, abs=1e-5)


def test_it_scores_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"prompt": "p", "response": r}) + "\n" for r in ("a", "bb")))
    words = [
        "score",
        f"input={file}",
        f"output={out}",
        "judge.backend=transformers",
        "judge.model=tiny:3",
        "judge.max_tokens=4",
        "dataset.columns.references=",
    ]
    assert cli.main([*words, "reward=judge", "reward.judge.read=logits"]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 2 and all(r["score"] is None or 1 <= r["score"] <= 5 for r in rows)
    assert cli.main([*words, "reward=judge"]) == 0  # a random model writes no JSON: missing, and said
    assert [json.loads(line)["score"] for line in out.read_text().splitlines()] == [None, None]
    assert "2 of 2 samples could not be scored" in capsys.readouterr().out


def test_a_device_that_is_not_there() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"^judge\.device=cuda: there is no GPU; type judge\.device=cpu$"):
            device_of("cuda", "auto")
        assert device_of("auto", "auto").type == "cpu"
