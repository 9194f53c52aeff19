"""Credit against a baseline that remembers earlier steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.select import gives
from rlhf_cli.types import Credit


@gives("advantage")
class RunningMean:
    """Score minus a moving average of earlier steps' mean scores, [N, T]; the first step uses its own mean.

    After a step b <- decay b + (1 - decay) mean(R), so b does not depend on the row that it judges. REINFORCE with a
    baseline: Williams, Machine Learning 8, 1992. See Mnih and Gregor, "Neural Variational Inference and Learning in Belief
    Networks", arXiv:1402.0030, section 2.3.
    """

    def __init__(self, *, decay: float) -> None:
        """Args:
        decay: share of the old average that is kept at every step
        """
        self.baseline: float | None = None
        self._decay = decay
        self.stats: dict[str, float] = {}

    def __call__(self, score: Tensor, mask: Tensor) -> Credit:
        """Advantages against the average of the steps before.

        Args:
            score: reward of each row, [N]
            mask: trained tokens, [N, T] bool
        """
        mean = float(score.double().mean())
        old = mean if self.baseline is None else self.baseline
        self.stats = {"baseline": old}
        self.baseline = self._decay * old + (1 - self._decay) * mean
        return Credit(torch.where(mask, (score - old)[:, None], 0.0))

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return {"baseline": self.baseline}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from an average."""
        self.baseline = state["baseline"]
