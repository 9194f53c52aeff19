"""A text classifier as reward: sentiment, intent, or any other label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_cli import standins
from rlhf_cli.errors import ConfigError
from rlhf_cli.models.loading import tiny_reward_model
from rlhf_cli.models.tiny import tiny_tokenizer
from rlhf_cli.rewards.model import Model, read
from rlhf_cli.rewards.per_sample import Row, scored
from rlhf_cli.types import Sample, Scores

META = "meta."
TINY_LABELS = 4  # outputs of a random stand-in


class Classifier(Model):
    """The probability of a label in [0, 1], or 1 if it is the most likely one and 0 if not.

    The classifier reads the prompt's last turn and the response as one text, or the response alone; a long text loses its
    beginning. A record may name its own label. Weights are read from safetensors only, and code shipped with a model never runs.
    See Ramamurthy et al., "Is Reinforcement Learning (Not) for Natural Language Processing", arXiv:2210.01241: IMDB and DailyDialog.
    """

    path_is = "FOLDER"
    loads_model = True

    def __init__(
        self,
        *,
        path: str,
        label: str,
        first: int,
        value: Literal["probability", "match"],
        reads: Literal["both", "response"],
        batch_size: int,
        max_tokens: int,
        device: Literal["auto", "cpu", "cuda"],
    ) -> None:
        """Args:
        path: a Hugging Face folder or a Hub id of a sequence classifier
        label: the wanted one, as the model's configuration names it or by its number; meta.KEY takes each record's own
        first: the number of the first label
        value: probability of the label, or match (1 if it is the most likely one)
        reads: both (prompt and response) or response
        batch_size: texts per forward
        max_tokens: longest text, tokens; a longer one loses its beginning
        device: auto takes the accelerator where there is one
        """
        super().__init__(
            path=path, render="turn", batch_size=batch_size, max_tokens=max_tokens, device=device, dtype="fp32"
        )
        self.label, self.first, self.value, self.reads = label, first, value, reads

    def load(self) -> None:
        """Read weights and tokenizer, unless they are here already."""
        if self.model is None:
            self.model, self.tokenizer = load_labels(self.folder, self.dtype)
            self.model.to(self.device)

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        rows = self.values(samples, group)
        return scored(self._row(s, v) for s, v in zip(samples, rows, strict=True))

    def _row(self, sample: Sample, logits: list[float] | None) -> Row:
        if logits is None:
            return Row(None, reason="it has no text")
        name = str(self.label)
        if name.startswith(META):
            key = name.removeprefix(META)
            if sample.meta.get(key) is None:
                return Row(None, reason=f"its record has no {key}: map it with dataset.columns.meta.{key}")
            name = str(sample.meta[key])
        wanted, p = self._number(name), torch.tensor(logits, dtype=torch.float64).softmax(-1)
        return Row(float(p[wanted]) if self.value == "probability" else float(int(p.argmax()) == wanted))

    def _number(self, name: str) -> int:
        """The number of a label, from 0."""
        names = {str(k): int(v) for k, v in (self.model.config.label2id or {}).items()}
        numbers = {str(i + self.first): i for i in range(self.model.config.num_labels)}
        found = numbers.get(name, names.get(name))
        if found is None:
            known = ", ".join(dict.fromkeys([*names, *numbers]))
            raise ConfigError(f"label: {self.folder} has no label {name!r}; it has {known}")
        return found

    def _ids(self, sample: Sample) -> list[int]:
        text = sample.response if self.reads == "response" else f"{sample.prompt} {sample.response}".strip()
        return self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]


def load_labels(folder: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A classifier with a trained head, and its tokenizer, which cuts on the left."""
    seed = standins.seed_of(folder)
    if seed is None:
        model, tokenizer = read(folder, dtype)
    else:
        model, tokenizer = tiny_reward_model(seed, dtype, TINY_LABELS).requires_grad_(False), tiny_tokenizer()
    tokenizer.truncation_side = "left"
    return model, tokenizer
