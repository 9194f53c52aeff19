"""A trained model with several outputs as several rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.model import Model, too_long
from rlhf_cli.rewards.per_sample import Row, scored
from rlhf_cli.types import Sample, Scores

SIGMA = "/sigma"


class Attributes(Model):
    """Regression heads of one sequence classifier, each logged as a part; the value is their mean.

    `parts` weighs them one by one, so that a combination sees each. Read at the last real token, as `model` is.
    A head `NAME/sigma` says how unsure NAME is and is no attribute: combine=nominal_robust takes the attribute of smallest sigma, so
    any increasing function of a standard deviation serves.
    See Li et al., Optimizing Safe and Aligned Language Generation: A Multi-Objective GRPO Approach, arXiv:2503.21819; with
    sigmas, Yan et al., Reward-Robust RLHF in LLMs, arXiv:2409.15360.
    """

    path_is = "FOLDER"
    loads_model = True

    def __init__(
        self,
        *,
        path: str,
        heads: dict[str, int],
        render: Literal["turn", "template"],
        batch_size: int,
        max_tokens: int,
        device: Literal["auto", "cpu", "cuda"],
        dtype: Literal["fp32", "bf16"],
    ) -> None:
        """Args:
        path: a Hugging Face folder or a Hub id of a sequence classifier
        heads: attribute -> number of its output, from 0; NAME/sigma -> that of how unsure NAME is
        render: turn (prompt, response, end token) or template (the chat template writes the whole conversation)
        batch_size: responses per forward
        max_tokens: longest input, tokens
        device: auto takes the accelerator where there is one
        dtype: precision of weights and forward
        """
        super().__init__(
            path=path, render=render, batch_size=batch_size, max_tokens=max_tokens, device=device, dtype=dtype
        )
        given = {str(k): v for k, v in heads.items() if v is not None}
        if not all(isinstance(v, int) for v in given.values()) or sorted(given.values()) != list(range(len(given))):
            raise ConfigError(
                f"heads: {given} must number the model's outputs from 0, each once; type heads.NAME=NUMBER"
            )
        self.heads = given
        self.outputs = len(self.heads)
        self.means = [i for name, i in self.heads.items() if not name.endswith(SIGMA)]
        alone = next((n for n in self.heads if n.endswith(SIGMA) and n.removesuffix(SIGMA) not in self.heads), "")
        if alone or not self.means:
            raise ConfigError(
                f"heads: {alone or self.heads} belongs to no attribute; type heads.NAME=NUMBER beside NAME{SIGMA}"
            )

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self._row(v) for v in self.values(samples, group))

    def _row(self, values: Sequence[float] | None) -> Row:
        if values is None:
            return Row(None, dict.fromkeys(self.heads), too_long(self.max_tokens))
        return Row(
            sum(values[i] for i in self.means) / len(self.means), {name: values[i] for name, i in self.heads.items()}
        )
