"""Models that are only read in whole runs: a mask that follows the policy, and references that are averages."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import e2e_support as e2e
import pytest
import torch
from e2e_support import TINY, Done
from safetensors.torch import load_file

from rlhf_cli import readers

pytestmark = pytest.mark.slow
FAST = (
    *TINY,
    "reward_workers.processes=-1",
    "reward=length",
    "optim.lr=1e-3",
    "checkpoint.every=1",
    "checkpoint.keep=9",
)


def numbers(run: Path) -> list[dict[str, float]]:
    skipped = ("time", "tokens_per", "memory")
    return [
        {k: v for k, v in row.items() if not any(s in k for s in skipped)} for row in e2e.jsonl(run / "metrics.jsonl")
    ]


def test_a_mask_and_a_reference_follow_and_go_on_bit_for_bit(
    rlhf: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked: list[tuple[Any, Any]] = []
    install = readers.mask_sampler

    def watch(cfg: Any, sampler: Any, models: Any, tokenizer: Any) -> None:
        install(cfg, sampler, models, tokenizer)
        masked.append((sampler, models["lagged"].module.model))

    monkeypatch.setattr(readers, "mask_sampler", watch)
    words = (
        "experiment=nlpo", *FAST, "steps=4", "batch.epochs=1", "frozen.lagged.refresh.every=2", "model.refresh.every=1",
        "model.refresh.decay=0.5", "rollout.mask.min_tokens=5", "gates.advantage=1000", f"run.dir={tmp_path}",
    )  # fmt: skip
    done = rlhf("train", *words, "run.name=whole")
    assert done.code == 0, done.err
    run = tmp_path / "whole"

    weights = {n: load_file(run / "checkpoints" / f"step-00000{n}" / "policy.weights.safetensors") for n in (1, 2, 3)}
    state = {n: load_file(run / "checkpoints" / f"step-00000{n}" / "state.safetensors") for n in (1, 2, 3)}
    name = "model.lm_head.weight"
    lagged = {n: s[f"frozen.lagged/weights/{name}/"] for n, s in state.items()}
    mean = {n: s[f"frozen.reference/weights/{name}/"] for n, s in state.items()}
    assert torch.equal(lagged[2], weights[2][name]), "after two steps the mask is the policy"
    assert torch.equal(lagged[3], lagged[2]) and not torch.equal(lagged[1], lagged[2]), "between them the old copy"
    assert torch.allclose(mean[2], (mean[1] + weights[2][name]) / 2, atol=1e-7)
    (sampler, model), last = masked[0], load_file(run / "checkpoints" / "step-000004" / "policy.weights.safetensors")
    assert sampler.mask.model is model, "the sampler reads the model that follows"
    assert torch.equal(model.lm_head.weight, last[name]) and not torch.equal(last[name], weights[2][name])

    shutil.copytree(run, tmp_path / "again")
    (tmp_path / "again" / ".lock").unlink(missing_ok=True)
    for n in (2, 3, 4):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step-00000{n}")
    done = rlhf("train", *words, "run.name=again")
    assert done.code == 0, done.err
    assert "resumed from step-000001" in e2e.notes(tmp_path / "again")
    e2e.assert_same(run, tmp_path / "again")


def test_a_soup_of_equals_or_without_the_other_trains_as_ppo_does(rlhf: Callable[..., Done], tmp_path: Path) -> None:
    words = ("experiment=salsa", *FAST, "model.path=tiny:3", f"run.dir={tmp_path}")
    soups = {
        "equals": ["model.soup.path=tiny:3"],
        "none_of_it": ["model.soup.path=tiny:4", "model.soup.weight=0"],
        "ppo": ["model.reference=auto"],
    }
    for name, more in soups.items():
        done = rlhf("train", *words, *more, f"run.name={name}")
        assert done.code == 0, done.err
    assert numbers(tmp_path / "equals") == numbers(tmp_path / "ppo") == numbers(tmp_path / "none_of_it")


def test_a_merged_folder_is_the_soup_and_stays_as_it_is(
    rlhf: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[Any, dict[str, torch.Tensor]]] = []
    make = readers.make

    def watch(*args: Any) -> Any:
        made = make(*args)
        reference = made["reference"].module
        held.append((reference, {k: p.detach().clone() for k, p in reference.named_parameters()}))
        return made

    monkeypatch.setattr(readers, "make", watch)
    folder = tmp_path / "both"
    assert rlhf("merge", "tiny:3", "tiny:4", "--weight=0.25", f"--output={folder}").code == 0
    before = (folder / "model.safetensors").read_bytes()
    words = ("experiment=salsa", *FAST, "model.path=tiny:3", f"run.dir={tmp_path}")
    mixed = ["model.soup.path=tiny:4", "model.soup.weight=0.25"]
    for name, more in (("direct", mixed), ("merged", [f"model.reference={folder}"])):
        done = rlhf("train", *words, *more, f"run.name={name}")
        assert done.code == 0, done.err
    direct, merged = numbers(tmp_path / "direct"), numbers(tmp_path / "merged")
    assert direct == merged and direct[0]["policy/kl"] > 0.1, "KL to the soup is not 0 at the first step"
    assert (folder / "model.safetensors").read_bytes() == before
    for reference, weights in held:
        assert all(torch.equal(p, weights[k]) for k, p in reference.named_parameters()), "frozen in memory too"
    assert len(held) == 2
