"""Small reward models distilled from labels: a table, a classifier, a ranker. Texts become hashed counts of words and word pairs."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 2048
LOWEST = -0.5  # standardised scores up to it count as nothing
Labels = Sequence[tuple[str, float]]


def features(texts: Sequence[str]) -> Tensor:
    """[N, FEATURES] of length 1 (0 for a text without words): words and pairs of neighbours, hashed with a sign."""
    x = torch.zeros(len(texts), FEATURES)
    for i, text in enumerate(texts):
        said = re.findall(r"\w+|[^\w\s]", text.lower())
        for gram in [*said, *(f"{a} {b}" for a, b in pairwise(said))]:
            digest = int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=5).digest(), "big")
            x[i, digest % FEATURES] += 1.0 if digest >> 39 else -1.0
    return F.normalize(x, dim=-1)


def agreed(said: Sequence[float], labels: Labels) -> float:
    """Share of labels that were said."""
    return sum(x == y for x, (_, y) in zip(said, labels, strict=True)) / len(labels)


class Net(nn.Module):
    """Features to `outputs` numbers through two hidden layers, as in ONI; weights are a function of the seed."""

    def __init__(self, hidden: int, outputs: int, dropout: float, seed: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(a, b) for a, b in ((FEATURES, hidden), (hidden, hidden), (hidden, outputs))]
        )
        self.dropout = dropout
        g = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            bound = layer.in_features**-0.5  # type: ignore[operator]
            for p in layer.parameters():
                p.data.uniform_(-bound, bound, generator=g)

    def forward(self, x: Tensor, chance: torch.Generator | None = None) -> Tensor:
        """[N, outputs]; with a generator, dropout by its numbers."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
            if chance is not None and self.dropout:
                kept = torch.rand(x.shape, generator=chance) >= self.dropout
                x = x * kept / (1 - self.dropout)
        return self.layers[-1](x)


class Table:
    """retrieval: the label of an item, 0 without one."""

    def __init__(self) -> None:
        self.labels: dict[str, float] = {}

    def learn(self, new: Labels, step: int) -> dict[str, float]:
        """Remember."""
        self.labels |= dict(new)
        return {}

    def agreement(self, labels: Labels) -> float | None:
        """Share of labels that are what the table says; None where it says nothing yet."""
        return agreed(self.reward([item for item, _ in labels]), labels) if self.labels else None

    def reward(self, items: Sequence[str]) -> list[float]:
        """0 for items nobody has labelled."""
        return [self.labels.get(x, 0.0) for x in items]

    def state_dict(self) -> dict[str, Any]:
        """The labels."""
        return {"labels": dict(self.labels)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.labels = {str(k): float(v) for k, v in state["labels"].items()}


class Learned:
    """What classifier and ranker share: a net, its optimizer, and the labels so far.

    Args:
        outputs: of the net.
        updates, batch, lr, hidden, dropout: of its training; after `most` labels it is trained no more.
        seed: of weights, minibatches and dropout.
    """

    def __init__(
        self, outputs: int, *, updates: int, batch: int, lr: float, hidden: int, dropout: float, most: int, seed: int
    ) -> None:
        self.updates, self.batch, self.most, self.seed = updates, batch, most, seed
        self.net = Net(hidden, outputs, dropout, seed)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr)
        self.data: list[tuple[str, float]] = []

    def loss(self, rows: Labels, chance: torch.Generator) -> Tensor:
        """Of a minibatch."""
        raise NotImplementedError

    def learn(self, new: Labels, step: int) -> dict[str, float]:
        """Add labels, and take some gradient steps while there are not too many; the last loss."""
        self.data += [(str(item), float(x)) for item, x in new]
        if not self.data or len(self.data) >= self.most:
            return {}
        g = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        value = math.nan
        for _ in range(self.updates):
            chosen = torch.randint(len(self.data), (min(self.batch, len(self.data)),), generator=g)
            loss = self.loss([self.data[i] for i in chosen.tolist()], g)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            value = float(loss.detach())
        return {"loss": value}

    def state_dict(self) -> dict[str, Any]:
        """Labels, weights and moments."""
        moments = self.optimizer.state_dict()["state"]
        flat = {f"{i}.{k}": torch.as_tensor(x).clone() for i, m in moments.items() for k, x in m.items()}
        weights = {k: v.clone() for k, v in self.net.state_dict().items()}
        return {"data": [list(row) for row in self.data], "net": weights, "adam": flat}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on."""
        self.data = [(str(item), float(x)) for item, x in state["data"]]
        self.net.load_state_dict({k: torch.as_tensor(v) for k, v in state["net"].items()})
        moments: dict[int, dict[str, Tensor]] = {}
        for key, x in state["adam"].items():
            i, _, name = key.partition(".")
            moments.setdefault(int(i), {})[name] = torch.as_tensor(x)
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": moments, "param_groups": whole["param_groups"]})


class Classifier(Learned):
    """classification: two classes, cross-entropy; 1 where the second is likelier than not."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(2, **settings)

    def loss(self, rows: Labels, chance: torch.Generator) -> Tensor:
        """Cross-entropy."""
        target = torch.tensor([x for _, x in rows]).round().long()
        return F.cross_entropy(self.net(features([item for item, _ in rows]), chance), target)

    def agreement(self, labels: Labels) -> float | None:
        """Share of labels that are what the net says; None before the first label."""
        return agreed(self.reward([item for item, _ in labels]), labels) if self.data else None

    @torch.no_grad()
    def reward(self, items: Sequence[str]) -> list[float]:
        """Hard 0 or 1; 0 before the first label."""
        if not self.data:
            return [0.0] * len(items)
        return (self.net(features(items)).softmax(-1)[:, 1] > 0.5).float().tolist()


class Ranker(Learned):
    """ranking: Bradley-Terry on pairs with a soft label; scores standardised by a running mean and variance, small ones cut to 0."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(1, **settings)
        self.count, self.mean, self.square = 0, 0.0, 0.0

    def loss(self, rows: Labels, chance: torch.Generator) -> Tensor:
        """-y log sigmoid(d) - (1 - y) log sigmoid(-d) with d = s(a) - s(b); y = 0.5 for a tie."""
        pairs = [split(item) for item, _ in rows]
        both = self.net(features([a for a, _ in pairs] + [b for _, b in pairs]), chance)[:, 0]
        d = both[: len(rows)] - both[len(rows) :]
        return F.binary_cross_entropy_with_logits(d, torch.tensor([x for _, x in rows], dtype=d.dtype))

    def learn(self, new: Labels, step: int) -> dict[str, float]:
        """Train, then let the running moments see the items that came."""
        found = super().learn(new, step)
        for x in self.scores([t for item, _ in new for t in split(item)]):
            self.count += 1
            off = x - self.mean
            self.mean += off / self.count
            self.square += off * (x - self.mean)
        return found

    def agreement(self, labels: Labels) -> float | None:
        """Share of the pairs, ties left out, whose order the net has; None before the first label and where all are ties."""
        decided = [(split(item), x) for item, x in labels if x != 0.5]
        if not self.data or not decided:
            return None
        both = self.scores([text for pair, _ in decided for text in pair])
        return agreed([float(a > b) for a, b in zip(both[::2], both[1::2], strict=True)], [("", x) for _, x in decided])

    @torch.no_grad()
    def scores(self, items: Sequence[str]) -> list[float]:
        """What the net says."""
        return self.net(features(items))[:, 0].tolist() if items else []

    def reward(self, items: Sequence[str]) -> list[float]:
        """Standardised; 0 at or below -0.5, and before the first label."""
        if self.count < 2:
            return [0.0] * len(items)
        std = math.sqrt(self.square / self.count) or 1.0
        found = [(x - self.mean) / std for x in self.scores(items)]
        return [x if x > LOWEST else 0.0 for x in found]

    def state_dict(self) -> dict[str, Any]:
        """With the running moments."""
        return super().state_dict() | {"moments": [self.count, self.mean, self.square]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on."""
        super().load_state_dict(state)
        self.count, self.mean, self.square = (
            int(state["moments"][0]),
            float(state["moments"][1]),
            float(state["moments"][2]),
        )


SEAM = "\n\x1f\n"


def join(first: str, second: str) -> str:
    """Two texts as one item."""
    return f"{first}{SEAM}{second}"


def split(item: str) -> tuple[str, str]:
    """The two texts of a joined item."""
    first, _, second = item.partition(SEAM)
    return first, second
