"""A trained reward model for each category of prompts, beside what the demonstration would earn."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.model import Model
from rlhf_cli.types import Sample, Scores

COMPONENTS = ("demonstration", "gap", "category")


class ByCategory:
    """The score of the reward model of the record's category (`meta[by]`), as `reward=model` computes it.

    The first reference is the demonstration; `gap` is its score minus the response's, by the same model. Components: `demonstration`,
    `gap`, `category` (a number for the name). Reward models that are trained by inverse reinforcement, one per category:
    Cheng et al., arXiv:2503.18991, section 4.1.
    """

    needs_references = True
    loads_model = True
    path_is = "RUNS/{category}"
    columns = "gap category"

    def __init__(
        self,
        *,
        path: str,
        by: str,
        render: Literal["turn", "template"],
        batch_size: int,
        max_tokens: int,
        device: Literal["auto", "cpu", "cuda"],
        dtype: Literal["fp32", "bf16"],
    ) -> None:
        """Args:
        path: of the reward models; {category} in it stands for the category's name, without it one model scores all
        by: the record's meta key that holds the category
        render: turn or template, as of reward=model
        batch_size: responses per forward
        max_tokens: longest input, tokens
        device: auto takes the accelerator where there is one
        dtype: precision of weights and forward
        """
        self.path, self.by = path, by
        self.settings = {
            "render": render, "batch_size": batch_size, "max_tokens": max_tokens, "device": device, "dtype": dtype,
        }  # fmt: skip
        self.models: dict[str, Model] = {}

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        rows: dict[str, list[int]] = {}
        for i, sample in enumerate(samples):
            rows.setdefault(self.category(sample), []).append(i)
        value, demo = (torch.full((len(samples),), float("nan")) for _ in range(2))
        number = torch.zeros(len(samples))
        for name, members in rows.items():
            value[members] = self._score(name, [samples[i] for i in members])
            shown = {samples[i].uid: replace(samples[i], response=samples[i].references[0]) for i in members}
            found = dict(zip(shown, self._score(name, list(shown.values())).tolist(), strict=True))
            demo[members] = torch.tensor([found[samples[i].uid] for i in members])
            number[members] = float(zlib.crc32(name.encode()) % 2**24)  # exact in float32, and equal on every rank
        missing = value.isnan() | demo.isnan()
        parts = {"demonstration": demo, "gap": demo - value, "category": number}
        return Scores(
            value, missing, parts, reasons=dict.fromkeys(missing.nonzero().flatten().tolist(), "it is too long")
        )

    def category(self, sample: Sample) -> str:
        """Of a sample; refuses one without."""
        if self.by not in sample.meta:
            raise ConfigError(
                f"reward.by_category: {sample.meta.get('where') or sample.uid} has no meta {self.by!r}; "
                f"map it with dataset.columns.meta.{self.by}=COLUMN"
            )
        return str(sample.meta[self.by])

    def _score(self, name: str, samples: Sequence[Sample]) -> Tensor:
        if name not in self.models:
            self.models[name] = Model(path=self.path.replace("{category}", name), **self.settings)  # type: ignore[arg-type]
        scores = self.models[name](samples, torch.zeros(len(samples), dtype=torch.int64))
        return scores.value if scores.missing is None else scores.value.masked_fill(scores.missing, float("nan"))
