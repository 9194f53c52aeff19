"""A reward distilled from a judge that labels beside the training: the policy never waits for it."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from rlhf_cli.config import nearest
from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.ask import Ask, Reply
from rlhf_cli.judges.strict import Unreadable, json_reply, one_of
from rlhf_cli.judges.text import GUARD, fenced
from rlhf_cli.rewards.annotator import FILE, Annotator, Arrivals
from rlhf_cli.rewards.distil import Classifier, Ranker, Table, join, split
from rlhf_cli.rewards.per_sample import Row, groups_of, scored
from rlhf_cli.types import Sample, Scores

if TYPE_CHECKING:
    from rlhf_cli.judges.judge import Judge

Labels = list[tuple[str, float]]
ARRIVALS = ("delayed", "ready", "sync")
TRAINING = ("updates", "batch", "lr", "hidden", "dropout", "most_labels")
POLL = 0.005  # seconds that arrival=ready waits
WAITING = 10_000  # items that wait for the judge at most: their texts travel with every checkpoint
MODELS = {"retrieval": Table, "classification": Classifier, "ranking": Ranker}


class Oni:
    """r(item) / N(item)^3: what a small model has learnt from a judge's labels of the policy's own responses, less for what repeats.

    An item is the response, case and blanks aside; N counts it among the responses to one prompt of a step, up to its own. Unseen
    items go to a background thread, which asks the judge about the newest first; at the end of a step whatever has come trains the
    model, and the next step is scored by it. Before the first label, and if the judge dies, the reward is 0. All labels are noted with
    their step (`annotations.jsonl` in the run), so that a resumed or replayed run is given them at the same steps.
    Components: `raw` (before the count), `count`; of the model that scored the step, `labelled`, `loss` (of its last minibatch),
    `agreement` (share of the last labels that it gave before it learnt them) and `staleness` (steps since labels came).
    See Zheng et al., Online Intrinsic Rewards for Decision Making Agents from Large Language Model Feedback, arXiv:2410.23022.
    """

    asks_judge = True
    moves = True  # what it gave a text earlier says nothing later

    def __init__(
        self,
        *,
        kind: Literal["retrieval", "classification", "ranking"],
        question: str,
        delivery: Mapping[str, Any],
        training: Mapping[str, Any],
        power: float,
        seed: int,
        replay: str,
    ) -> None:
        """Args:
        kind: retrieval (a table of labels), classification (a net says 1 or 0) or ranking (a net trained on pairs)
        question: what makes a response good, for the judge
        delivery: of labels. arrival: delayed (they count `delay` steps after they were asked for, so that runs repeat), ready (as soon
            as they are there, as published; only a replay repeats it) or sync (at the end of the step that asked); patience:
            seconds that a step waits for labels that are due, which are lost then; items: most that are asked about at a time
        training: of the net, after every step. updates: gradient steps; batch: labels in each; lr: of Adam; hidden: width of two
            layers; dropout; most_labels: from so many on it is trained no more
        power: of the count that divides the reward
        seed: of weights and minibatches
        replay: another run's annotations.jsonl, given at the same steps; empty: ask the judge
        """
        d = {**delivery}
        odd = {*d} ^ {"arrival", "delay", "patience", "items"} or {*training} ^ {*TRAINING}
        if odd:
            raise ConfigError(f"reward.oni: delivery or training has too much or too little: {', '.join(sorted(odd))}")
        if d["arrival"] not in ARRIVALS:
            raise ConfigError(
                f"reward.oni.delivery.arrival: {d['arrival']!r} is not allowed; choose one of {', '.join(ARRIVALS)}"
                f"{nearest(str(d['arrival']), ARRIVALS)}"
            )
        if min(d["delay"], d["items"], training["batch"]) < 1:
            raise ConfigError("reward.oni: delay, items and batch start at 1")
        self.kind, self.question, self.power = kind, question, power
        self.arrival, self.delay, self.patience, self.items = d["arrival"], d["delay"], d["patience"], d["items"]
        own = {k.removesuffix("_labels"): v for k, v in training.items()} | {"seed": seed}
        self.model: Any = Table() if kind == "retrieval" else MODELS[kind](**own)
        self.replay = Path(replay) if replay else None
        if self.replay is not None and not self.replay.is_file():
            raise ConfigError(f"reward.oni.replay={replay}: no such file; give a run's {FILE}")
        self.step = 0
        self.seen: set[str] = set()  # digests of what was met
        self.told: dict[str, float | None] = {"loss": None, "agreement": None}
        self.fresh = 0  # the step since which the last labels count
        self.waiting: list[str] = []  # unseen by the judge, the newest last
        self.asked: list[str] = []  # the batch under way, the newest first
        self.since = 0  # the step that asked
        self.arrivals = Arrivals(None, self.replay)
        self.annotator = Annotator(self.label)
        self.judge: Judge | None = None

    def connect(self, judge: Judge) -> None:
        """Get the judge; labels are noted in its run's folder."""
        self.judge = judge
        folder = getattr(judge, "folder", None)
        self.arrivals = Arrivals(folder / FILE if folder is not None else None, self.replay)

    def __call__(self, samples: Sequence[Sample], group: Tensor) -> Scores:
        found: dict[int, Row] = {}
        state = {"labelled": float(self._labelled()), "staleness": float(self.step - self.fresh), **self.told}
        for rows in groups_of(group.tolist()):
            items = [canonical(samples[i].response) for i in rows]
            counts: Counter[str] = Counter()
            for i, item, raw in zip(rows, items, self.model.reward(items), strict=True):
                counts[item] += 1
                parts = {"raw": raw, "count": float(counts[item]), **state}
                found[i] = Row(raw / counts[item] ** self.power, parts)
        return scored(found[i] for i in range(len(samples)))

    def observe(self, samples: Sequence[Sample], value: Tensor, comm: Any) -> None:
        """A step is scored: push its unseen items, take the labels that are due, and learn from them; the same on every rank."""
        new = [x for x in dict.fromkeys(canonical(s.response) for s in samples) if x and digest(x) not in self.seen]
        self.seen |= {digest(x) for x in new}
        self.waiting += (
            [join(a, b) for a, b in zip(new[::2], new[1::2], strict=False)] if self.kind == "ranking" else new
        )
        if self.arrival == "sync":
            self._ask(comm)
        labels = self._due(comm)
        if labels:
            self.told["agreement"] = self.model.agreement(labels)
            self.fresh = self.step + 1
        self.told |= self.model.learn(labels, self.step)
        if self.arrival != "sync":
            self._ask(comm)
        self._leave_out()
        self.step += 1

    def _leave_out(self) -> None:
        """Of what waits too long the oldest goes; it is new again when it is met again."""
        old, self.waiting = self.waiting[:-WAITING], self.waiting[-WAITING:]
        self.seen -= {digest(x) for item in old for x in (split(item) if self.kind == "ranking" else (item,))}

    def state_dict(self) -> dict[str, Any]:
        """Everything but the thread."""
        own = {
            "step": self.step, "seen": sorted(self.seen), "waiting": self.waiting, "asked": self.asked, "since": self.since,
            "told": self.told, "fresh": self.fresh,
        }  # fmt: skip
        return json.loads(json.dumps(own)) | {"model": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on; the batch under way is asked about again."""
        self.step, self.seen, self.waiting = int(state["step"]), set(state["seen"]), list(state["waiting"])
        self.told, self.fresh = dict(state["told"]), int(state["fresh"])
        self.asked, self.since = list(state["asked"]), int(state["since"])
        self.model.load_state_dict(state["model"])

    # -- labels --------------------------------------------------------------------------------------------------------

    def _ask(self, comm: Any) -> None:
        """Start a batch of the newest items, where none is under way."""
        if self.asked or not self.waiting:
            return
        self.asked, self.since = self.waiting[-self.items :][::-1], self.step
        del self.waiting[-self.items :]
        if comm.rank == 0 and self.arrivals.at(self.step + 1) is None:
            self.annotator.ask(self.asked)

    def _due(self, comm: Any) -> Labels:
        """The labels that count from now on: rank 0 decides, and a step that was taken before gets what it got then."""
        known = comm.broadcast(self.arrivals.at(self.step) if comm.rank == 0 else None)
        if known is None:
            known = comm.broadcast(self._arrived() if comm.rank == 0 else None)
            if comm.rank == 0:
                self.arrivals.write(self.step, known)
        if set(self.asked) & {item for item, _ in known} or (self.arrival != "ready" and self._is_due()):
            self.asked = []  # what is lost stays unlabelled
        return known

    def _is_due(self) -> bool:
        return bool(self.asked) and self.step - self.since >= (self.delay if self.arrival == "delayed" else 0)

    def _arrived(self) -> Labels:
        """On rank 0: wait for what is due, within `patience`; or take what is ready."""
        if not self.asked or (self.arrival != "ready" and not self._is_due()):
            return []
        if self.annotator.items != self.asked:  # after a resume
            self.annotator.ask(self.asked)
        found = dict(self.annotator.poll(POLL if self.arrival == "ready" else self.patience) or [])
        return [(x, found[x]) for x in self.asked if x in found]

    def label(self, some: Sequence[str]) -> Labels:
        """Ask the judge; an unreadable reply is the lower class or a tie, one that failed is no label."""
        assert self.judge is not None, "connect gives the judge"
        question = rank_question if self.kind == "ranking" else label_question
        read = read_rank if self.kind == "ranking" else read_label
        replies = self.judge.ask([question(item, self.question) for item in some])
        return [(item, read(r)) for item, r in zip(some, replies, strict=True) if not r.error]

    def _labelled(self) -> int:
        return len(self.model.labels) if self.kind == "retrieval" else len(self.model.data)


def canonical(text: str) -> str:
    """A text without regard to case and blanks."""
    return re.sub(r"\s+", " ", text.lower()).strip()


def digest(item: str) -> str:
    """Sixteen hexadecimal digits that stand for an item."""
    return hashlib.blake2b(item.encode("utf-8", "replace"), digest_size=8).hexdigest()


TASK = "You label short texts of a learning agent by this criterion:"


def label_question(item: str, criterion: str) -> Ask:
    """Is a text good?"""
    fence, texts = fenced([("text", item)])
    form = 'Reply with one JSON object and nothing else: {"label": "FOO" if the text meets it, "BAR" if it does not}.'
    return _question(criterion, fence, form, texts, ("FOO", "BAR"), lambda q: "FOO" if q(item) >= 0.5 else "BAR")


def rank_question(item: str, criterion: str) -> Ask:
    """Which of two texts is better?"""
    a, b = split(item)
    fence, texts = fenced([("text 1", a), ("text 2", b)])
    form = 'Reply with one JSON object and nothing else: {"label": "1", "2" or "tie": the text that meets it better}.'
    return _question(criterion, fence, form, texts, ("1", "2", "tie"), lambda q: "1" if q(a) > q(b) else "2")


def _question(criterion: str, fence: str, form: str, texts: str, allowed: Sequence[str], answer: Any) -> Ask:
    schema = {
        "type": "object", "properties": {"label": {"type": "string", "enum": list(allowed)}}, "required": ["label"],
        "additionalProperties": False,
    }  # fmt: skip
    system = f"{TASK}\n\n{criterion}\n\n{GUARD.format(fence=fence)}\n\n{form}"
    return Ask(system, texts, lambda quality: Reply(json.dumps({"label": answer(quality)})), schema)


def read_label(reply: Reply) -> float:
    """1 for FOO, else 0."""
    try:
        return float(one_of(json_reply(reply, ("label",))["label"], ("FOO", "BAR"), "label") == "FOO")
    except Unreadable:
        return 0.0


def read_rank(reply: Reply) -> float:
    """1 where the first is better, 0 where the second is, else 0.5."""
    try:
        found = one_of(json_reply(reply, ("label",))["label"], ("1", "2", "tie"), "label")
    except Unreadable:
        return 0.5
    return {"1": 1.0, "2": 0.0, "tie": 0.5}[found]
