"""Runs that differ only in their seed are one configuration; its name is the fewest settings that tell it from the others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_cli.catalog import typed
from rlhf_cli.report.numbers import RunFiles, flat

FIRST = ("experiment", "algo", "reward", "model", "dataset")  # groups that name a configuration before others do
# How a run is carried out, rather than what it is.
WITHOUT = (
    "seed",
    "run",
    "resume",
    "tracker",
    "launcher",
    "sweep",
    "checkpoint",
    "names",
    "input",
    "output",
    "allow_targets",
)
WITHOUT_KEYS = (
    "hardware.threads", "hardware.timeout", "hardware.micro_batch_tokens", "rollout.rows", "eval.bootstrap", "eval.every",
)  # fmt: skip
GROUPS_WITHOUT = ("tracker", "launcher", "hardware", "debug")


@dataclass
class Configuration:
    """A row of a comparison."""

    settings: dict[str, str]  # what tells it from the others, as typed
    runs: list[RunFiles] = field(default_factory=list)  # finished, one per seed, in order of seed
    others: list[RunFiles] = field(default_factory=list)  # not finished: never counted
    repeated: list[RunFiles] = field(default_factory=list)  # finished, of a seed that another run has

    @property
    def label(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.settings.items()) or "all runs"

    @property
    def seeds(self) -> list[int]:
        return [r.seed for r in self.runs]

    @property
    def any(self) -> RunFiles:
        """A run whose configuration stands for all."""
        return (self.runs or self.others)[0]


def group(runs: Sequence[RunFiles]) -> list[Configuration]:
    """One configuration for each set of equal settings, in the order of the runs."""
    known = [r for r in runs if r.config]
    cells: list[tuple[dict[str, str], list[RunFiles]]] = [({}, known)]
    for key, of in _questions(known):
        cells = [made for labels, members in cells for made in _split(key, of, labels, members)]
    made = [Configuration(labels, *_sorted(members)) for labels, members in cells if members]
    place = {r.path: i for i, r in enumerate(known)}
    return sorted(made, key=lambda c: min(place[r.path] for r in (*c.runs, *c.others, *c.repeated)))


Of = Callable[[RunFiles], Any]


def _questions(runs: Sequence[RunFiles]) -> list[tuple[str, Of]]:
    """What may tell runs apart: the choices of groups first, then single settings."""
    groups = dict.fromkeys(
        g for r in runs for g in r.config.get("names", {}) if "@" not in g and g not in GROUPS_WITHOUT
    )
    ordered = [g for g in FIRST if g in groups] + [g for g in groups if g not in FIRST]
    questions: list[tuple[str, Of]] = [(g, _choice(g)) for g in ordered]
    settings = {r.path: dict(flat(r.config)) for r in runs}
    keys = dict.fromkeys(k for found in settings.values() for k in found)
    for key in keys:
        if key.partition(".")[0] not in WITHOUT and key not in WITHOUT_KEYS:
            questions.append((key, lambda r, key=key: settings[r.path].get(key)))
    return questions


def _choice(name: str) -> Of:
    return lambda r: r.config.get("names", {}).get(name)


def _split(
    key: str, of: Of, labels: dict[str, str], members: list[RunFiles]
) -> list[tuple[dict[str, str], list[RunFiles]]]:
    """The cell as it is where all agree, else one cell for each value, named by it."""
    found: dict[Hashable, list[RunFiles]] = {}
    for r in members:
        found.setdefault(typed(of(r)), []).append(r)
    if len(found) < 2:
        return [(labels, members)]
    return [({**labels, key: str(value)}, inside) for value, inside in found.items()]


def _sorted(members: Sequence[RunFiles]) -> tuple[list[RunFiles], list[RunFiles], list[RunFiles]]:
    """Finished runs one per seed, the others, and repeated seeds: a run repeats bit for bit, so it counts once."""
    done = sorted((r for r in members if r.state == "finished"), key=lambda r: (r.seed, str(r.status.get("time", ""))))
    newest = {r.seed: r for r in done}
    return (
        list(newest.values()),
        [r for r in members if r.state != "finished"],
        [r for r in done if newest[r.seed] is not r],
    )
