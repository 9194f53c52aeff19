"""From one command line to the points of a sweep: their overrides, names and checked configurations."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.override_parser.types import Glob, Override

from rlhf_cli import catalog
from rlhf_cli.compose import check_overrides, compose
from rlhf_cli.errors import ConfigError
from rlhf_cli.launch.choose import launcher_of
from rlhf_cli.plan import validate

LONGEST = 120  # characters of a folder's name; file systems allow 255, terminals less


@dataclass(frozen=True)
class Point:
    """One run of a sweep: `overrides` are what distinguishes it, `words` the whole command."""

    name: str
    overrides: tuple[str, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """A sweep's command line, taken apart: what each point shares, and what is swept."""

    asked: tuple[Override, ...]  # without the settings of the sweep itself
    settings: tuple[str, ...]  # sweep.KEY=VALUE
    config_dir: str | None

    @property
    def swept(self) -> list[Override]:
        return [o for o in self.asked if o.is_sweep_override()]

    @property
    def definition(self) -> list[str]:
        """What makes it this sweep and no other; the order of words does not."""
        folder = [f"--config-dir {self.config_dir}"] if self.config_dir else []
        return sorted(str(o.input_line) for o in self.asked) + folder

    @property
    def name(self) -> str:
        """The same for the same command, so that typing it again finds its points."""
        keys = sorted(_key(o).rpartition(".")[2] for o in self.swept) or ["point"]
        return shorten("-".join(map(safe, keys)), "\n".join(self.definition), always=True)

    def words(self, values: dict[str, str]) -> tuple[str, ...]:
        """The command of one point; `values` by the key as it was typed."""
        return tuple(
            f"{o.get_key_element()}={values[o.get_key_element()]}" if o.is_sweep_override() else str(o.input_line)
            for o in self.asked
        )

    def point(self, values: dict[str, str], name: str = "") -> Point:
        """The point where the swept keys have these values."""
        overrides = tuple(f"{key}={value}" for key, value in values.items())
        return Point(name or name_of(overrides), overrides, self.words(values))


def read(words: Sequence[str], config_dir: str | None) -> Command:
    """Parse the words after `rlhf train -m`; groups and options that do not exist are refused here."""
    asked = check_overrides("train", list(words), config_dir, sweep=True)
    mine = [o for o in asked if o.key_or_group.startswith("sweep.")]
    for o in mine:
        if o.is_sweep_override():
            raise ConfigError(f"{o.input_line}: a setting of the sweep itself; type one value")
    for o in asked:
        if o.key_or_group in ("run.name", "resume"):
            instead = "sweep.name=NAME names the sweep" if o.key_or_group == "run.name" else "leave it away"
            raise ConfigError(
                f"{o.input_line}: points are named by their overrides and continue by themselves; {instead}"
            )
    rest = tuple(o for o in asked if o not in mine)
    return Command(rest, tuple(str(o.input_line) for o in mine), config_dir)


def expand(command: Command) -> list[Point]:
    """Every combination of the swept values, in the order typed, the last key fastest."""
    keys = [o.get_key_element() for o in command.swept]
    values = [list(choices(o, command.config_dir)) for o in command.swept]
    for o, found in zip(command.swept, values, strict=True):
        if not found:
            raise ConfigError(f"{o.input_line}: matches nothing; give at least one value")
    points = [command.point(dict(zip(keys, row, strict=True))) for row in itertools.product(*values)]
    return distinct(points)


def choices(o: Override, config_dir: str | None) -> Iterator[str]:
    """The values of one swept key, as they are typed."""
    if o.is_interval_sweep():
        raise ConfigError(f"{o.input_line}: an interval has no list of values; add hydra/sweeper=optuna to search it")
    if isinstance(o._value, Glob):  # Hydra would list the group through a loader that only hydra.main has
        options = catalog.groups(config_dir).get(o.key_or_group, {})
        kept = (n for n in options if any(fnmatch.fnmatch(n, g) for g in o._value.include))
        yield from (n for n in kept if not any(fnmatch.fnmatch(n, g) for g in o._value.exclude))
    else:
        yield from o.sweep_string_iterator()


def distinct(points: Sequence[Point]) -> list[Point]:
    """Points whose names agree in what a file system can tell apart get a hash; the same point twice is one."""
    unique = list(dict.fromkeys(points))
    names = [p.name.lower() for p in unique]
    hashed = [replace(p, name=shorten(p.name, ",".join(p.overrides), always=True)) for p in unique]
    return [p if names.count(p.name.lower()) == 1 else h for p, h in zip(unique, hashed, strict=True)]


def name_of(overrides: Iterable[str]) -> str:
    """`algo=grpo,seed=1`, with what file systems dislike as `_`, never longer than they allow."""
    whole = ",".join(overrides)
    parts = [safe(re.sub(r"\s*,\s*", "+", o.replace("[", "").replace("]", "")).lstrip("+")) for o in overrides]
    return shorten(",".join(parts), whole) or "point"


def safe(text: str) -> str:
    """`text` with other characters than letters, digits and =+._- as one `_`."""
    return re.sub(r"[^A-Za-z0-9=+._-]+", "_", text).strip("._-")


def shorten(name: str, whole: str, *, always: bool = False) -> str:
    """Names that are too long, and with `always` all, end in a hash of what they stand for."""
    if len(name) <= LONGEST and not always:
        return name
    return f"{name[: LONGEST - 9].rstrip('._-,=')}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def check(points: Sequence[Point], config_dir: str | None) -> list[Any]:
    """Compose and validate every point. All that is wrong is said, one line each, and nothing is started."""
    made, wrong = [], dict[str, list[str]]()
    for p in points:
        try:
            cfg = compose("train", list(p.words), config_dir)
            validate(cfg)
            launcher_of(cfg).hardware(cfg, here=is_here(cfg))  # refuses what the launcher would
            made.append(cfg)
        except ConfigError as e:
            wrong.setdefault(str(e), []).append(p.name)
    lines = [f"{text}{_which(names, points)}" for text, names in wrong.items()]
    if len(lines) == 1:
        raise ConfigError(lines[0])
    if lines:
        for line in lines:
            print(f"rlhf: error: {line}", file=sys.stderr)
        bad = sum(map(len, wrong.values()))
        raise ConfigError(f"{bad} of {len(points)} points are wrong; nothing was started")
    return made


def _which(names: Sequence[str], points: Sequence[Point]) -> str:
    """The points that a message is about, unless it is about all."""
    if len(names) == len(points):
        return ""
    return f" (in {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''})"


def is_here(cfg: Any) -> bool:
    """Whether the points run on this machine, rather than being handed to a queue."""
    return cfg.names.get("launcher", "local") == "local"


def _key(o: Override) -> str:
    return o.key_or_group.replace("/", "_")
