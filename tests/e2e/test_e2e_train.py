"""Whole training runs: every recipe, every record shape, rewards of every kind, LoRA, sweeps, and how runs fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import e2e_support as e2e
import pytest
import torch
from e2e_support import TINY, Done

from rlhf_cli import catalog

QUICK = (
    "grpo",
    "ppo",
    "ppo_shared",
    "dpo",
    "sft",
    "reward_model",
    "dapo",
    "remax",
)  # one of each form; all in `make test`
ALGOS = [pytest.param(a, marks=[] if a in QUICK else [pytest.mark.slow]) for a in catalog.groups()["algo"]]
Train = Callable[..., Path]
Rlhf = Callable[..., Done]
HELD = "dataset.heldout_fraction=0.3"  # of a dozen records


def check_finished(run: Path, steps: int = 2) -> list[dict]:
    """Finished, one monotone row a step, every number finite."""
    assert e2e.status(run)["status"] == "finished" and e2e.status(run)["step"] == steps
    rows = e2e.jsonl(run / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, steps + 1))
    for row in rows:
        bad = [k for k, v in row.items() if not isinstance(v, int | float) or not math.isfinite(v)]
        assert not bad, f"step {row['step']}: {bad}"
    return rows


def load_export(run: Path, kind: str = "AutoModelForCausalLM"):
    """The export as plain transformers reads it, with no key missing or left over."""
    import transformers

    model, info = getattr(transformers, kind).from_pretrained(run / "export", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(transformers.AutoTokenizer.from_pretrained(run / "export")("hi")["input_ids"]) > 0
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids).logits.isfinite().all()
    return model


@pytest.mark.parametrize("algo", ALGOS)
def test_every_recipe_trains_and_exports(algo: str, train: Train) -> None:
    run = train("r", f"algo={algo}", "reward=length", "reward.length.unit=characters")
    rows = check_finished(run)
    learners = {k.split("/")[0] for k in rows[0] if k.endswith("/grad_norm")}
    assert learners == ({"reward"} if algo == "reward_model" else {"policy", "critic"} if algo == "ppo" else {"policy"})
    assert any(r[f"{name}/grad_norm"] > 0 for r in rows for name in learners)
    load_export(run, "AutoModelForSequenceClassification" if algo == "reward_model" else "AutoModelForCausalLM")
    for name in ("config.yaml", "plan.txt", "provenance.json", "samples.jsonl", "evaluations.jsonl"):
        assert (run / name).stat().st_size > 0, name


@pytest.mark.parametrize("algo", ["dpo", "reward_model"])
@pytest.mark.parametrize("shape", ["pairs", "rankings"])
def test_recorded_preferences(algo: str, shape: str, train: Train, tmp_path: Path) -> None:
    file = getattr(e2e, shape)(tmp_path / "data.jsonl")
    dataset = "preferences" if shape == "pairs" else shape
    run = train("r", f"algo={algo}", f"dataset={dataset}", f"dataset.path={file}", HELD)
    check_finished(run)
    learner = "reward" if algo == "reward_model" else "policy"
    assert f"eval/{learner}/loss" in e2e.jsonl(run / "evaluations.jsonl")[-1]


@pytest.mark.parametrize("shape", ["demonstrations", "pairs"])
def test_sft_imitates_demonstrations_and_chosen_responses_only(shape: str, train: Train, tmp_path: Path) -> None:
    file = getattr(e2e, shape)(tmp_path / "data.jsonl")
    dataset = "preferences" if shape == "pairs" else shape
    run = train("r", "algo=sft", f"dataset={dataset}", f"dataset.path={file}", HELD)
    rows = check_finished(run)
    assert rows[0]["count/rows"] == 2, "one response to each of two prompts"
    assert not [r for r in e2e.jsonl(run / "samples.jsonl") if r["response"].startswith("no")]


def test_sft_refuses_thumbs(rlhf: Rlhf, tmp_path: Path) -> None:
    file = e2e.thumbs(tmp_path / "data.jsonl")
    done = rlhf("train", *TINY, f"run.dir={tmp_path}", "algo=sft", "dataset=thumbs", f"dataset.path={file}", HELD)
    assert done.code == 2 and "holds no demonstration; use dataset.shape=demonstrations or pairs" in done.err


def test_online_dpo_prefers_by_reward(train: Train) -> None:
    run = train("r", "algo=dpo", "reward=length")
    rows = check_finished(run)
    assert any(r["count/pairs"] > 0 for r in rows)


def test_a_trained_reward_model_scores_the_next_run(train: Train, tmp_path: Path) -> None:
    file = e2e.pairs(tmp_path / "data.jsonl")
    judge = train("judge", "algo=reward_model", "dataset=preferences", f"dataset.path={file}", HELD)
    run = train("r", "algo=grpo", "reward=model", f"reward.model.path={judge}")
    assert any(r["score/std"] > 0 for r in check_finished(run)), "a reward model gives different rows different scores"


def test_lora_trains_adapters_and_exports_merged_weights(train: Train, rlhf: Rlhf) -> None:
    run = train("r", "algo=grpo", "reward=length", "model.lora.r=4", "optim.lr=0.01")
    check_finished(run)
    assert "the disabled adapter" in (run / "plan.txt").read_text()
    start = load_export(train("start", "algo=grpo", "reward=length", "steps=0"))
    merged = load_export(run)
    moved = {n for n, p in merged.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    assert moved and all("proj" in n for n in moved), "only the targets of the adapters moved"
    kl = [r["policy/loss/kl"] for r in e2e.jsonl(run / "metrics.jsonl")]
    assert kl[0] == 0.0 and kl[1] > 0.0, "the reference is the model without the adapter"


def test_the_negative_control_runs(train: Train) -> None:
    plain, shuffled = train("a", "reward=length"), train("b", "reward=length", "debug.shuffled_reward=true")
    check_finished(shuffled)
    first, second = e2e.jsonl(plain / "samples.jsonl"), e2e.jsonl(shuffled / "samples.jsonl")
    rows = [r for r in first if r["step"] == 1], [r for r in second if r["step"] == 1]
    assert [r["response"] for r in rows[0]] == [r["response"] for r in rows[1]]
    assert sorted(r["score"] for r in rows[0]) == sorted(r["score"] for r in rows[1])


def test_shuffled_reward_as_an_option(rlhf: Rlhf, tmp_path: Path) -> None:
    words = [w for w in TINY if w != "debug=tiny"]
    small = (
        "tracker=none",
        "model=tiny_random",
        "steps=1",
        "batch.prompts=2",
        "batch.samples=2",
        "rollout.max_tokens=4",
    )
    more = ("dataset.max_prompt_tokens=4096", "eval.prompts=2", "debug=shuffled_reward", "run.name=r")
    done = rlhf("train", *words, *small, *more, f"run.dir={tmp_path}", "hardware.precision=fp32")
    assert done.code == 0, done.err
    check_finished(tmp_path / "r", steps=1)


def test_a_users_reward(train: Train, tmp_path: Path) -> None:
    run = train("r", "reward=python", e2e.python_reward(tmp_path / "mine.py", "values = [len(r) for r in responses]"))
    check_finished(run)
    assert all(r["score"] == len(r["response"]) for r in e2e.jsonl(run / "samples.jsonl"))


def test_nan_from_a_users_reward_stops_the_run(rlhf: Rlhf, tmp_path: Path) -> None:
    reward = e2e.python_reward(tmp_path / "mine.py", "values = [float('nan')] * len(responses)")
    done = rlhf("train", *TINY, f"run.dir={tmp_path}", "run.name=r", "reward=python", reward)
    assert done.code == 3
    assert done.err.startswith("rlhf: error: ") and done.err.count("\n") == 1, done.err
    assert "mine.py:score' returned nan" in done.err
    state = e2e.status(tmp_path / "r")
    assert state["status"] == "failed" and "returned nan" in state["reason"]


def test_a_broken_data_file_names_its_line_and_does_not_block_another_try(rlhf: Rlhf, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "references": ["b"]}\n{"prompt": "a", "refer\n')
    words = ("train", *TINY, f"run.dir={tmp_path}", "run.name=r", "reward=length", "dataset=jsonl")
    done = rlhf(*words, f"dataset.path={broken}")
    # Under a test runner the first import of DeepSpeed in a process may let its linker probe through; our own line is one.
    own = [
        line for line in done.err.splitlines() if line.startswith("rlhf: ") or "Error" in line or "Traceback" in line
    ]
    assert done.code == 2 and len(own) == 1 and own[0].startswith("rlhf: error: broken.jsonl:2: broken JSON")
    whole = e2e.write_rows(tmp_path / "whole.jsonl", [{"prompt": f"p{i}", "references": ["b"]} for i in range(9)])
    again = rlhf(*words, f"dataset.path={whole}", "dataset.heldout_fraction=0.4")
    assert again.code == 0, again.err
    check_finished(tmp_path / "r")


def test_a_key_is_nowhere_in_the_run(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train("r", "reward=length", "tracker=offline")
    files = [p for p in run.rglob("*") if p.is_file()]
    assert len(files) > 10 and [p for p in files if "wandb" in p.as_posix()]
    assert not [p for p in files if key.encode() in p.read_bytes()]


def test_another_experiment_may_not_take_over_a_run(train: Train, rlhf: Rlhf, tmp_path: Path) -> None:
    run = train("r", "reward=length", "optim.lr=0.25")
    done = rlhf("train", *TINY, f"run.dir={tmp_path}", "run.name=r", "reward=length", "optim.lr=0.5")
    assert done.code == 2
    assert done.err == (
        f"rlhf: error: run {run} exists with another configuration: optim.lr was 0.25, now 0.5; choose another "
        f"run.name, or change it on purpose with rlhf resume {run} optim.lr=0.5\n"
    )
    never = rlhf("train", *TINY, f"run.dir={tmp_path}", "run.name=r", "reward=length", "optim.lr=0.25", "resume=never")
    assert never.code == 2 and f"run {run} exists and resume=never" in never.err


def test_under_zero_3_the_sampler_that_evaluates_follows_the_policy(train: Train) -> None:
    run = train(
        "z", "algo=sft", "reward=length", "reward.length.unit=characters", "hardware.zero=3", "steps=3", "optim.lr=1e-2"
    )
    before, after = (e2e.jsonl(run / f"heldout-{n:06d}.jsonl") for n in (0, 3))
    assert [r["response"] for r in before] != [r["response"] for r in after]
    load_export(run)


def test_zero_3_with_adapters_goes_on_through_steps_without_rows(train: Train) -> None:
    """Every byte response has eight characters, so rewards tie, all groups are dropped, and no weight moves."""
    words = (
        "reward=length",
        "reward.length.unit=words",
        "select=drop_zero_variance",
        "model.lora.r=4",
        "hardware.zero=3",
    )
    load_export(train("z", "algo=grpo", *words, "gates.constant_steps=50"))


def test_activation_checkpointing_changes_no_number(train: Train) -> None:
    words = ("algo=grpo", "reward=length", "reward.length.unit=characters", "optim.lr=1e-3")
    plain, again = (train(name, *words, f"model.checkpointing={on}") for name, on in (("a", "false"), ("b", "true")))
    losses = [[r["policy/grad_norm"] for r in e2e.jsonl(run / "metrics.jsonl")] for run in (plain, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
