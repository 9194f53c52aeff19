"""Before training: responses of the initial policy to every training prompt, and what the run's rewards make of them.

One JSON object a line in the run directory: a header with what made the file, then a prompt a line. Written chunk by chunk, so that
a run that was killed during it goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_cli import plan_reward, standins
from rlhf_cli.config import ModelSection, check_node
from rlhf_cli.data.record import Record
from rlhf_cli.engine.comm import Comm
from rlhf_cli.errors import ConfigError, GateError
from rlhf_cli.models import loading
from rlhf_cli.record.rundir import PREPASS
from rlhf_cli.rewards.nodes import PATHS, RESERVED, reward_nodes
from rlhf_cli.sample import Sample
from rlhf_cli.sources.assemble import sample_of, texts_of
from rlhf_cli.sources.sampled import draw, early, row_seed
from rlhf_cli.stages import score_sharded
from rlhf_cli.types import Experience, Scorer, Scores

CHUNK = 16  # prompts between two writes; the number of rows decoded together follows from it, so it is no setting
Line = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """The references of N rows."""

    values: Tensor  # [N, R, S], NaN where missing
    length: Tensor  # [N, R] tokens
    canned: Tensor | None = None  # [N, S] of the canned answer, NaN where missing


class References:
    """Responses of the initial policy by prompt, as the file holds them."""

    def __init__(self, lines: Sequence[Line], samples: int) -> None:
        self.row = {line["uid"]: i for i, line in enumerate(lines)}
        self.length = torch.tensor([line["tokens"][:samples] for line in lines])
        names = lines[0]["scores"] if lines else {}
        self.scores = {n: torch.tensor([_numbers(line["scores"][n][:samples]) for line in lines]) for n in names}
        there = bool(lines) and all("canned" in line for line in lines)
        self.canned = {n: torch.tensor(_numbers([line["canned"][n] for line in lines])) for n in names} if there else {}

    def lookup(self, samples: Sequence[Sample], names: Sequence[str]) -> Found:
        """The references of each row's prompt."""
        absent = next((s for s in samples if s.uid not in self.row), None)
        if absent is not None:
            raise GateError(
                f"the prepass holds no responses to the prompt {absent.uid!r}; it was made from other records"
            )
        index = torch.tensor([self.row[s.uid] for s in samples], dtype=torch.int64)
        values = torch.stack([self._of(n)[index] for n in names], -1)
        canned = torch.stack([self.canned[n][index] for n in names], -1) if self.canned else None
        return Found(values, self.length[index], canned)

    def spread(self, names: Sequence[str]) -> Tensor:
        """[S]: each source's standard deviation around the mean of its prompt, over all prompts."""
        found = []
        for name in names:
            x = self._of(name).double()
            off = x - x.nanmean(-1, keepdim=True)
            found.append(off.square().nanmean().sqrt().float())
        return torch.stack(found)

    def _of(self, name: str) -> Tensor:
        if name not in self.scores:
            raise ConfigError(f"the prepass holds no scores of {name}; it has {', '.join(self.scores)}")
        return self.scores[name]


@dataclass
class Prepass:
    """Makes the file, or goes on with it, or reads that of another run.

    Args:
        records: training prompts; `encoded`: their token ids.
        sampler: with the weights of the initial policy.
        scorer: the run's rewards, raw.
        samples: responses per prompt; `canned`: an answer that is scored besides.
        drawing: what is drawn otherwise than in training.
        seed: of every response.
        path: the file; `given`: it is another run's.
        header: what makes it, see `fingerprint`.
    """

    records: Sequence[Record]
    encoded: Sequence[Sequence[int]]
    sampler: Any
    scorer: Scorer
    comm: Comm
    samples: int
    seed: int
    path: Path
    header: Line
    given: bool = False
    canned: str = ""
    drawing: Mapping[str, float] = field(default_factory=dict)
    rest: Callable[[], None] = lambda: None
    found: References | None = None

    def references(self) -> References:
        """What `run` left."""
        assert self.found is not None, "the prepass runs before the first step"
        return self.found

    def run(self, at: int, asked: Callable[[], bool], note: Callable[[str], None]) -> bool:
        """Answer the prompts that the file lacks; False where a signal asked to stop. `at`: steps that the policy has learnt."""
        lines = self.comm.broadcast(self._have() if self.comm.rank == 0 else None)
        known = {line["uid"] for line in lines}
        todo = [i for i, r in enumerate(self.records) if r.uid not in known]
        if todo and (at or self.given):
            raise ConfigError(
                f"{self.path} lacks {len(todo)} of {len(self.records)} training prompts"
                + (
                    ", and the initial policy is gone; put the whole file back, or start a new run"
                    if at
                    else "; type prepass.path= to make it anew"
                )
            )
        if todo:
            note(
                f"prepass: {self.samples} responses of the initial policy{' and a canned answer' if self.canned else ''} "
                f"to each of {len(todo)} prompts" + (f"; {len(known)} are there already" if known else "")
            )
        for start in range(0, len(todo), CHUNK):
            if asked():
                return False
            more = self._answer(todo[start : start + CHUNK])
            if self.comm.rank == 0:
                _append(self.path, more)
            lines = [*lines, *more]
        if todo:
            self.rest()
        self.found = References(lines, self.samples)
        return True

    def _have(self) -> list[Line]:
        """The whole lines of the file, checked; a new file gets its header. Half a line, of a writer that was killed, is cut off."""
        if not self.path.exists():
            if self.given:
                raise ConfigError(f"prepass.path: no file {self.path}; give a run that made one, or its {PREPASS}")
            _append(self.path, [self.header])
            return []
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text and not self.given:
            os.truncate(self.path, len(whole))
        header, *lines = [json.loads(x) for x in whole.splitlines()] or [None]
        if header is None:
            _append(self.path, [self.header])
            return []
        refuse(header, self.header, self.path)
        own = {r.uid for r in self.records}
        return [line for line in lines if line["uid"] in own]

    def _answer(self, chosen: Sequence[int]) -> list[Line]:
        """The lines of some prompts; the ranks share the drawing and the scoring."""
        records = [self.records[i] for i in chosen]
        lines = self._drawn(chosen, records) if self.samples else [_line(r, 0, 0, [], [], {}) for r in records]
        if not self.canned:
            return lines
        scores = self._scored(records, [self.canned] * len(records), 1)
        return [_with_canned(line, i, scores.components) for i, line in enumerate(lines)]

    def _drawn(self, chosen: Sequence[int], records: Sequence[Record]) -> list[Line]:
        k = self.samples
        seeds = [row_seed(self.seed, -2, i, j) for i in chosen for j in range(k)]
        decoding = replace(self.sampler.decoding, wave=CHUNK * k, **self.drawing)
        done = early(getattr(self.scorer, "begin", None), self.sampler, records)
        drawn = draw(self.sampler, [self.encoded[i] for i in chosen], k, seeds, self.comm, decoding, done)
        texts = texts_of(self.sampler, drawn.ids)
        scores = self._scored(records, texts, k)
        return [_line(r, n * k, k, texts, drawn.ids, scores.components) for n, r in enumerate(records)]

    def _scored(self, records: Sequence[Record], texts: Sequence[str], k: int) -> Scores:
        """Raw values of k texts to each prompt."""
        owner = [r for r in records for _ in range(k)]
        exp = Experience(
            samples=tuple(sample_of(r, t) for r, t in zip(owner, texts, strict=True)),
            ids=torch.zeros(len(owner), 1, dtype=torch.int64),
            group=torch.arange(len(records)).repeat_interleave(k),
        )
        return score_sharded(self.scorer, exp, self.comm)


def fingerprint(cfg: Any) -> Line:
    """What decides the responses and their scores: the initial policy, the rewards, how responses are drawn."""
    from omegaconf import OmegaConf

    rollout = OmegaConf.to_container(cfg.rollout, resolve=True)
    assert isinstance(rollout, dict)
    kept = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "stop")
    return {
        "samples": cfg.prepass.samples,
        "model": _weights(cfg.model, cfg.seed),
        "reward": {node.name: _scorer(cfg, node.key, node.settings) for node in reward_nodes(cfg)},
        "decoding": {k: rollout[k] for k in kept} | drawing(cfg),
        "canned": cfg.prepass.canned,
    }


def drawing(cfg: Any) -> dict[str, float]:
    """The settings of decoding that are not those of training."""
    return {k: float(v) for k in ("temperature", "top_p") if (v := cfg.prepass[k]) is not None}


def refuse(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: Path) -> None:
    """Refuse a file that another model, reward or decoding made, or that has too few responses."""
    for what, key in (("model", "model"), ("reward", "reward"), ("decoding", "decoding")):
        if theirs.get(key) != ours[key]:
            names = sorted(
                k for k in {*theirs.get(key, {}), *ours[key]} if theirs.get(key, {}).get(k) != ours[key].get(k)
            )
            raise ConfigError(
                f"{path} was made with another {what} ({', '.join(names)}); type prepass.path= to make one for this run"
            )
    if ours.get("canned") and theirs.get("canned") != ours["canned"]:
        raise ConfigError(f"{path} scored another canned answer; type prepass.path= to make one for this run")
    if int(theirs.get("samples", 0)) < ours["samples"]:
        raise ConfigError(
            f"{path} holds {theirs.get('samples', 0)} responses per prompt; type prepass.samples={theirs.get('samples', 0)} or fewer"
        )


def file_of(path: str) -> Path:
    """The file that `prepass.path` means: a run stands for its own."""
    found = Path(path).expanduser()
    return found / PREPASS if found.is_dir() else found


def read(path: Path) -> Iterator[Line]:
    """The prompts of a file."""
    with path.open(encoding="utf-8") as f:
        next(f, None)
        yield from (json.loads(line) for line in f)


def _weights(model: Any, seed: int) -> Line:
    found = loading.fingerprint(model)
    own = {} if found["weights"] else {"path": found["path"], "seed": seed}
    return {"weights": found["weights"], "config": found["config"], **own}


def _scorer(cfg: Any, key: str, settings: Mapping[str, Any]) -> Line:
    """A scorer's settings, with the content of the files that its paths name."""
    sig, bound = check_node(settings, key, allow=list(cfg.allow_targets), reserved=RESERVED)
    made = {"target": sig.target, **json.loads(json.dumps(bound, default=str))}
    for name, value in bound.items():
        if not isinstance(value, str) or not value:
            continue
        if sig.flags.get("loads_model") and name in PATHS and value != "none":
            made[name] = value if standins.seed_of(value) is not None else _weights(ModelSection(path=value), 0)
        elif Path(value.partition(":")[0]).is_file():
            made[name] = (
                hashlib.sha256(Path(value.partition(":")[0]).read_bytes()).hexdigest() + value.partition(":")[2]
            )
    return made


def _line(
    record: Record, at: int, k: int, texts: Sequence[str], ids: Sequence[Sequence[int]], parts: Mapping[str, Tensor]
) -> Line:
    rows = range(at, at + k)
    scores = {name: [None if v != v else v for v in x[at : at + k].tolist()] for name, x in parts.items()}
    return {
        "uid": record.uid,
        "tokens": [len(ids[i]) for i in rows],
        "responses": [texts[i] for i in rows],
        "scores": scores,
    }


def _with_canned(line: Line, i: int, parts: Mapping[str, Tensor]) -> Line:
    """The line with the scores of the canned answer, the i-th of its step."""
    found = {name: [float(x[i])] for name, x in parts.items()}
    scores = line["scores"] or {name: [] for name in parts}
    return {**line, "scores": scores, "canned": {name: None if v != v else v for name, (v,) in found.items()}}


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if v is None else v for v in values]


def _append(path: Path, lines: Iterable[Line]) -> None:
    with path.open("a", encoding="utf-8") as f:
        f.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        f.flush()
        os.fsync(f.fileno())


def _refuse_memory(cfg: Any, scorer: Scorer) -> None:
    """A reward with a memory, as a function of the user may have, scores the references by another one than the steps."""
    parts = getattr(scorer, "scorers", {})
    for node in plan_reward.compared(cfg):
        if node.name in parts and hasattr(parts[node.name][1], "state_dict"):
            raise ConfigError(plan_reward.STALE.format(key=node.key))


def make_prepass(
    cfg: Any,
    records: Sequence[Record],
    encoded: Sequence[Sequence[int]],
    sampler: Any,
    scorer: Scorer,
    comm: Comm,
    folder: Path | None,
    rest: Callable[[], None],
) -> Prepass:
    """From the configuration."""
    _refuse_memory(cfg, scorer)
    given = bool(cfg.prepass.path)
    own = (folder or Path(cfg.run.dir) / cfg.run.name) / PREPASS
    k = plan_reward.drawn(cfg)
    header = {**fingerprint(cfg), "samples": k}
    return Prepass(
        records, encoded, sampler, scorer, comm, samples=k, seed=cfg.seed,
        path=file_of(cfg.prepass.path) if given else own, header=header, given=given, canned=cfg.prepass.canned,
        drawing=drawing(cfg), rest=rest,
    )  # fmt: skip
