"""BERTScore as bert-score computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.encoder import device_of, folder_of
from rlhf_cli.rewards.per_sample import Row, groups_of, references_of, scored
from rlhf_cli.types import Sample, Scores


class BertScore:
    """Greedy cosine matching of contextual token embeddings, without rescaling; of several references the best counts.

    P is the mean over response tokens of the largest cosine to a reference token, R the same from the reference's side,
    F1 = 2 P R / (P + R); parts `precision`, `recall`, `f1`. In [-1, 1], in practice the upper end of it (0.8 to 1 for
    roberta-large), so compare within groups. A response without any token scores 0.
    See Zhang et al., BERTScore: Evaluating Text Generation with BERT, arXiv:1904.09675.
    """

    loads_model = True
    needs_references = True
    path_is = "FOLDER"

    def __init__(
        self,
        *,
        path: str,
        num_layers: int,
        measure: Literal["f1", "precision", "recall"],
        batch_size: int,
        device: Literal["auto", "cpu", "cuda"],
    ) -> None:
        """Args:
        path: packaged (all-MiniLM-L6-v2), a Hugging Face folder or a Hub id
        num_layers: layer whose embeddings are compared, from 1 (packaged: up to 6; roberta-large: 17)
        measure: which of the three is the reward; recall alone is maximised by verbosity
        batch_size: pairs per forward
        device: auto takes the accelerator where there is one
        """
        if batch_size < 1 or num_layers < 1:
            raise ConfigError(
                f"reward.bertscore: batch_size={batch_size}, num_layers={num_layers} are not allowed; both start at 1"
            )
        try:
            import bert_score  # noqa: F401  # an extra: say so before anything else is loaded
        except ImportError:
            raise ConfigError(
                "reward=bertscore needs the package bert-score; type pip install 'rlhf-cli[bertscore]'"
            ) from None
        self.folder = folder_of(path, "reward.bertscore")
        self.num_layers, self.measure, self.batch_size = num_layers, measure, batch_size
        self.device = device_of(device)
        self.scorer: Any = None

    def load(self) -> None:
        """Read weights and tokenizer, unless they are here already; the first call does it by itself."""
        if self.scorer is not None:
            return
        from bert_score import BERTScorer

        try:
            self.scorer = BERTScorer(
                model_type=self.folder, num_layers=self.num_layers, batch_size=self.batch_size, device=self.device
            )
        except AssertionError as e:
            raise ConfigError(f"reward.bertscore.num_layers={self.num_layers}: {e}") from None
        except (OSError, ValueError) as e:
            raise ConfigError(f"reward.bertscore.path: {self.folder}: {' '.join(str(e).split())[:200]}") from e

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        self.load()
        usable = {i for i, s in enumerate(samples) if references_of(s) and s.response.strip()}
        rows = [
            Row(0.0, {"precision": 0.0, "recall": 0.0, "f1": 0.0})
            if references_of(s)
            else Row(None, reason="it has no reference")
            for s in samples
        ]
        for members in groups_of(
            group.tolist()
        ):  # a forward never mixes groups, as its last bits follow from its shape
            some = [i for i in members if i in usable]
            found = (
                self.scorer.score([samples[i].response for i in some], [list(references_of(samples[i])) for i in some])
                if some
                else ((), (), ())
            )
            for i, p, r, f in zip(some, *map(list, found), strict=True):
                parts = {"precision": float(p), "recall": float(r), "f1": float(f)}
                rows[i] = Row(parts[self.measure], parts)
        return scored(rows)
