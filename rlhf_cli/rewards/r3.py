"""R^3: relevance as a reward, with the two terms that stop its shortcuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from rlhf_cli.errors import ConfigError
from rlhf_cli.rewards.embedding import Embedding
from rlhf_cli.rewards.per_sample import Row, references_of, scored
from rlhf_cli.rewards.repetition import repeated
from rlhf_cli.types import Sample, Scores


class R3:
    """Open-ended prompts: relevance to the prompt x length incentive x repetition term; others: F(likeness to the reference) x
    repetition term.

    Length incentive: words / per, at most cap / per. Repetition term: distinct trigrams of words / trigrams; 1 below three
    words, 0 for the empty response. F maps the range of the closed branch linearly to that of the open one. Relevance below
    0 counts as 0, since a longer response would lower it. Which prompts are open is `meta.type` (open or closed); without
    it a prompt is closed whose first reference has at most `closed_words` words, and open without a reference.
    Parts: `relevance`, `length`, `repetition`, `open`.
    See Kim and Seo, Preference-free Alignment Learning with Regularized Relevance Reward, arXiv:2402.03469.
    """

    loads_model = True
    path_is = "FOLDER"

    def __init__(
        self,
        *,
        path: str,
        similarity: Literal["dot", "cosine"],
        per: int,
        cap: int,
        closed_words: int,
        closed_range: list[float],
        open_range: list[float],
    ) -> None:
        """Args:
        path: encoder: packaged (all-MiniLM-L6-v2), a Hugging Face folder or a Hub id (the paper: facebook/contriever)
        similarity: dot (contriever) or cosine
        per: words that make a length incentive of 1
        cap: words beyond which it grows no more
        closed_words: without meta.type: longest first reference of a closed prompt, words
        closed_range: [low, high] of the likeness to references on samples of the initial policy: F's end points
        open_range: [low, high] of the open branch's reward on the same samples, onto which F maps them
        """
        if per < 1 or cap < 1 or len(closed_range) != 2 or len(open_range) != 2 or closed_range[0] >= closed_range[1]:
            raise ConfigError(
                f"reward.r3: per={per}, cap={cap}, closed_range={list(closed_range)}, open_range={list(open_range)} are not "
                "allowed; per and cap start at 1, ranges are two numbers, e.g. closed_range=[0.0,1.0]"
            )
        settings = {"to": "both", "references": "best", "similarity": similarity, "batch_size": 16, "max_tokens": 256}
        self.encoder = Embedding(path=path, device="auto", dtype="fp32", **settings)  # type: ignore[arg-type]
        self.per, self.cap, self.closed_words = per, cap, closed_words
        self.closed_range, self.open_range = tuple(closed_range), tuple(open_range)

    def load(self) -> None:
        """Read the encoder, unless it is here already."""
        self.encoder.load()

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        return scored(self._row(s, near) for s, near in zip(samples, self.encoder.near(samples), strict=True))

    def _row(self, sample: Sample, near: dict[str, float]) -> Row:
        words = sample.response.split()
        is_open = self._open(sample)
        if not is_open and "references" not in near:
            return Row(None, reason="its prompt is closed, and it has no reference")
        repetition = 1 - repeated([w.lower() for w in words], 3) if words else 0.0
        length = min(len(words), self.cap) / self.per
        relevance = max(0.0, near["prompt"]) if is_open else near["references"]
        value = relevance * length * repetition if is_open else self._onto_open(relevance) * repetition
        return Row(value, {"relevance": relevance, "length": length, "repetition": repetition, "open": float(is_open)})

    def _open(self, sample: Sample) -> bool:
        kind = sample.meta.get("type")
        if kind is not None:
            if kind not in ("open", "closed"):
                raise ConfigError(f"reward=r3: meta.type of {sample.uid!r} is {kind!r}; it may be open or closed")
            return kind == "open"
        references = references_of(sample)
        return not references or len(references[0].split()) > self.closed_words

    def _onto_open(self, x: float) -> float:
        (a, b), (low, high) = self.closed_range, self.open_range
        return low + (x - a) / (b - a) * (high - low)
