"""A judge whose rubric another judge rewrites while the policy learns to please it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_cli.errors import ConfigError
from rlhf_cli.judges.ask import Ask, Quality, Reply
from rlhf_cli.judges.strict import Unreadable, integer, json_reply, whole
from rlhf_cli.judges.text import GUARD, conversation, fenced, unit_hash
from rlhf_cli.record.files import write_text_atomic
from rlhf_cli.rewards.judge import Asking, reading, text_of
from rlhf_cli.rewards.per_sample import Row
from rlhf_cli.shaping.running import Moments
from rlhf_cli.types import Sample

_ITEM = re.compile(r"<item>\s*(.*?)\s*</item>", re.S)
_POINTS = re.compile(r"^\s*-\s*(-?\d{1,3})\s*[:.]", re.M)
GRADE = "You are a strict and fair judge. Grade a response to a prompt by each criterion of this rubric, one after the other:"
ANALYSE = (
    "You supervise a judge that grades responses by a rubric. In at most a thousand words, analyse this case: is the score inflated, "
    "which criteria are missing or too vague, do the points spread well, does the response exploit the rubric?"
)
COUNT = "You rewrite the rubric of a judge after the analysis below. How many criteria should it have? Reply with one number."
WRITE = (
    "You rewrite the rubric of a judge after the analysis below. Write {n} criteria, each between <item> and </item>, as a line "
    "'### name' and one line '- score: description and example' for every integer score that it can give. Write nothing else."
)
MERGE = "Several rewritten rubrics follow. Merge them into one without repetition."
LONGEST = 60_000  # characters of all rewritten rubrics that a merge reads


@dataclass(frozen=True)
class Item:
    """One criterion and the integers that it can give."""

    text: str
    low: int
    high: int


def parse_rubric(text: str, low: int, high: int) -> list[Item]:
    """The criteria of `<item>` blocks; points are those of their lines `- score: ...`, or [low, high]. Raises Unreadable.

    Criteria that repeat word for word count once, in the order of their first.
    """
    blocks = list(dict.fromkeys(m for m in _ITEM.findall(text) if m))
    if not blocks or text.count("<item>") != text.count("</item>"):
        raise Unreadable("the rubric has no whole <item>...</item> block")
    points = [sorted({int(x) for x in _POINTS.findall(b)}) for b in blocks]
    if any(len(p) == 1 for p in points):
        points = [p if len(p) != 1 else sorted({0, *p}) for p in points]  # one line of points: it holds, or it does not
    return [Item(b, p[0] if p else low, p[-1] if len(p) > 1 else high) for b, p in zip(blocks, points, strict=True)]


class Mpo(Asking):
    """The sum of the integers that a judge gives for every criterion of a rubric, which is rewritten every `interval` steps.

    After `interval` scored steps a meta judge (judge.meta_model) analyses `cases` responses drawn uniformly from those
    steps, rewrites the rubric for each, how many criteria first, and merges the rewritten ones; the new rubric holds from the next step
    on, on all ranks. One that cannot be read keeps the old. Every version is kept in the run's rubrics/ folder, and `rubric_version`
    says which one scored, part `sum` in which points. A new rubric's points have another range: normalize=by_max divides by the largest
    sum, per_version_meanstd takes off the mean and divides by the population standard deviation of all sums so far that this version gave
    in training, the step's own included; held-out evaluation, which has no step, keeps the sum. The meta judge reads sums.
    Criteria are graded in one reply, each with its reason before its score; a reply that cannot be read is missing (the
    authors' code takes 0).
    See Kim et al., "Toward Evaluative Thinking: Meta Policy Optimization with Evolving Reward Models", arXiv:2504.20157.
    """

    asks_judge = True
    counts_steps = True
    moves = True  # what it gave a text earlier says nothing later

    def __init__(
        self,
        *,
        rubric: str,
        low: int,
        high: int,
        interval: int,
        cases: int,
        normalize: Literal["none", "by_max", "per_version_meanstd"],
    ) -> None:
        """Args:
        rubric: the first one, <item> blocks, or @FILE
        low: lowest score of a criterion that lists no points
        high: highest score of a criterion that lists no points
        interval: scored steps between rewritings; 0 never rewrites
        cases: responses that the meta judge reads
        normalize: none, by_max (the sum over its largest value) or per_version_meanstd (over the sums of this version so far)
        """
        if interval < 0 or cases < 1:
            raise ConfigError(f"reward.mpo: interval={interval}, cases={cases} are not allowed; type larger numbers")
        self.low, self.high, self.interval, self.cases, self.normalize = low, high, interval, cases, normalize
        self.version = self.steps = 0
        self.moments = Moments()  # of the version's sums
        self.seen: list[list[Any]] = []  # [place, prompt, response, score] of the cases with the smallest places
        try:
            self._adopt(text_of(rubric, "reward.mpo.rubric"))
        except Unreadable as e:
            raise ConfigError(f"reward.mpo.rubric: {e}; write each criterion between <item> and </item>") from None

    def _adopt(self, rubric: str) -> None:
        self.items, self.rubric = parse_rubric(rubric, self.low, self.high), rubric

    def trial(self) -> list[Ask]:
        """A grade, and where rubrics are rewritten a word to the meta judge: its absence would only show after an interval."""
        return [
            *super().trial(),
            *([replace(self._meta(ANALYSE, "Nothing yet."), max_tokens=16)] if self.interval else []),
        ]

    # -- grading -------------------------------------------------------------------------------------------------------

    def questions(self, samples: Sequence[Sample]) -> list[Ask]:
        return [self._grade(s) for s in samples]

    def rows(self, samples: Sequence[Sample], replies: Sequence[Reply]) -> list[Row]:
        rows = []
        for reply in replies:
            total, why = reading(self._sum, reply)
            parts = {"rubric_version": float(self.version), "criteria": float(len(self.items)), "sum": total}
            rows.append(Row(None if total is None else total / self._unit(), parts, why))
        return rows

    def _unit(self) -> float:
        """The sum that counts as 1."""
        most = sum(i.high for i in self.items)
        return float(most) if self.normalize == "by_max" and most else 1.0

    def settle(self, values: Tensor) -> Tensor:
        """The values [N] of a whole step, NaN where missing, in the units in which they count."""
        if self.normalize != "per_version_meanstd":
            return values
        self.moments.take(values[~values.isnan()])
        return (values - self.moments.mean) / (self.moments.std or 1.0)

    def _grade(self, sample: Sample) -> Ask:
        fence, texts = fenced([("prompt", conversation(sample)), ("response", sample.response)])
        names = [f"item_{i + 1}" for i in range(len(self.items))]
        listed = "\n\n".join(
            f"{n} (an integer from {i.low} to {i.high}):\n{i.text}" for n, i in zip(names, self.items, strict=True)
        )
        form = (
            "Reply with one JSON object and nothing else: for each of "
            + ", ".join(names)
            + ' an object {"rationale": "one sentence", "score": an integer}.'
        )
        properties = {n: _item_schema(i) for n, i in zip(names, self.items, strict=True)}
        schema = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
        system = f"{GRADE}\n\n{listed}\n\n{GUARD.format(fence=fence)}\n\n{form}"
        items = list(self.items)

        def stand_in(quality: Quality) -> Reply:
            q = quality(sample.response)
            scores = [i.low + int(q * (i.high - i.low + 1)) for i in items]
            found = {n: {"rationale": "by rule", "score": s} for n, s in zip(names, scores, strict=True)}
            return Reply(json.dumps(found))

        return Ask(system, texts, stand_in, schema, temperature=0.02)

    def _sum(self, reply: Reply) -> float:
        names = [f"item_{i + 1}" for i in range(len(self.items))]
        found = json_reply(reply, names)
        total = 0
        for name, item in zip(names, self.items, strict=True):
            one = found[name]
            if not isinstance(one, dict) or set(one) != {"rationale", "score"}:
                raise Unreadable(f"the judge's {name} holds no rationale and score")
            total += integer(one["score"], item.low, item.high, f"score of {name}")
        return float(total)

    # -- rewriting -----------------------------------------------------------------------------------------------------

    def observe(self, samples: Sequence[Sample], values: Tensor, comm: Any) -> None:
        """Remember cases, and rewrite the rubric when it is due; rank 0 asks, all get the same."""
        if comm.rank == 0:
            self._write(f"version-{self.version:04d}", self.rubric)
        if not self.interval:
            return
        self.steps += 1
        for i in (~torch.isnan(values)).nonzero().flatten().tolist():
            s = samples[i]
            self.seen.append(
                [
                    unit_hash("case", self.steps, i, s.uid, s.response),
                    s.prompt,
                    s.response,
                    float(values[i]) * self._unit(),
                ]
            )
        self.seen = sorted(self.seen)[: self.cases]
        if self.steps % self.interval:
            return
        made = comm.broadcast(self.refine() if comm.rank == 0 and self.seen else None)
        self.seen = []
        if made is not None:
            self.version += 1
            self.moments = Moments()
            self._adopt(made)
            if comm.rank == 0:
                self._write(f"version-{self.version:04d}", self.rubric)

    def refine(self) -> str | None:
        """A new rubric from the cases, or None where the meta judge's could not be read."""
        assert self.judge is not None, "connect gives the judge"
        found = [reading(whole, r) for r in self.judge.ask([self._meta(ANALYSE, self._case(c)) for c in self.seen])]
        analyses = [text for text, _ in found if text is not None]
        if analyses:
            found = self._rewrite("", analyses)
        rewritten = [text for text, _ in found if analyses and text is not None]
        if len(rewritten) > 1:
            found = self._rewrite(MERGE, ["\n\n".join(rewritten)[:LONGEST]])
            rewritten = [text for text, _ in found if text is not None]
        if not rewritten:
            why = next(why for _, why in found if why)
            self._write(f"refused-{self.steps:06d}", f"no rewritten rubric could be read; the old one stays: {why}\n")
            return None
        return rewritten[0]

    def _rewrite(self, task: str, given: Sequence[str]) -> list[tuple[str | None, str]]:
        """For each text: how many criteria, then the criteria; None where they cannot be read, and why."""
        assert self.judge is not None
        counts = [
            reading(whole, r)[0] for r in self.judge.ask([self._meta(f"{task} {COUNT}".strip(), g) for g in given])
        ]
        tasks = [f"{task} {WRITE.format(n=self._count(c))}".strip() for c in counts]
        written = self.judge.ask([self._meta(t, g) for t, g in zip(tasks, given, strict=True)])
        return [reading(self._readable, r) for r in written]

    def _count(self, text: str | None) -> int:
        """The one number that was asked for; of a reply that says more, as many as there are."""
        alone = re.fullmatch(r"(\d{1,2})\.?", text or "")
        return max(1, int(alone[1])) if alone else len(self.items)

    def _readable(self, reply: Reply) -> str:
        """The criteria of a reply that holds nothing else: what it quotes from a response is no criterion."""
        text = whole(reply)
        parse_rubric(text, self.low, self.high)
        if _ITEM.sub("", text).strip():
            raise Unreadable("the rewritten rubric holds text beside its <item> blocks")
        return "\n\n".join(f"<item>\n{b}\n</item>" for b in dict.fromkeys(_ITEM.findall(text)))

    def _case(self, case: Sequence[Any]) -> str:
        return f"Prompt:\n{case[1]}\n\nResponse:\n{case[2]}\n\nScore: {case[3]:g}"

    def _meta(self, task: str, given: str) -> Ask:
        fence, texts = fenced([("rubric", self.rubric), ("given", given)])
        return Ask(
            f"{task}\n\n{GUARD.format(fence=fence)}", texts, self._meta_stand_in(task), max_tokens=2048, meta=True
        )

    def _meta_stand_in(self, task: str) -> Any:
        text = "by rule"
        if COUNT in task:
            text = "2"
        elif "<item>" in task:
            text = "\n".join(
                f"<item>\n### criterion {i} after {self.version}\n- 1: no\n- 5: yes\n</item>" for i in (1, 2)
            )
        return lambda quality: Reply(text)

    def _write(self, name: str, text: str) -> None:
        folder = self.judge.folder if self.judge is not None else None
        if folder is None:
            return
        path = folder / "rubrics" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text_atomic(path, text)

    # -- between steps -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Rubric, version, steps seen, cases, and the moments of the version's sums."""
        own = {"rubric": self.rubric, "version": self.version, "steps": self.steps, "seen": self.seen}
        return own | {"moments": self.moments.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a rubric."""
        self._adopt(str(state["rubric"]))
        self.version, self.steps, self.seen = (
            int(state["version"]),
            int(state["steps"]),
            [list(c) for c in state["seen"]],
        )
        if "moments" in state:  # a run of before there were any goes on
            self.moments.load_state_dict(state["moments"])


def _item_schema(item: Item) -> dict[str, Any]:
    score = {"type": "integer", "minimum": item.low, "maximum": item.high}
    return {
        "type": "object",
        "properties": {"rationale": {"type": "string"}, "score": score},
        "required": ["rationale", "score"],
        "additionalProperties": False,
    }
