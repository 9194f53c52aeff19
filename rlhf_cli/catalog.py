"""What can be chosen: groups, options, keys and their meaning, for list, show, help texts, completion and messages.

Everything is read as text (option files for their names and first comment lines, `config.py` for keys and comments),
so that it costs milliseconds.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import shutil
import textwrap
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlhf_cli import config
from rlhf_cli.config import nearest
from rlhf_cli.errors import ConfigError
from rlhf_cli.signature import source_file

GROUPS: dict[str, str] = {
    "model": "the model that is trained",
    "dataset": "prompts, pairs, rankings or demonstrations",
    "environment": "the other party of a dialogue of several turns",
    "reward": "what a response is worth; reward=[a,b] adds several",
    "combine": "how several rewards become one",
    "shaping": "what is added to or taken from the reward, such as a KL penalty",
    "select": "which rows and pairs are trained on",
    "credit": "how rewards become advantages",
    "correction": "weights for samples of a sampler that is not exactly the learner",
    "source": "where experience comes from: a sampler or a recording",
    "rollout": "how responses are drawn",
    "hardware": "device, precision, ZeRO stage, processes",
    "launcher": "where the processes start",
    "tracker": "where metrics are mirrored",
    "algo": "the method: losses, credit, source and their numbers",
    "experiment": "a whole recipe in one word",
    "debug": "switches that shrink or break a run on purpose",
    "objective": "unreduced losses, chosen by recipes for each term",
    "reduce": "weights that turn a loss into a number, chosen by recipes",
}


@dataclass(frozen=True)
class Option:
    """One file of a group."""

    group: str
    name: str
    path: Path
    line: str  # first comment line: what it is, or title, authors, arXiv id
    package: str  # key that the file fills; `_global_` for recipes


@dataclass(frozen=True)
class Field:
    """One key of the schema."""

    type: str
    doc: str
    default: str


def conf_dir() -> Path:
    """The folder of the shipped options."""
    spec = importlib.util.find_spec("rlhf_cli.conf")
    if spec is None or spec.origin is None:
        raise ConfigError("rlhf_cli.conf is not installed; type: pip install -e . (or: make setup)")
    return Path(spec.origin).parent


def conf_dirs(config_dir: str | None) -> list[Path]:
    """The folders that hold options: ours, then the user's."""
    if config_dir is None:
        return [conf_dir()]
    if not Path(config_dir).is_dir():
        raise ConfigError(
            f"--config-dir {config_dir}: no such folder; give the one that holds your groups, e.g. DIR/algo/mine.yaml"
        )
    return [conf_dir(), Path(config_dir).resolve()]


def option(path: Path, root: Path) -> Option:
    """Read one option file's header."""
    group = path.parent.relative_to(root).as_posix()
    package, line = group.replace("/", "."), ""
    for text in path.read_text(encoding="utf-8").splitlines():
        head = text.lstrip("# ").strip()
        if not text.startswith("#"):
            break
        if head.startswith("@package"):
            package = head.split()[-1]
        elif not line:
            line = head
    return Option(group, path.stem, path, line, package)


def groups(config_dir: str | None = None) -> dict[str, dict[str, Option]]:
    """Group -> option name -> option, in the order of `GROUPS`; the user's own groups come last."""
    found: dict[str, dict[str, Option]] = {}
    shipped, *own = conf_dirs(config_dir)
    for made in [*_shipped(shipped), *(o for root in own for o in _options(root))]:
        twin = found.setdefault(made.group, {}).setdefault(made.name, made)
        if twin.path != made.path:
            raise ConfigError(
                f"{made.path}: {made.group}={made.name} exists already ({twin.path}); give yours another name"
            )
    order = [g for g in GROUPS if g in found] + sorted(g for g in found if g not in GROUPS)
    return {g: found[g] for g in order}


def _options(root: Path) -> list[Option]:
    return [option(path, root) for path in sorted(p for p in root.rglob("*.yaml") if p.parent != root)]


@lru_cache(maxsize=1)
def _shipped(root: Path) -> tuple[Option, ...]:
    """Our own options, which no process sees change."""
    return tuple(_options(root))


def defaults(config_name: str) -> dict[str, str | None]:
    """Group -> default option of a primary config, in its order."""
    return dict(_defaults(conf_dir() / f"{config_name}.yaml"))


@lru_cache(maxsize=8)
def _defaults(primary: Path) -> dict[str, str | None]:
    import yaml

    listed = yaml.safe_load(primary.read_text(encoding="utf-8"))["defaults"]
    return {group: name for entry in listed if isinstance(entry, dict) for group, name in entry.items()}


@lru_cache(maxsize=1)
def fields() -> dict[str, Field]:
    """Dotted key -> field of the schema, from the source of `config.py`; `learners.*.head` stands for any learner's."""
    path = source_file("rlhf_cli.config")
    assert path is not None, "config.py lies beside this file"
    text = path.read_text(encoding="utf-8")
    comments = {
        t.start[0]: t.string.lstrip("# ")
        for t in tokenize.generate_tokens(io.StringIO(text).readline)
        if t.type == tokenize.COMMENT
    }
    classes = {n.name: n for n in ast.parse(text).body if isinstance(n, ast.ClassDef)}
    return dict(_flatten("", "Root", classes, comments))


def _flatten(
    prefix: str, name: str, classes: Mapping[str, ast.ClassDef], comments: Mapping[int, str]
) -> Iterator[tuple[str, Field]]:
    for node in classes[name].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        key, kind = prefix + ast.unparse(node.target), ast.unparse(node.annotation)
        inner = kind.removeprefix("dict[str, ").rstrip("]")
        doc = comments.get(node.end_lineno or 0, "")
        if inner in classes:
            yield key, Field(kind, doc or (ast.get_docstring(classes[inner]) or "").splitlines()[0], "")
            yield from _flatten(f"{key}.*." if kind != inner else f"{key}.", inner, classes, comments)
        else:
            yield key, Field(kind, doc, _default(node.value))


def _default(value: ast.expr | None) -> str:
    """The default as it is typed on the command line."""
    made = value.keywords[0].value if isinstance(value, ast.Call) and value.keywords else value
    if isinstance(made, ast.Lambda):
        made = made.body
    if isinstance(made, ast.Call):  # list(CONSTANT)
        return typed(list(getattr(config, ast.unparse(made.args[0]))))
    if isinstance(made, ast.Name):
        return "{}" if made.id == "dict" else "[]"
    return typed(ast.literal_eval(made)) if made is not None else ""


def field_of(key: str) -> Field | None:
    """The schema's field for a dotted key."""
    parts = key.split(".")
    starred = ".".join([parts[0], "*", *parts[2:]])
    return fields().get(key) or fields().get(starred)


def typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(typed(v) for v in value) + "]"
    return str(value) if value != "" else "''"


# ---- text ----


def width() -> int:
    """Columns of the terminal."""
    return min(shutil.get_terminal_size((100, 24)).columns, 120)


def table(rows: Iterable[tuple[str, str]], indent: str = "  ", most: int = 34) -> list[str]:
    """Two columns; the right one wraps under itself, and moves to its own line when the left one is long."""
    pairs = list(rows)
    column = max((len(left) for left, _ in pairs if len(left) <= most), default=most) + 2
    lines: list[str] = []
    for left, right in pairs:
        pad = indent + " " * column
        wrapped = textwrap.wrap(right, max(width() - len(pad), 30), break_long_words=False, break_on_hyphens=False) or [
            ""
        ]
        if len(left) + 2 > column:
            lines += [indent + left, *(pad + w for w in wrapped if w)]
        else:
            lines += [(indent + left.ljust(column) + wrapped[0]).rstrip(), *(pad + w for w in wrapped[1:])]
    return lines


def short(path: Path) -> str:
    """The path from here, when it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def must(word: str, allowed: Iterable[str], wrong: str, kind: str) -> str:
    """`word`, which must be one of `allowed`."""
    names = list(allowed)
    if word not in names:
        guess = nearest(word, names) or ";"
        raise ConfigError(f"{wrong}{guess} {kind}: {', '.join(names) or 'none yet'}")
    return word
