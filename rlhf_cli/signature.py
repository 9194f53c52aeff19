"""Signatures of configurable functions, read from source without importing it.

`rlhf train --cfg job`, `rlhf show` and `rlhf plan` must answer at once, and importing torch takes seconds; so the names, types and
one-line docs of a target's parameters, and the columns it takes and gives, come from its syntax tree.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ConfigError

PACKAGE = "rlhf_cli"
REQUIRED = object()


@dataclass(frozen=True)
class Param:
    """One keyword-only setting of a target."""

    name: str
    type: str
    doc: str
    default: Any = REQUIRED
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Signature:
    """What a target takes: `columns` are its positional parameters (of an object: those of its calls), `params` its keyword-only ones."""

    target: str
    columns: tuple[str, ...]
    params: dict[str, Param]
    gives: tuple[str, ...]
    doc: str
    rowwise: bool
    per_row: bool
    linear: bool
    flags: dict[str, Any]  # literal class attributes, e.g. needs_references = True


@lru_cache(maxsize=256)
def signature(target: str) -> Signature:
    """Read the signature of the function, or class, named by a dotted path."""
    module, _, name = target.rpartition(".")
    found = _definitions(module)
    if found is None:
        raise ConfigError(
            f"_target_ {target}: no module named {module!r}; check the spelling, or put its folder on PYTHONPATH"
        )
    node = found.get(name)
    if node is None:
        known = sorted(n for n in found if not n.startswith("_"))
        raise ConfigError(f"_target_ {target}: {module} defines no {name!r}; it defines {', '.join(known)}")
    doc = ast.get_docstring(node) or ""
    marks = dict(_decorators(node))
    if isinstance(node, ast.ClassDef):
        init = _init_of(node, found)
        columns, params = _of_class(node, init)
        doc += "\n" + ((ast.get_docstring(init) or "") if init else "")
    else:
        columns, params = _of_function(node)
    return Signature(
        target=target,
        columns=columns,
        params={p: _param(p, annotation, default, doc) for p, annotation, default in params},
        gives=marks.get("gives", ()),
        doc=doc.strip(),
        rowwise="rowwise" in marks,
        per_row="per_row" in marks,
        linear="linear" in marks,
        flags=_flags(node) if isinstance(node, ast.ClassDef) else {},
    )


def source_file(module: str) -> Path | None:
    """Where a module lies; ours are found by path, so that their packages are not imported."""
    parts = module.split(".")
    if parts[0] == PACKAGE:
        path = Path(__file__).parent.joinpath(*parts[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return path if path.exists() else None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _definitions(module: str) -> dict[str, ast.FunctionDef | ast.ClassDef] | None:
    """Functions and classes of a module by name; None where there is no such module."""
    path = source_file(module)
    return None if path is None else _parsed(path)


@lru_cache(maxsize=256)
def _parsed(path: Path) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def _init_of(node: ast.ClassDef, found: Mapping[str, ast.FunctionDef | ast.ClassDef]) -> ast.FunctionDef | None:
    """A class's own `__init__`, or that of a base in its module."""
    own = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    bases = [b for x in node.bases if isinstance(x, ast.Name) and isinstance(b := found.get(x.id), ast.ClassDef)]
    return own or next((i for b in bases if (i := _init_of(b, found)) is not None), None)


def _decorators(node: ast.FunctionDef | ast.ClassDef) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    for d in node.decorator_list:
        call = d if isinstance(d, ast.Call) else None
        name = ast.unparse(call.func if call else d).split(".")[-1]
        found.append((name, tuple(ast.literal_eval(a) for a in call.args) if call and name == "gives" else ()))
    return found


def _of_function(node: ast.FunctionDef) -> tuple[tuple[str, ...], list[tuple[str, ast.expr | None, ast.expr | None]]]:
    a = node.args
    columns = tuple(x.arg for x in a.posonlyargs + a.args if x.arg != "self")
    return columns, [(x.arg, x.annotation, d) for x, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]


def _of_class(
    node: ast.ClassDef, init: ast.FunctionDef | None
) -> tuple[tuple[str, ...], list[tuple[str, ast.expr | None, ast.expr | None]]]:
    methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    columns = _of_function(methods["__call__"])[0] if "__call__" in methods else ()
    columns = () if columns[:1] == ("samples",) else columns  # a scorer's call takes texts, not columns
    if init is not None:
        return columns, _of_function(init)[1]
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    return columns, [(n.target.id, n.annotation, n.value) for n in fields if isinstance(n.target, ast.Name)]


def _flags(node: ast.ClassDef) -> dict[str, Any]:
    plain = [n for n in node.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)]
    return {t.id: n.value.value for n in plain for t in n.targets if isinstance(t, ast.Name)}  # type: ignore[attr-defined]


def _param(name: str, annotation: ast.expr | None, default: ast.expr | None, doc: str) -> Param:
    text = ast.unparse(annotation) if annotation is not None else "Any"
    choices: tuple[Any, ...] = ()
    if text.startswith("Literal["):
        value = ast.literal_eval(annotation.slice)  # type: ignore[union-attr]
        choices = value if isinstance(value, tuple) else (value,)
        text = type(choices[0]).__name__
    try:
        known = REQUIRED if default is None else ast.literal_eval(default)
    except ValueError:
        known = ast.unparse(default)  # type: ignore[arg-type]
    return Param(name, text, _doc_line(name, doc), known, choices)


def _doc_line(name: str, doc: str) -> str:
    """The `name: text` line of a docstring, with its indented continuation lines."""
    lines = doc.splitlines()
    for i, line in enumerate(lines):
        head = line.strip()
        if head.startswith(f"{name}:") or head.startswith(f"{name} ("):
            depth = len(line) - len(line.lstrip())
            more = []
            for follow in lines[i + 1 :]:
                if not follow.strip() or len(follow) - len(follow.lstrip()) <= depth:
                    break
                more.append(follow.strip())
            return " ".join([head.partition(":")[2].strip(), *more]).strip()
    return ""
